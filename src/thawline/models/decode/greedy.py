"""CTC best path: the likeliest label of each frame, repeats and blanks removed."""

from __future__ import annotations

import torch
from torch import Tensor

from thawline.models.decode.hypothesis import Hypothesis


def ctc_greedy_search(log_probs: Tensor, lengths: Tensor, *, blank: int) -> list[Hypothesis]:
    """log_probs (B, T, V), lengths (B,) -> one hypothesis per utterance.

    score: ln probability of the best path. times: the first frame of each token's run. A token's confidence is its
    highest probability within the run; confidence is exp(score / frames).
    """
    frames = log_probs.size(1)
    value, label = log_probs.max(dim=-1)  # (B, T)
    valid = torch.arange(frames, device=log_probs.device) < lengths.unsqueeze(1)
    label = label.masked_fill(~valid, blank)
    before = torch.cat([torch.full_like(label[:, :1], -1), label[:, :-1]], dim=1)
    starts = (label != before) & (label != blank)
    score = (value.double() * valid).sum(1)
    # Frames of a run share the number of runs begun so far; the peak of a run is a maximum over equal numbers.
    run = starts.long().cumsum(1)
    voiced = label != blank
    peak = torch.full((label.size(0), frames + 1), -torch.inf, dtype=value.dtype, device=value.device)
    peak.scatter_reduce_(1, run, value.masked_fill(~voiced, -torch.inf), "amax")
    counts = starts.sum(1).tolist()
    times = torch.split(starts.nonzero()[:, 1], counts)
    tokens = torch.split(label[starts], counts)
    out: list[Hypothesis] = []
    for i, total in enumerate(score.tolist()):
        found = tuple(tokens[i].tolist())
        at = tuple(times[i].tolist())
        length = max(int(lengths[i]), 1)
        out.append(
            Hypothesis(
                tokens=found,
                score=total,
                times=at,
                nbest=(found,),
                nbest_scores=(total,),
                nbest_times=(at,),
                confidence=float(torch.tensor(total / length).exp()),
                tokens_confidence=tuple(peak[i, 1 : len(found) + 1].exp().tolist()),
            )
        )
    return out
