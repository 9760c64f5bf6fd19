"""Targets as the decoders read and write them: sos, eos, Whisper's prompt, reversal. Vectorised over the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from thawline.errors import DataError
from thawline.models.whisper_names import LANGUAGES

IGNORE = -1
"""Pads targets; never counted in a loss."""


class TeacherForcing(NamedTuple):
    """inputs (B, L + k) padded with eos, outputs (B, L + k) padded with IGNORE, lengths (B,) of both."""

    inputs: Tensor
    outputs: Tensor
    lengths: Tensor


def teacher_forcing(prompt: Tensor, target: Tensor, target_lengths: Tensor, *, eos: int) -> TeacherForcing:
    """prompt (B, k), target (B, L): read prompt + target, write the same one place on, ending in eos."""
    valid = torch.arange(target.size(1), device=target.device) < target_lengths.unsqueeze(1)
    end = torch.full_like(prompt[:, :1], eos)
    inputs = torch.cat([prompt, torch.where(valid, target, eos)], dim=1)
    outputs = torch.cat([prompt[:, 1:], torch.where(valid, target, IGNORE), end], dim=1)
    outputs[:, -1] = IGNORE
    last = (target_lengths + prompt.size(1) - 1).unsqueeze(1)
    outputs.scatter_(1, last, eos)
    return TeacherForcing(inputs, outputs, target_lengths + prompt.size(1))


def sos_prompt(batch: int, sos: int, device: torch.device) -> Tensor:
    """(B, 1) of sos."""
    return torch.full((batch, 1), sos, dtype=torch.long, device=device)


def whisper_prompt(
    special: Mapping[str, int],
    languages: Sequence[str],
    tasks: Sequence[str],
    device: torch.device,
) -> Tensor:
    """(B, 4): start, language, task, no timestamps (for the task `vad`: no speech twice).

    WeNet: wenet/utils/common.py, add_whisper_tokens. Raises DataError for a language or task that Whisper does not
    know.
    """
    rows = []
    for language, task in zip(languages, tasks, strict=True):
        if language not in LANGUAGES:
            raise DataError(f"unknown language {language!r}", fix=f"use one of {', '.join(LANGUAGES)}")
        if task not in ("transcribe", "translate", "vad"):
            raise DataError(f"unknown task {task!r}", fix="use transcribe, translate or vad")
        third = special["no_speech" if task == "vad" else task]
        fourth = special["no_speech" if task == "vad" else "no_timestamps"]
        rows.append([special["sot"], special["sot"] + 1 + LANGUAGES.index(language), third, fourth])
    return torch.tensor(rows, dtype=torch.long, device=device)


def reversed_target(target: Tensor, lengths: Tensor) -> Tensor:
    """Each row's first `length` tokens in reverse order; padding is IGNORE."""
    position = torch.arange(target.size(1), device=target.device)
    index = lengths.unsqueeze(1) - 1 - position
    flipped = target.gather(1, index.clamp(min=0))
    return torch.where(index >= 0, flipped, IGNORE)
