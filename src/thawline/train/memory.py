"""When memory runs out: how that is recognised, what a batch is cut into, and trying again in smaller pieces."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch

from thawline.errors import ThawlineError
from thawline.train.microbatch import edges

T = TypeVar("T")


class OutOfMemory(Exception):
    """Something did not fit, and nothing has changed: it may be done again in smaller pieces."""


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether memory ran out, on the host or on the device."""
    # The CPU's allocator and cuBLAS have no error class of their own; these are their sentences.
    said = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(exc, (torch.OutOfMemoryError, MemoryError)) or any(words in str(exc) for words in said)


def pieces(batch: Any, split: int) -> Sequence[Any]:
    """`batch` cut into `split` pieces of rows as equal as can be (fewer where it has fewer rows)."""
    if split == 1:
        return (batch,)
    return tuple(batch.rows(a, b) for a, b in pairwise(edges(len(batch.keys), split)) if a < b)


def until_it_fits(
    take: Callable[[int], T], split: int, *, largest: int, what: str, where: str, tell: Callable[[int], None]
) -> T:
    """`take(split)`, with twice the split as long as it raises OutOfMemory.

    largest: rows of the largest batch; cut into so many pieces, it is taken one sample at a time
    what, where: for the ThawlineError that is raised where even that does not fit
    tell:    is called with each new split before it is tried
    """
    while True:
        try:
            return take(split)
        except OutOfMemory as exc:
            if split >= largest:
                raise ThawlineError(
                    f"{what} does not fit into memory, even one sample at a time: {exc}",
                    where=where,
                    fix="a smaller data.batch, shorter samples, run.recompute: true, or less that trains",
                ) from exc
        # Outside the handler, where the traceback no longer holds the tensors.
        free()
        split *= 2
        tell(split)


def free() -> None:
    """Give cached memory back after something did not fit."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
