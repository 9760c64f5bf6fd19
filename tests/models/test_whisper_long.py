"""Long recordings, times of tokens, second attempts: transformers' own results as plain values. Tiny random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models.test_whisper import features, tiny

from thawline.errors import RecipeError
from thawline.models.whisper_long import Fallback, decode_long

pytest.importorskip("transformers")

HEADS = [[0, 1], [1, 0]]
NEVER_SURE = Fallback(log_prob=0.0, no_speech=1.0)  # every window goes through all temperatures


def with_heads() -> Any:
    model = tiny()
    model.generation_config.alignment_heads = HEADS
    return model


def transformers_own(model: Any, feats: torch.Tensor, frames: int) -> list[Any]:
    mask = (torch.arange(len(feats)) < frames).long()[None]
    found = model.generate(
        feats.T[None], attention_mask=mask, language="en", task="transcribe", return_timestamps=True,
        return_segments=True, return_token_timestamps=True,
    )  # fmt: skip
    return list(found["segments"][0])


@pytest.mark.parametrize(("total", "heard"), [(50, 50), (50, 36), (140, 140)])
def test_segments_and_the_times_of_tokens_are_transformers_own(total: int, heard: int) -> None:
    feats = torch.randn(total, 8, generator=torch.Generator().manual_seed(3))
    found = decode_long(with_heads(), feats, heard=heard, token_times=True)
    theirs = transformers_own(with_heads(), feats, heard)
    assert len(found) == len(theirs)
    for ours, segment in zip(found, theirs, strict=True):
        tokens = segment["tokens"].tolist()
        assert list(ours.tokens) == [t for t in tokens if t < 48]
        assert ours.start_s == float(segment["start"])
        over = [float(segment["start"]), *segment["token_timestamps"].tolist()]
        assert list(ours.spans) == [(over[n], over[n + 1]) for n, t in enumerate(tokens) if t < 48]


def test_asking_for_times_leaves_the_model_as_it_was() -> None:
    model, feats = tiny(), features(1)[0][0]
    before = model.config._attn_implementation, model.generation_config.to_dict()
    plain = decode_long(model, feats)
    assert decode_long(model, feats, token_times=True)[0].tokens == plain[0].tokens
    assert (model.config._attn_implementation, model.generation_config.to_dict()) == before
    assert plain[0].spans == ()


def test_without_known_heads_those_of_the_upper_half_are_used() -> None:
    known, unknown = with_heads(), tiny()
    known.generation_config.alignment_heads = [[1, 0], [1, 1]]
    feats = features(1)[0][0]
    assert decode_long(unknown, feats, token_times=True) == decode_long(known, feats, token_times=True)


def test_a_second_attempt_is_a_function_of_the_recording_alone() -> None:
    model, (feats, lengths) = tiny(), features()
    torch.manual_seed(1)
    alone = model.decode(feats[1:2], lengths[1:2], languages=["en"], fallback=NEVER_SURE)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    together = model.decode(feats, lengths, languages=["en"] * 3, fallback=NEVER_SURE)
    assert torch.equal(torch.get_rng_state(), state)
    assert together[1].tokens == alone[0].tokens
    greedy = model.decode(feats, lengths, languages=["en"] * 3)
    assert together[1].tokens != greedy[1].tokens  # it was drawn
    assert together[1].score == pytest.approx(alone[0].score, abs=1e-4)


def test_what_passes_the_thresholds_is_the_greedy_text_with_its_score() -> None:
    model, (feats, lengths) = tiny(), features()
    content = Fallback(compression_ratio=99.0, log_prob=-99.0, no_speech=1.0)
    once = model.decode(feats, lengths, languages=["en", "zh", "en"])
    again = model.decode(feats, lengths, languages=["en", "zh", "en"], fallback=content)
    assert [h.tokens for h in again] == [h.tokens for h in once]
    assert [h.score for h in again] == pytest.approx([h.score for h in once], abs=1e-4)


def test_what_repeats_itself_is_tried_again() -> None:
    model, (feats, lengths) = tiny(), features(1)
    strict = Fallback(compression_ratio=0.01, log_prob=-99.0, no_speech=1.0)
    once, again = (model.decode(feats, lengths, languages=["en"], fallback=f)[0] for f in (None, strict))
    assert once.tokens != again.tokens


def test_silence_is_left_out() -> None:
    model, (feats, lengths) = tiny(), features(2)
    silent = Fallback(log_prob=0.0, no_speech=0.0)
    assert [h.tokens for h in model.decode(feats, lengths, languages=["en"] * 2, fallback=silent)] == [(), ()]


def test_temperatures_below_zero_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"temperatures of \[-0.2\]"):
        Fallback(temperatures=(-0.2,))
