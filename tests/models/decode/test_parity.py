"""Every decoding result of WeNet, token for token, with its scores, times and confidences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

MODES = ("attention", "ctc_greedy_search", "ctc_prefix_beam_search", "attention_rescoring")
SCORE = 1e-3  # float32 sums over some dozens of tokens; the fixtures' README


@pytest.mark.parametrize("mode", MODES)
def test_results_of_wenet(case: Any, mode: str) -> None:
    io, model = case.io, case.model()
    for setting in case.json("decode.json").values():
        arguments, expected = setting["args"], setting["results"][mode]
        found = model.decode(
            io["feats"],
            io["feats_lengths"],
            mode=mode,
            beam=arguments["beam_size"],
            ctc_weight=arguments["ctc_weight"],
            reverse_weight=arguments["reverse_weight"],
            chunk_size=arguments["decoding_chunk_size"],
            left_chunks=arguments["num_decoding_left_chunks"],
            length_penalty=arguments["length_penalty"],
            blank_penalty=arguments["blank_penalty"],
            **case.words,
        )
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert list(ours.tokens) == theirs["tokens"]
            assert ours.nbest[0] == ours.tokens
            assert list(ours.nbest_scores) == sorted(ours.nbest_scores, reverse=True)
            if theirs["score"] != 0.0:
                assert ours.score == pytest.approx(theirs["score"], abs=SCORE)
            if theirs["times"] is not None:
                assert list(ours.times) == theirs["times"]
            if theirs["nbest"] is not None:
                assert [list(n) for n in ours.nbest] == theirs["nbest"]
                assert ours.nbest_scores == pytest.approx(theirs["nbest_scores"], abs=SCORE)
            if mode == "attention_rescoring":
                assert ours.confidence == pytest.approx(theirs["confidence"], abs=1e-5)
                assert ours.tokens_confidence == pytest.approx(theirs["tokens_confidence"], abs=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_streaming_with_caches_decodes_as_the_chunk_mask_does(chunk_case: Any, mode: str) -> None:
    io, model = chunk_case.io, chunk_case.model()
    settings = {k: v for k, v in chunk_case.json("decode.json").items() if k != "full_context"}
    assert settings
    options = {"mode": mode, "beam": 5, "ctc_weight": 0.3, "reverse_weight": 0.3}
    for setting in settings.values():
        chunks = {
            "chunk_size": setting["args"]["decoding_chunk_size"],
            "left_chunks": setting["args"]["num_decoding_left_chunks"],
        }
        whole = model.decode(io["feats"], io["feats_lengths"], **options, **chunks)
        live = model.decode(io["feats"], io["feats_lengths"], streaming=True, **options, **chunks)
        for a, b in zip(whole, live, strict=True):
            assert a.tokens == b.tokens
            assert a.score == pytest.approx(b.score, abs=SCORE)


@pytest.mark.parametrize("mode", ["ctc_greedy_search", "ctc_prefix_beam_search", "attention_rescoring"])
def test_an_utterance_decodes_the_same_alone_and_in_a_batch(wenet_case: Any, mode: str) -> None:
    case = wenet_case("u2pp_conformer")
    io, model = case.io, case.model()
    options = {"mode": mode, "beam": 5, "ctc_weight": 0.3, "reverse_weight": 0.3}
    together = model.decode(io["feats"], io["feats_lengths"], **options)
    for i, frames in enumerate(io["feats_lengths"].tolist()):
        alone = model.decode(io["feats"][i : i + 1, :frames], torch.tensor([frames]), **options)[0]
        assert alone.tokens == together[i].tokens
        assert alone.times == together[i].times
        assert alone.score == pytest.approx(together[i].score, abs=SCORE)


def test_a_live_stream_ends_in_what_streaming_decoding_gives(chunk_case: Any) -> None:
    io, model = chunk_case.io, chunk_case.model()
    weights = {"ctc_weight": 0.3, "reverse_weight": 0.3}
    chunks = {"chunk_size": 4, "left_chunks": 2}
    options = {"mode": "attention_rescoring", "beam": 5, **weights, **chunks}
    whole = model.decode(io["feats"], io["feats_lengths"], streaming=True, **options)
    for i, frames in enumerate(io["feats_lengths"].tolist()):
        live = model.live(beam=5, **weights, **chunks)
        partial = [live.feed(piece) for piece in io["feats"][i : i + 1, :frames].split(11, dim=1)]
        final = live.finish()
        assert final.tokens == whole[i].tokens
        assert final.score == pytest.approx(whole[i].score, abs=SCORE)
        heard = [p for p in partial if p is not None]
        assert len(heard) > 1
        assert len(heard[0].tokens) <= len(heard[-1].tokens)
