"""The vectorised search against the plain one, and what else it promises."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from thawline.models.decode.prefix_beam import PrefixBeamSearch, ctc_prefix_beam_search

FILE = Path(__file__).with_name("plain_search.py")


@pytest.fixture(scope="module")
def plain() -> Any:
    """(log_probs (T, V), frames, beam) -> what the plain search beside this file finds."""
    spec = importlib.util.spec_from_file_location("plain_search", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plain_search"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)

    def search(log_probs: Tensor, frames: int, beam: int) -> Any:
        value, label = log_probs[:frames].topk(min(beam, log_probs.size(1)), dim=1)
        rows = list(zip(value.double().tolist(), label.tolist(), strict=True))
        return module.search(rows, beam=beam, blank=0)

    return search


def spiky(batch: int, frames: int, labels: int, seed: int, blank: float = 2.0) -> Tensor:
    """Log probabilities that look like CTC's: mostly blank, a label now and then, some doubt."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, frames, labels, generator=generator) * 2.0
    logits[:, :, 0] += blank
    return logits.log_softmax(-1)


@pytest.mark.parametrize(
    ("labels", "beam", "blank"), [(30, 10, 2.0), (6, 5, 0.0), (4, 4, -1.0), (3, 8, 0.0), (50, 1, 3.0)]
)
def test_equals_the_plain_search_in_tokens_scores_and_times(plain: Any, labels: int, beam: int, blank: float) -> None:
    log_probs = spiky(12, 40, labels, seed=labels, blank=blank)
    lengths = torch.tensor([40, 39, 25, 1, 2, 3, 17, 40, 8, 31, 40, 5])
    found = ctc_prefix_beam_search(log_probs, lengths, beam=beam, blank=0)
    for i, hypothesis in enumerate(found):
        expected = plain(log_probs[i], int(lengths[i]), beam)
        assert list(hypothesis.nbest) == [tokens for tokens, _, _ in expected]
        assert hypothesis.nbest_scores == pytest.approx([score for _, score, _ in expected], abs=1e-9)
        assert list(hypothesis.nbest_times) == [times for _, _, times in expected]


def test_with_a_wide_beam_scores_are_the_exact_sums_over_all_alignments() -> None:
    log_probs = spiky(1, 5, 3, seed=1, blank=0.0)
    total: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(3), repeat=5):
        tokens = tuple(k for k, _ in itertools.groupby(path) if k)
        mass = math.exp(sum(float(log_probs[0, t, u]) for t, u in enumerate(path)))
        total[tokens] = total.get(tokens, 0.0) + mass
    found = ctc_prefix_beam_search(log_probs, torch.tensor([5]), beam=200, blank=0)[0]
    assert dict(zip(found.nbest, map(math.exp, found.nbest_scores), strict=True)) == pytest.approx(total)


def test_frames_fed_in_pieces_give_what_they_give_at_once() -> None:
    log_probs = spiky(3, 30, 20, seed=5)
    lengths = torch.tensor([30, 22, 7])
    whole = ctc_prefix_beam_search(log_probs, lengths, beam=6, blank=0)
    search = PrefixBeamSearch(3, beam=6, blank=0)
    for start in range(0, 30, 4):
        piece = log_probs[:, start : start + 4]
        search.advance(piece, (lengths - start).clamp(0, piece.size(1)))
        search.result()  # partial results do not disturb the search
    assert search.result() == whole


def test_silence_of_no_frames_is_the_empty_hypothesis() -> None:
    found = ctc_prefix_beam_search(torch.zeros(2, 0, 5), torch.tensor([0, 0]), beam=3, blank=0)
    assert [(h.tokens, h.score, h.times) for h in found] == [((), 0.0, ())] * 2


def test_a_pruned_prefix_that_comes_back_is_the_same_prefix(plain: Any) -> None:
    """Tokens that repeat often make prefixes leave and re-enter the beam; none may be listed twice."""
    log_probs = spiky(30, 60, 3, seed=9, blank=-1.0)
    lengths = torch.full((30,), 60)
    for i, h in enumerate(ctc_prefix_beam_search(log_probs, lengths, beam=3, blank=0)):
        assert len(set(h.nbest)) == len(h.nbest)
        assert list(h.nbest) == [tokens for tokens, _, _ in plain(log_probs[i], 60, 3)]
