"""Beam search with the attention decoder alone."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from thawline.models.decode.hypothesis import Hypothesis


class StepDecoder(Protocol):
    """What the search needs of a decoder; its state is opaque but for `select(rows)`."""

    def start(self, memory: Tensor) -> Any: ...

    def step(self, state: Any, memory_mask: Tensor, tokens: Tensor) -> tuple[Tensor, Any]: ...


@torch.no_grad()
def attention_beam_search(
    decoder: StepDecoder,
    memory: Tensor,
    memory_mask: Tensor,
    prompt: Tensor,
    *,
    eos: int,
    beam: int,
    length_penalty: float = 0.0,
    max_tokens: int | None = None,
) -> list[Hypothesis]:
    """memory (B, T', D), memory_mask (B, 1, T'), prompt (B, k) -> one hypothesis per utterance.

    WeNet's search (wenet/models/transformer/search.py, attention_beam_search): a finished hypothesis stays as it is,
    all stop when all have finished or the sequence, prompt included, is T' + 1 tokens long (or after max_tokens).
    score: ln probability of the tokens and eos, divided by length ** length_penalty; length counts all tokens that are
    not eos.
    """
    batch, frames = memory.shape[:2]
    device = memory.device
    size = prompt.size(1)
    limit = frames + 1 if max_tokens is None else size + max_tokens
    tokens = prompt.repeat_interleave(beam, 0)  # (B * N, k), grows
    score = torch.full((batch, beam), -torch.inf, device=device)
    score[:, 0] = 0.0  # all hypotheses are equal at first: one lives
    done = torch.zeros(batch * beam, dtype=torch.bool, device=device)
    state = decoder.start(memory)
    first = torch.arange(batch, device=device).unsqueeze(1) * beam  # row of each utterance's first hypothesis
    unseen = tokens
    while tokens.size(1) < limit and not bool(done.all()):
        logp, state = decoder.step(state, memory_mask, unseen)
        keep = min(beam, logp.size(1))
        value, label = logp.topk(keep, dim=1)  # (B * N, K)
        # A finished hypothesis continues in one way only, with eos at no cost.
        value = value.masked_fill(done.unsqueeze(1), -torch.inf)
        value[:, 0] = value[:, 0].masked_fill(done, 0.0)
        label = label.masked_fill(done.unsqueeze(1), eos)
        total = (score.unsqueeze(2) + value.view(batch, beam, keep)).flatten(1)
        score, chosen = total.topk(beam, dim=1)
        rows = (first + chosen // keep).flatten()
        unseen = label.view(batch, beam * keep).gather(1, chosen).view(-1, 1)
        tokens = torch.cat([tokens[rows], unseen], dim=1)
        state = state.select(rows)
        done = unseen.squeeze(1) == eos
    return _best(score, tokens, size, eos, length_penalty)


def _best(score: Tensor, tokens: Tensor, prompt: int, eos: int, length_penalty: float) -> list[Hypothesis]:
    batch, beam = score.shape
    length = (tokens != eos).sum(1).view(batch, beam).clamp(min=1)
    final, order = (score / length**length_penalty).sort(dim=1, descending=True, stable=True)
    grid = tokens.view(batch, beam, -1)[:, :, prompt:].tolist()
    out: list[Hypothesis] = []
    for b in range(batch):
        scores = final[b].tolist()
        nbest = tuple(
            tuple(t for t in grid[b][n] if t != eos)
            for n, s in zip(order[b].tolist(), scores, strict=True)
            if s > -torch.inf
        )
        plain = float(score[b, order[b, 0]])
        out.append(
            Hypothesis(
                tokens=nbest[0],
                score=scores[0],
                nbest=nbest,
                nbest_scores=tuple(scores[: len(nbest)]),
                confidence=float(torch.tensor(plain / (len(nbest[0]) + 1)).exp()),
            )
        )
    return out
