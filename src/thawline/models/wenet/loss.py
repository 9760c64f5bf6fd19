"""Losses as sums with the weights that normalise them.

A sum over micro-batches divided by the whole batch's weights is the loss of the whole batch: accumulation, splitting
and world size then change nothing but the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thawline.models.wenet.targets import IGNORE

Weight = Literal["utterances", "tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One part of the loss, not normalised, its coefficient applied.

    per: which of the batch's weights divides it
    """

    sum: Tensor
    per: Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSums:
    """What one micro-batch gives.

    terms:   "ctc" and/or "attention"
    weights: this micro-batch's utterances and tokens (the tokens that the attention loss counts, eos included)
    metrics: name -> (sum, count), detached; their ratio of sums is the metric
    """

    terms: Mapping[str, Term]
    weights: Mapping[str, float]
    metrics: Mapping[str, tuple[Tensor, Tensor]]

    def total(self, weights: Mapping[str, float] | None = None) -> Tensor:
        """The part of the loss that this micro-batch contributes to a batch of `weights` (its own by default)."""
        divide = self.weights if weights is None else weights
        parts = [term.sum / divide[term.per] for term in self.terms.values()]
        return torch.stack(parts).sum() if len(parts) > 1 else parts[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """The normalised losses of one batch, as WeNet's model returns them."""

    total: Tensor
    ctc: Tensor | None
    attention: Tensor | None
    accuracy: Tensor | None
    """Share of the left decoder's tokens that teacher forcing gets right."""


def smoothed_divergence_sum(logits: Tensor, target: Tensor, smoothing: float) -> Tensor:
    """Sum over tokens of KL(smoothed target || softmax(logits)).

    logits (B, L, V), target (B, L) with IGNORE. The target's row has 1 - smoothing at the token and smoothing / (V - 1)
    elsewhere (WeNet: wenet/models/transformer/label_smoothing_loss.py). The smoothed row is not built: with p the
    target's weight and q each other's, the divergence is p ln p + (V - 1) q ln q - (p - q) logp[token] - q sum(logp).
    """
    classes = logits.size(-1)
    logp = logits.float().log_softmax(-1) if logits.dtype != torch.float64 else logits.log_softmax(-1)
    counted = target != IGNORE
    chosen = logp.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    p, q = 1.0 - smoothing, smoothing / (classes - 1)
    entropy = _x_log_x(p) + (classes - 1) * _x_log_x(q)
    divergence = entropy - (p - q) * chosen
    if q:
        divergence = divergence - q * logp.sum(-1)
    return divergence.masked_fill(~counted, 0.0).sum()


def correct(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens whose largest logit is right, tokens counted); logits (B, L, V), target (B, L) with IGNORE."""
    counted = target != IGNORE
    hits = (logits.detach().argmax(-1) == target) & counted
    return hits.sum(), counted.sum()


def _x_log_x(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).log()) * x if x > 0 else 0.0
