"""What one step sees: planned batches read ahead by the loader and put together again, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, tee
from time import perf_counter
from typing import Any

from thawline.data.loader import BadSample, LoadedBatch, Loader
from thawline.data.sampler import Cursor
from thawline.train.microbatch import PlannedStep


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """What one step sees.

    micro_batches: collated, by number; a micro-batch whose samples were all unreadable is left out
    next:          cursor of the first batch after these
    batches:       planned batches it is made of (`run.accumulate`, fewer at the end of an epoch)
    samples, keys: how many samples were asked for, and the readable ones by key
    """

    micro_batches: Mapping[int, Any]
    next: Cursor
    batches: int
    samples: int
    keys: tuple[str, ...]
    bad: tuple[BadSample, ...]


def global_batches(
    loader: Loader[Any, Any], planned: Iterator[PlannedStep], *, waited: Callable[[float], None]
) -> Iterator[GlobalBatch]:
    """The global batch of each planned step, in order.

    waited: told after each batch how long it was waited for, in seconds
    """
    ahead, now = tee(planned)
    requests = (request for step in ahead for request in step.requests.values())
    loaded = _timed(loader.iterate(requests), waited)
    for step in now:
        yield _global_batch(step, tuple(islice(loaded, len(step.requests))))


def _timed(batches: Iterator[LoadedBatch[Any]], waited: Callable[[float], None]) -> Iterator[LoadedBatch[Any]]:
    while True:
        start = perf_counter()
        batch = next(batches, None)
        waited(perf_counter() - start)
        if batch is None:
            return
        yield batch


def _global_batch(step: PlannedStep, group: Sequence[LoadedBatch[Any]]) -> GlobalBatch:
    whole = {n: b.batch for n, b in zip(step.requests, group, strict=True) if b.batch is not None}
    return GlobalBatch(
        micro_batches=whole,
        next=step.next,
        batches=step.batches,
        samples=sum(len(b.request.ids) for b in group),
        keys=tuple(key for batch in whole.values() for key in batch.keys),
        bad=tuple(sample for b in group for sample in b.bad),
    )
