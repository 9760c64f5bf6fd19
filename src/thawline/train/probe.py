"""How large the pieces of a micro-batch may be: found once, before the first step, by trying.

A try takes the forward and backward passes of a piece, with gradients and the optimizer's state in memory as in every
later step. Nothing is updated. On a GPU its memory is the limit. On a CPU a process that takes too much is killed, not
told; there the limit is a share of what the machine has free, for what autograd keeps between the two passes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from thawline.data.loader import Loader
from thawline.freeze.doctor import SavedActivations
from thawline.train.engine import Engine
from thawline.train.memory import free, is_out_of_memory
from thawline.train.microbatch import PlannedStep
from thawline.train.seeding import own_generators
from thawline.train.step import Passes
from thawline.train.task import Samples, Task

_STEPS = 1000  # how far the plan is searched for its heaviest micro-batch
_SHARE = 0.8  # of the free memory of a machine without GPU
_MEMINFO = Path("/proc/meminfo")
_CGROUPS = (  # of a container, version 2 and version 1: the limit, and what is taken of it
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)


@dataclass(frozen=True, slots=True)
class Fit:
    """Samples of a piece, and the number of pieces of a micro-batch that come to that."""

    rows: int
    split: int


def choose(
    wanted: int | Literal["auto"],
    engine: Engine,
    task: Task,
    samples: Samples,
    steps: Iterable[PlannedStep],
    *,
    seed: int,
) -> Fit:
    """How micro-batches are cut: no piece of more than `wanted` samples, or the largest that fit.

    `auto` tries the planned micro-batch with the longest sample, as it is read; `steps` is looked through only so far.
    """
    requests = [request for step in islice(steps, _STEPS) for request in step.requests.values()]
    if wanted != "auto":
        return Fit(wanted, -(-max(len(request.ids) for request in requests) // wanted))
    heaviest = max(requests, key=lambda request: (max(samples.length(i) for i in request.ids), len(request.ids)))
    with Loader(samples, seed=seed) as loader:
        batch = next(iter(loader.iterate([heaviest]))).batch
    if batch is None:  # not one of its samples can be read: a step that does not fit will say so
        return Fit(len(heaviest.ids), 1)
    limit = None if engine.device.type == "cuda" else int(_SHARE * available_bytes())
    count = len(batch.keys)
    rows = largest(count, lambda n: fits(engine, task, batch.rows(0, n), limit_bytes=limit))
    return Fit(rows, -(-count // rows))


def largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest n up to `most` that fits, if what is smaller than one that fits does too; 1 where none does.

    >>> largest(10, lambda n: n <= 6)
    6
    """
    if fits(most):
        return most
    low, high = 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def fits(engine: Engine, task: Task, piece: Any, *, limit_bytes: int | None = None) -> bool:
    """Whether the passes over `piece` fit. The engine, its model and the generators are left as they were.

    limit_bytes: for what autograd keeps of one forward pass; None lets the allocator say
    """
    model, before, known = engine.model, engine.buffers(), set(engine.optimizer.state)
    totals = task.weights(model, piece)
    passes = Passes(engine=engine, task=task, totals=totals, before=before, seed=0, step=0, split=1)

    def gradients() -> dict[str, Tensor]:
        with nullcontext() if limit_bytes is None else _Limited(model, limit=limit_bytes):
            return passes.over({0: piece}).gradients

    try:
        with own_generators():
            engine.put_gradients_(gradients())
            engine.prepare_()
            kept = engine.take_gradients_()
            gradients()
            del kept
    except Exception as exc:
        if not is_out_of_memory(exc):
            raise
        return False
    finally:
        engine.zero_grad()
        for param in engine.optimizer.state.keys() - known:
            del engine.optimizer.state[param]
        engine.put_buffers_back_(before)
        free()
    return True


@dataclass
class _Limited(SavedActivations):
    """Stands in for an allocator that has `limit` bytes for activations."""

    limit: int = 0

    def _pack(self, tensor: Tensor) -> Tensor:
        packed = super()._pack(tensor)
        if self.bytes > self.limit:
            raise torch.OutOfMemoryError(f"activations take more than the {self.limit} bytes there are for them")
        return packed


def available_bytes() -> int:
    """Memory that this machine, or the container it is, can still give; without Linux all that is installed."""
    if not _MEMINFO.exists():
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    free_bytes = int(fields["MemAvailable"].split()[0]) * 1024
    for limit, used in _CGROUPS:
        if limit.exists() and (most := limit.read_text().strip()) != "max":
            free_bytes = min(free_bytes, int(most) - int(used.read_text()))
    return free_bytes
