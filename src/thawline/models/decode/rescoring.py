"""Attention rescoring: the decoders judge what CTC found, all hypotheses of all utterances in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thawline.models.decode.hypothesis import Hypothesis


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The n-best lists of a batch as one rectangle; utterances with fewer hypotheses have empty, dead rows.

    tokens: (B * n, L) int64 padded with 0, lengths: (B * n,), width: n
    """

    tokens: Tensor
    lengths: Tensor
    width: int


def candidates(found: Sequence[Hypothesis], device: torch.device) -> Candidates:
    """The n-best lists of `found`, padded."""
    width = max(len(h.nbest) for h in found)
    rows = [list(h.nbest[n]) if n < len(h.nbest) else [] for h in found for n in range(width)]
    longest = max(len(r) for r in rows)
    padded = torch.tensor([r + [0] * (longest - len(r)) for r in rows], dtype=torch.long)
    lengths = torch.tensor([len(r) for r in rows], dtype=torch.long)
    return Candidates(tokens=padded.reshape(len(rows), longest).to(device), lengths=lengths.to(device), width=width)


def token_scores(logits: Tensor, outputs: Tensor, *, prompt: int, ignore: int) -> Tensor:
    """ln probability of each output token, eos included: logits (R, k + L, V), outputs (R, k + L) -> (R, L + 1)
    float64.

    The k - 1 tokens of the prompt that are themselves outputs are left out; positions past eos are 0.
    """
    logits, outputs = logits[:, prompt - 1 :], outputs[:, prompt - 1 :]
    chosen = logits.float().log_softmax(-1).gather(-1, outputs.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen.double().masked_fill(outputs == ignore, 0.0)


def rescore(
    found: Sequence[Hypothesis],
    rows: Candidates,
    left: Tensor,
    right: Tensor | None,
    *,
    ctc_weight: float,
    reverse_weight: float,
) -> list[Hypothesis]:
    """The hypotheses in their new order.

    left, right: (B * n, L + 1) token scores of the two decoders, each in its own reading order. score: left * (1 -
    reverse_weight) + right * reverse_weight + ctc_weight * CTC score (WeNet: search.py, attention_rescoring).
    confidence is exp(attention part / (tokens + 1)); a token's is the mean of its probabilities in the two directions.
    """
    attention = left.sum(1)
    each = left.exp()
    if right is not None:
        attention = attention * (1 - reverse_weight) + right.sum(1) * reverse_weight
        # The right decoder's j-th output is the token j places before the end.
        index = rows.lengths.unsqueeze(1) - 1 - torch.arange(left.size(1), device=left.device)
        each = (each + right.exp().gather(1, index.clamp(min=0))) / 2
    scores = attention.tolist()
    out: list[Hypothesis] = []
    for b, h in enumerate(found):
        base = b * rows.width
        total = [scores[base + n] + ctc_weight * h.nbest_scores[n] for n in range(len(h.nbest))]
        order = sorted(range(len(total)), key=lambda n, total=total: -total[n])  # type: ignore[misc]
        top = order[0]
        times = h.nbest_times
        out.append(
            Hypothesis(
                tokens=h.nbest[top],
                score=total[top],
                times=None if times is None else times[top],
                nbest=tuple(h.nbest[n] for n in order),
                nbest_scores=tuple(total[n] for n in order),
                nbest_times=None if times is None else tuple(times[n] for n in order),
                confidence=math.exp(scores[base + top] / (len(h.nbest[top]) + 1)),
                tokens_confidence=tuple(each[base + top, : len(h.nbest[top])].tolist()),
            )
        )
    return out
