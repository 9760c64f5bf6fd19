"""The CTC head and its loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CTC(nn.Module):
    """A linear layer over encoder frames (`ctc.ctc_lo`)."""

    def __init__(self, vocabulary: int, size: int, blank: int) -> None:
        super().__init__()
        self.ctc_lo = nn.Linear(size, vocabulary)
        self.blank = blank

    def log_probs(self, encoder_out: Tensor, *, blank_penalty: float = 0.0) -> Tensor:
        """(B, T', size) -> (B, T', vocabulary), natural logarithm, float32 at least.

        blank_penalty is taken from blank's logit before the softmax: more than zero gives more tokens.
        """
        logits: Tensor = self.ctc_lo(encoder_out)
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        if blank_penalty:
            penalty = torch.zeros(logits.size(-1), dtype=logits.dtype, device=logits.device)
            penalty[self.blank] = blank_penalty
            logits = logits - penalty
        return logits.log_softmax(-1)

    @staticmethod
    def unalignable(lengths: Tensor, target: Tensor, target_lengths: Tensor) -> Tensor:
        """How many utterances have fewer frames than their target needs: a frame per token and one between equal ones.

        Their loss is zero and they teach nothing. Arguments as for `loss_sum`.
        """
        inside = torch.arange(1, target.size(1), device=target.device) < target_lengths.unsqueeze(1)
        repeats = ((target[:, 1:] == target[:, :-1]) & inside).sum(1)
        return (lengths < target_lengths + repeats).sum()

    def loss_sum(self, log_probs: Tensor, lengths: Tensor, target: Tensor, target_lengths: Tensor) -> Tensor:
        """The sum over utterances of -ln P(target | frames); zero for one that cannot be aligned (too few frames).

        log_probs (B, T', V), lengths (B,), target (B, L) padded with anything, target_lengths (B,).
        """
        return F.ctc_loss(
            log_probs.transpose(0, 1),
            target.clamp(min=0),
            lengths,
            target_lengths,
            blank=self.blank,
            reduction="sum",
            zero_infinity=True,
        )
