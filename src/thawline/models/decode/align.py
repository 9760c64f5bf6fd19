"""When a known text was said: the likeliest CTC path that spells it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from thawline.errors import DataError


@torch.no_grad()
def ctc_align(log_probs: Tensor, tokens: Sequence[int], *, blank: int) -> tuple[int, ...]:
    """log_probs (T, V) natural logarithm, tokens (L,) without blanks -> the frame at which each token begins.

    Viterbi over blank, token, blank, token, ... (Graves 2006, section 4.1, with max for the sum). Raises DataError
    where T frames cannot hold the tokens: one frame each, and one between equal neighbours.
    """
    if not tokens:
        return ()
    frames = log_probs.size(0)
    needed = len(tokens) + sum(a == b for a, b in pairwise(tokens))
    if frames < needed:
        raise DataError(f"{len(tokens)} tokens need {needed} encoder frames, there are {frames}")
    states = [blank] * (2 * len(tokens) + 1)
    states[1::2] = list(tokens)
    emitted = log_probs[:, states].double().cpu()  # (T, S)
    # A token may be entered from the one before it directly, unless the two are equal.
    skip = torch.tensor([i >= 3 and s != blank and s != states[i - 2] for i, s in enumerate(states)])
    score = torch.full((len(states),), -torch.inf, dtype=torch.float64)
    score[:2] = emitted[0, :2]
    never = torch.tensor([-torch.inf], dtype=torch.float64)
    origin = torch.zeros(frames, len(states), dtype=torch.int8)
    for t in range(1, frames):
        one = torch.cat([never, score[:-1]])
        two = torch.cat([never, never, score[:-2]]).masked_fill(~skip, -torch.inf)
        best = torch.stack([score, one, two]).max(0)
        origin[t] = best.indices.to(torch.int8)
        score = best.values + emitted[t]
    state = len(states) - 1 if score[-1] >= score[-2] else len(states) - 2
    begins = [0] * len(tokens)
    steps = origin.tolist()
    for t in range(frames - 1, -1, -1):
        if state % 2:
            begins[state // 2] = t
        state -= steps[t][state]
    return tuple(begins)
