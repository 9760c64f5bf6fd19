"""One step: gradients of a global batch, cut into micro-batches, and one update.

The loss is a sum and a weight. The weights of the whole global batch are added up before the first backward pass, so
each micro-batch contributes its part of the one mean, however the global batch was cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from thawline.core.rng import derive
from thawline.freeze.doctor import Finding
from thawline.train.engine import Engine, Rate
from thawline.train.seeding import seed_all
from thawline.train.task import Task


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did.

    loss:      the objective, mean over the global batch
    metrics:   what the task logs besides, over the global batch
    grad_norm: L2 norm of the gradient before clipping
    applied:   False where the loss or the gradient was not finite and the update was skipped
    findings:  what the doctor saw in the first step of a phase
    """

    loss: float
    metrics: Mapping[str, float]
    grad_norm: float
    applied: bool
    findings: tuple[Finding, ...] = ()


class OutOfMemory(Exception):
    """The gradients of a step did not fit, and nothing has been updated: the step may be taken in smaller pieces."""


def train_step(
    engine: Engine, task: Task, micro_batches: Sequence[Any], *, seed: int, step: int, rate: Rate, split: int = 1
) -> StepResult:
    """Take the step number `step` (updates done before it) over one global batch.

    split: pieces that each micro-batch is cut into; the global batch and its normalisation stay the same

    Every piece runs under generators seeded from (seed, step, its numbers): dropout does not depend on what ran before.
    A non-finite loss or gradient drops the gradients and leaves weights, statistics and optimizer as they were; so does
    OutOfMemory, which is raised only before the update began.
    """
    totals: dict[str, float] = {}
    for batch in micro_batches:
        for name, weight in task.weights(engine.model, batch).items():
            totals[name] = totals.get(name, 0.0) + weight
    statistics = engine.keep_buffers()
    engine.zero_grad()
    try:
        loss, metrics, findings = _gradients(engine, task, micro_batches, totals, seed=seed, step=step, split=split)
        grad_norm = engine.clip_()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as exc:
        if not _is_out_of_memory(exc):
            raise
        engine.zero_grad()
        engine.put_buffers_back_(statistics)
        raise OutOfMemory(str(exc)) from exc
    applied = math.isfinite(loss) and math.isfinite(grad_norm)
    if applied:
        engine.update_(rate)
    else:
        engine.put_buffers_back_(statistics)
    engine.zero_grad()
    return StepResult(loss=loss, metrics=metrics, grad_norm=grad_norm, applied=applied, findings=findings)


def _gradients(
    engine: Engine,
    task: Task,
    micro_batches: Sequence[Any],
    totals: Mapping[str, float],
    *,
    seed: int,
    step: int,
    split: int,
) -> tuple[float, dict[str, float], tuple[Finding, ...]]:
    """Accumulate the gradient of the whole global batch: its loss, its metrics, and what the doctor saw."""
    loss = 0.0
    metrics: dict[str, tuple[float, float]] = {}
    with engine.first_look() as look:
        for number, batch in enumerate(micro_batches):
            for piece, part in enumerate(pieces(batch, split)):
                seed_all(derive(seed, "step", step, number, *((piece,) if split > 1 else ())))
                with engine.autocast():
                    sums = task.loss(engine.model, part.to(engine.device))
                    objective = torch.stack([t.sum / (totals[t.per] or 1.0) for t in sums.terms.values()]).sum()
                objective.backward()  # type: ignore[no-untyped-call]
                loss += objective.item()
                for name, (value, count) in sums.metrics.items():
                    before = metrics.get(name, (0.0, 0.0))
                    metrics[name] = (before[0] + value.item(), before[1] + count.item())
        findings = look.findings()
    return loss, {name: value / count if count else 0.0 for name, (value, count) in metrics.items()}, findings


def pieces(batch: Any, split: int) -> Sequence[Any]:
    """`batch` cut into `split` pieces of rows as equal as can be (fewer where it has fewer rows).

    Raises OutOfMemory where batches of this task cannot be cut.
    """
    if split == 1:
        return (batch,)
    rows = getattr(batch, "rows", None)
    if rows is None:
        raise OutOfMemory("batches of this task cannot be cut")
    count = len(batch.keys)
    edges = sorted({count * i // split for i in range(split + 1)})
    return tuple(rows(start, stop) for start, stop in pairwise(edges))


def _is_out_of_memory(exc: BaseException) -> bool:
    # The CPU allocator has no error class of its own; this is its sentence.
    return isinstance(exc, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(exc)
