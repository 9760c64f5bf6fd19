"""One step: gradients of a global batch, cut into micro-batches, and one update.

The loss is a sum and a weight. The weights of the whole global batch are added up before the first backward pass, so
each micro-batch contributes its part of the one mean, however the global batch was cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


def train_step(
    engine: Engine, task: Task, micro_batches: Sequence[Any], *, seed: int, step: int, rate: Rate
) -> StepResult:
    """Take the step number `step` (updates done before it) over one global batch.

    Every micro-batch runs under generators seeded from (seed, step, its number): dropout does not depend on what ran
    before. A non-finite loss or gradient drops the gradients and leaves weights,
    statistics and optimizer as they were.
    """
    totals: dict[str, float] = {}
    for batch in micro_batches:
        for name, weight in task.weights(engine.model, batch).items():
            totals[name] = totals.get(name, 0.0) + weight
    engine.zero_grad()
    loss = 0.0
    metrics: dict[str, tuple[float, float]] = {}
    statistics = engine.keep_buffers()
    with engine.first_look() as look:
        for number, batch in enumerate(micro_batches):
            seed_all(derive(seed, "step", step, number))
            with engine.autocast():
                sums = task.loss(engine.model, batch.to(engine.device))
                objective = torch.stack([t.sum / (totals[t.per] or 1.0) for t in sums.terms.values()]).sum()
            objective.backward()  # type: ignore[no-untyped-call]
            loss += objective.item()
            for name, (part, count) in sums.metrics.items():
                before = metrics.get(name, (0.0, 0.0))
                metrics[name] = (before[0] + part.item(), before[1] + count.item())
    findings = look.findings()
    grad_norm = engine.clip_()
    applied = math.isfinite(loss) and math.isfinite(grad_norm)
    if applied:
        engine.update_(rate)
    else:
        engine.put_buffers_back_(statistics)
    engine.zero_grad()
    ratios = {name: part / count if count else 0.0 for name, (part, count) in metrics.items()}
    return StepResult(loss=loss, metrics=ratios, grad_norm=grad_norm, applied=applied, findings=findings)
