"""Scores of the modes for which WeNet gives none, penalties, contexts, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from thawline.errors import RecipeError
from thawline.models.decode.context import ContextGraph
from thawline.models.decode.greedy import ctc_greedy_search
from thawline.models.decode.options import DecodeOptions
from thawline.models.decode.prefix_beam import ctc_prefix_beam_search
from thawline.models.wenet.targets import teacher_forcing


def paths(*labels: int, size: int = 5, sure: float = 0.9) -> torch.Tensor:
    """Frames that say `labels` with probability `sure` each."""
    rest = (1 - sure) / (size - 1)
    rows = torch.full((1, len(labels), size), rest)
    rows[0, torch.arange(len(labels)), torch.tensor(labels)] = sure
    return rows.log()


def test_greedy_removes_repeats_and_blanks_and_says_when() -> None:
    found = ctc_greedy_search(paths(0, 3, 3, 0, 3, 2, 2, 1), torch.tensor([8]), blank=0)[0]
    assert found.tokens == (3, 3, 2, 1)
    assert found.times == (1, 4, 5, 7)
    assert found.score == pytest.approx(8 * float(torch.tensor(0.9).log()), rel=1e-5)
    assert found.confidence == pytest.approx(0.9, rel=1e-5)
    assert found.tokens_confidence == pytest.approx([0.9] * 4, rel=1e-5)


def test_greedy_stops_at_the_length_and_may_find_nothing() -> None:
    log_probs = paths(1, 2, 3, 4).expand(3, -1, -1)
    found = ctc_greedy_search(log_probs, torch.tensor([4, 2, 0]), blank=0)
    assert [h.tokens for h in found] == [(1, 2, 3, 4), (1, 2), ()]
    assert found[2].score == 0.0


def test_the_attention_score_is_the_log_probability_of_what_was_written(case: Any) -> None:
    io, model = case.io, case.model()
    out, lengths = model.encode(io["feats"], io["feats_lengths"])
    found = model.decode(io["feats"], io["feats_lengths"], mode="attention", beam=4, max_tokens=6, **case.words)
    for b, h in enumerate(found):
        words = {k: v[b : b + 1] for k, v in case.words.items()}
        prompt = model.prompt(1, out.device, **words)
        for tokens, score in zip(h.nbest, h.nbest_scores, strict=True):
            target = torch.tensor([tokens], dtype=torch.long).reshape(1, -1)
            read = teacher_forcing(prompt, target, torch.tensor([len(tokens)]), eos=case.config.eos)
            with torch.no_grad():
                logp = model.decoder_logits(out[b : b + 1], lengths[b : b + 1], read).log_softmax(-1)[0]
            start = prompt.size(1) - 1
            total = sum(float(logp[start + i, t]) for i, t in enumerate(tokens))
            ended = float(logp[start + len(tokens), case.config.eos]) if len(tokens) < 6 else 0.0
            assert score == pytest.approx(total + ended, abs=1e-3)


def test_a_length_penalty_divides_the_attention_score(wenet_case: Any) -> None:
    case = wenet_case("u2_conformer")
    io, model = case.io, case.model()
    plain = model.decode(io["feats"], io["feats_lengths"], mode="attention", beam=4, max_tokens=5)
    mean = model.decode(io["feats"], io["feats_lengths"], mode="attention", beam=4, max_tokens=5, length_penalty=1.0)
    for a, b in zip(plain, mean, strict=True):
        means = {t: s / max(len(t), 1) for t, s in zip(a.nbest, a.nbest_scores, strict=True)}
        assert dict(zip(b.nbest, b.nbest_scores, strict=True)) == pytest.approx(means)
        assert b.score == max(b.nbest_scores)


def test_a_blank_penalty_gives_more_tokens_and_is_a_softmax_over_shifted_logits(wenet_case: Any) -> None:
    case = wenet_case("u2_conformer")
    io, model = case.io, case.model()
    out, _ = model.encode(io["feats"], io["feats_lengths"])
    logits = model.ctc.ctc_lo(out).detach().clone()
    logits[:, :, 0] -= 3.0
    torch.testing.assert_close(model.ctc_log_probs(out, blank_penalty=3.0), logits.log_softmax(-1))
    few = model.decode(io["feats"], io["feats_lengths"], mode="ctc_greedy_search")
    many = model.decode(io["feats"], io["feats_lengths"], mode="ctc_greedy_search", blank_penalty=3.0)
    assert sum(len(h.tokens) for h in many) > sum(len(h.tokens) for h in few)


def test_rescoring_orders_all_candidates(wenet_case: Any) -> None:
    case = wenet_case("u2pp_conformer")
    io, model = case.io, case.model()
    ctc = model.decode(io["feats"], io["feats_lengths"], mode="ctc_prefix_beam_search", beam=5)
    both = model.decode(io["feats"], io["feats_lengths"], mode="attention_rescoring", beam=5, ctc_weight=0.5)
    for a, b in zip(ctc, both, strict=True):
        assert set(a.nbest) == set(b.nbest)
        assert b.nbest_times is not None
        assert len(b.nbest_times) == 5


@pytest.mark.parametrize(
    ("options", "what", "fix"),
    [
        ({"mode": "attention_rescore"}, "unknown decoding mode 'attention_rescore'", "attention_rescoring"),
        ({"beams": 3}, "unknown decoding option 'beams'", "beam"),
        ({"beam": 0}, "a beam of 0 keeps nothing", "1 or more"),
        ({"chunk_size": 0}, "a chunk of 0 frames", "-1"),
        ({"streaming": True}, "streaming needs a chunk size", "16"),
        ({"blank_penalty": -1.0}, "-1.0 is negative", "0 or more"),
        ({"reverse_weight": 1.5}, "1.5 is outside 0..1", "0.3"),
    ],
)
def test_unknown_or_meaningless_options_are_refused(options: dict[str, Any], what: str, fix: str) -> None:
    with pytest.raises(RecipeError) as caught:
        DecodeOptions.of(**options)
    assert what in caught.value.what
    assert fix in caught.value.fix


def test_modes_that_the_model_cannot_serve_are_refused_before_computing(wenet_case: Any) -> None:
    model = wenet_case("u2_conformer").model()
    nothing = torch.zeros(1, 0, 80), torch.tensor([0])
    with pytest.raises(RecipeError, match="no right-to-left decoder"):
        model.decode(*nothing, mode="attention_rescoring", reverse_weight=0.3)
    with pytest.raises(RecipeError, match="does not take a context"):
        model.decode(*nothing, mode="attention", context=ContextGraph([[1]]))
    model.decoder = None
    with pytest.raises(RecipeError, match="no attention decoder"):
        model.decode(*nothing, mode="attention")


def test_every_model_has_a_mode_of_its_own(case: Any) -> None:
    model = case.empty()
    assert model.default_mode == ("attention" if case.config.is_whisper else "attention_rescoring")
    model.decoder = None
    assert model.default_mode == "ctc_prefix_beam_search"


# --- contexts ---


def walk(graph: ContextGraph, tokens: list[int]) -> float:
    """The bonus of a whole transcript."""
    node, total = torch.zeros(1, 1, dtype=torch.long), 0.0
    for token in tokens:
        gain, following = graph.step(node, torch.tensor([[token]]))
        total, node = total + float(gain), following.reshape(1, 1)
    return total + float(graph.final[node.item()])


@pytest.mark.parametrize(
    ("tokens", "bonus"),
    [
        ([1, 2, 3], 6.0),  # the whole phrase
        ([9, 1, 2, 3, 9], 6.0),  # anywhere
        ([1, 2, 9], 0.0),  # begun, left
        ([1, 2], 0.0),  # begun, over
        ([1, 1, 2, 3], 6.0),  # begun twice
        ([1, 2, 3, 1, 2, 3], 12.0),
        ([7], 2.0),
        ([7, 8], 4.0),  # a phrase that begins another one
        ([7, 9], 2.0),
        ([1, 2, 7, 8], 4.0),
        ([9, 9], 0.0),
    ],
)
def test_a_context_rewards_whole_phrases_only(tokens: list[int], bonus: float) -> None:
    graph = ContextGraph([[1, 2, 3], [7], [7, 8]], score=2.0)
    assert walk(graph, tokens) == pytest.approx(bonus)


def test_a_context_turns_a_near_miss_into_the_phrase() -> None:
    log_probs = paths(1, 0, 2, 0, 3, sure=0.6)
    log_probs[0, 4] = torch.tensor([0.02, 0.02, 0.02, 0.5, 0.44]).log()
    lengths = torch.tensor([5])
    plain = ctc_prefix_beam_search(log_probs, lengths, beam=1500, blank=0)[0]
    told = ctc_prefix_beam_search(log_probs, lengths, beam=1500, blank=0, context=ContextGraph([[1, 2, 4]], score=1.0))[
        0
    ]
    assert plain.tokens == (1, 2, 3)
    assert told.tokens == (1, 2, 4)
    unbiased = dict(zip(plain.nbest, plain.nbest_scores, strict=True))
    assert told.score == pytest.approx(unbiased[(1, 2, 4)] + 3.0)


def test_an_empty_context_is_refused() -> None:
    with pytest.raises(RecipeError, match="at least one phrase"):
        ContextGraph([])
    with pytest.raises(RecipeError, match="no phrase may be empty"):
        ContextGraph([[1], []])
