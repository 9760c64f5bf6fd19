"""The mean of several checkpoints' tensors, one tensor at a time.

WeNet's `wenet/bin/average_model.py` adds the tensors in their own type and divides: float16 sums lose bits, and integer
buffers become floats (`num_batches_tracked` is 1234.5 in its file, and truncated when a model loads it). Here floats
are summed in float64 and rounded once; integers keep their type and get the mean truncated toward zero, which is what a
model that loads WeNet's file ends up with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from thawline.errors import CheckpointError


def average(sources: Sequence[tuple[str, Mapping[str, Tensor]]]) -> Iterator[tuple[str, Tensor]]:
    """Mean over the sources of each tensor, in the first one's order.

    sources: (name for messages, its tensors by name); mappings that read lazily from files keep memory at one tensor
    Raises CheckpointError, before anything is yielded, if there is no source or their names differ; and at a tensor
    whose shape or element type differs, or that has no mean (booleans that differ).
    """
    if not sources:
        raise CheckpointError("there is nothing to average", fix="give at least one checkpoint")
    first_label, first = sources[0]
    for label, tensors in sources[1:]:
        odd = sorted(set(first) ^ set(tensors))
        if odd:
            raise CheckpointError(
                f"holds other tensors than {first_label}: {', '.join(odd[:5])}{', ...' if len(odd) > 5 else ''}",
                where=label,
                fix="average checkpoints of one run and one phase of its plan",
            )
    return ((name, _mean(name, sources)) for name in first)


def _mean(name: str, sources: Sequence[tuple[str, Mapping[str, Tensor]]]) -> Tensor:
    first_label, tensors = sources[0]
    first = tensors[name].detach()
    wide = torch.complex128 if first.is_complex() else torch.float64 if first.is_floating_point() else torch.int64
    total = first.to(wide, copy=True)
    for label, others in sources[1:]:
        other = others[name].detach()
        if (other.shape, other.dtype) != (first.shape, first.dtype):
            raise CheckpointError(
                f"{name} is {tuple(other.shape)} {other.dtype} here and {tuple(first.shape)} {first.dtype} in "
                f"{first_label}",
                where=label,
                fix="average checkpoints of one run",
            )
        if first.dtype == torch.bool and not torch.equal(first, other):
            raise CheckpointError(
                f"{name} is true or false and differs from {first_label}: there is no mean",
                where=label,
                fix="leave it out, or take the last checkpoint as it is",
            )
        total += other
    if first.dtype == torch.bool:
        return first
    mode = None if total.is_complex() or total.is_floating_point() else "trunc"
    return torch.div(total, len(sources), rounding_mode=mode).to(first.dtype)
