"""A Whisper's n-best list is that of transformers' own beam search, sequences and scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models.test_whisper import GENERATION, features, tiny

transformers = pytest.importorskip("transformers")

PROMPT = [41, 42, 45, 47]


def inclined_to_end() -> Any:
    """A tiny Whisper of which some hypotheses end and some run to the last position."""
    model = tiny()
    torch.manual_seed(2)
    weight = model.proj_out.weight.data
    weight[40] = weight.mean(0) + 0.8 * weight[37]
    return model


def searched(model: Any, feats: torch.Tensor, beam: int, length_penalty: float, before: list[int]) -> Any:
    """transformers' plain beam search with Whisper's suppressed tokens, and nothing of its Whisper in between."""
    prompt = [*before, *PROMPT]
    suppress = transformers.generation.SuppressTokensLogitsProcessor(GENERATION["suppress_tokens"])
    begin = transformers.generation.SuppressTokensAtBeginLogitsProcessor(
        GENERATION["begin_suppress_tokens"], len(prompt)
    )
    return transformers.GenerationMixin.generate(
        model,
        encoder_outputs=model.model.encoder(feats.transpose(1, 2)),
        decoder_input_ids=torch.tensor([prompt] * len(feats)),
        logits_processor=transformers.LogitsProcessorList([suppress, begin]),
        num_beams=beam,
        num_return_sequences=beam,
        length_penalty=length_penalty,
        early_stopping=True,
        max_length=20,
        return_dict_in_generate=True,
        output_scores=True,
    )


@pytest.mark.parametrize("beam", [2, 5])
@pytest.mark.parametrize("length_penalty", [1.0, 0.3])
@pytest.mark.parametrize("make", [tiny, inclined_to_end])
@torch.no_grad()
def test_nbest_is_transformers_own_in_its_order_with_its_scores(make: Any, length_penalty: float, beam: int) -> None:
    model, (feats, lengths) = make(), features()
    found = model.decode(feats, lengths, beam=beam, languages=["en"] * 3, length_penalty=length_penalty)
    theirs = searched(model, feats, beam, length_penalty, [])
    texts = [tuple(t for t in row[len(PROMPT) :] if t < 40) for row in theirs.sequences.tolist()]
    for n, hypothesis in enumerate(found):
        assert hypothesis.nbest == tuple(texts[n * beam : (n + 1) * beam])
        # The scores are computed anew in one pass over each text: equal up to the rounding of attention with a
        # cache, which this model's eightfold weights make large (4e-5 is seen).
        assert hypothesis.nbest_scores == pytest.approx(theirs.sequences_scores[n * beam : (n + 1) * beam], abs=2e-4)
        assert list(hypothesis.nbest_scores) == sorted(hypothesis.nbest_scores, reverse=True)
    ended = {len(text) < 16 for text in texts}
    assert ended == ({False, True} if make is inclined_to_end else {False})


@torch.no_grad()
def test_the_best_hypothesis_is_what_it_was_without_its_runners_up() -> None:
    model, (feats, lengths) = inclined_to_end(), features()
    alone = model.generate(
        feats.transpose(1, 2), attention_mask=torch.ones(3, 50, dtype=torch.long), language=["en"] * 3,
        task="transcribe", num_beams=4, early_stopping=True,
    )  # fmt: skip
    found = model.decode(feats, lengths, beam=4, languages=["en"] * 3)
    for hypothesis, row in zip(found, alone.tolist(), strict=True):
        assert hypothesis.nbest[0] == hypothesis.tokens == tuple(t for t in row if t < 40)
        assert len(set(hypothesis.nbest)) == len(hypothesis.nbest) == 4


def test_a_greedy_search_and_one_with_a_fallback_keep_one() -> None:
    model, (feats, lengths) = tiny(), features(1)
    (greedy,) = model.decode(feats, lengths, languages=["en"])
    assert greedy.nbest == (greedy.tokens,)
    assert greedy.nbest_scores == (greedy.score,)
    assert model._beams is None


def test_a_search_that_fails_leaves_nobody_listening(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (feats, lengths) = tiny(), features(1)

    def fails(*args: Any, **settings: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(transformers.GenerationMixin, "generate", fails)
    with pytest.raises(RuntimeError, match="no"):
        model.decode(feats, lengths, beam=2, languages=["en"])
    assert model._beams is None
