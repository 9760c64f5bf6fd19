"""One step: gradients of a global batch, cut into micro-batches, and one update.

The loss is a sum and a weight. The weights of the whole global batch are added up before the first backward pass, so
each micro-batch contributes its part of the one mean, however the global batch was cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thawline.core.rng import derive
from thawline.freeze.doctor import Finding
from thawline.train.engine import Engine, Rate
from thawline.train.memory import OutOfMemory, is_out_of_memory, pieces
from thawline.train.microbatch import combine, roots, tree_sum
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


@dataclass(slots=True)
class Sums:
    """What some micro-batches of a step add up to.

    metrics: name -> (sum, count)
    buffers: those that forward passes move; `leaves` of them are added up, each begun at the buffers before the step
    """

    gradients: dict[str, Tensor]
    loss: float = 0.0
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    leaves: int = 1

    def mean_buffers(self) -> dict[str, Tensor]:
        """What the step leaves in the buffers; those of whole numbers (how often, not how much) as the first leaf."""
        return {name: b / self.leaves if b.is_floating_point() else b for name, b in self.buffers.items()}


def train_step(
    engine: Engine,
    task: Task,
    micro_batches: Mapping[int, Any],
    *,
    seed: int,
    step: int,
    rate: Rate,
    split: int = 1,
    elastic: int | None = None,
    scale: float = 1.0,
) -> StepResult:
    """Take the step number `step` (updates done before it) over one global batch.

    micro_batches: this rank's, by number
    split:   pieces that each micro-batch is cut into; the global batch and its normalisation stay the same
    elastic: how many micro-batches a global batch has, on a run whose bits must not depend on the world size. Sums are
             then taken in the tree of `microbatch`, and buffers move once a step, by the mean over micro-batches; else
             a rank adds up what it has as it comes, and buffers move with every pass
    scale:   what the loss is multiplied with for the backward pass; the gradient is divided by it

    Every piece runs under generators seeded from (seed, step, its numbers): dropout does not depend on what ran before.
    A non-finite loss or gradient drops the gradients and leaves weights, statistics and optimizer as they were; so does
    OutOfMemory, which is raised only before the update began.
    """
    before: dict[str, Tensor] = {}
    try:
        before = engine.buffers()
        totals = _totals(engine, task, micro_batches)
        passes = Passes(
            engine=engine, task=task, totals=totals, before=before, seed=seed, step=step, split=split, scale=scale
        )
        with engine.first_look() as look:
            sums = passes.sums(micro_batches, leaves=elastic or engine.world)
            if scale != 1.0:
                for gradient in sums.gradients.values():
                    gradient.div_(scale)
            engine.put_gradients_(sums.gradients)
            engine.put_buffers_back_(sums.mean_buffers())
            findings = look.findings()
            grad_norm = engine.clip_()
            kept = engine.prepare_()
    except BaseException as exc:
        # Nothing is updated yet: whatever stops the step here, the run is as it was before it.
        engine.zero_grad()
        engine.put_buffers_back_(before)
        if is_out_of_memory(exc):
            raise OutOfMemory(str(exc)) from exc
        raise
    applied = math.isfinite(sums.loss) and math.isfinite(grad_norm)
    if applied:
        engine.update_(rate, kept)
    else:
        engine.put_buffers_back_(before)
    engine.zero_grad()
    metrics = {name: value / count if count else 0.0 for name, (value, count) in sums.metrics.items()}
    return StepResult(loss=sums.loss, metrics=metrics, grad_norm=grad_norm, applied=applied, findings=findings)


def _totals(engine: Engine, task: Task, micro_batches: Mapping[int, Any]) -> dict[str, float]:
    """The weights of the whole global batch, added up in the order of its micro-batches."""
    mine = {number: task.weights(engine.model, batch) for number, batch in micro_batches.items()}
    every = {number: weights for part in engine.gather(mine) for number, weights in part.items()}
    totals: dict[str, float] = {}
    for number in sorted(every):
        for name, weight in every[number].items():
            totals[name] = totals.get(name, 0.0) + weight
    return totals


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """Forward and backward passes of one step.

    totals: the weights of the global batch; before: the buffers at which each leaf of the tree begins
    """

    engine: Engine
    task: Task
    totals: Mapping[str, float]
    before: Mapping[str, Tensor]
    seed: int
    step: int
    split: int
    scale: float = 1.0

    def sums(self, micro_batches: Mapping[int, Any], *, leaves: int) -> Sums:
        """The sums over the whole global batch, of which these are the rank's micro-batches, in a tree of `leaves`."""

        def leaf(number: int) -> Sums | None:
            chosen = {n: batch for n, batch in micro_batches.items() if n % leaves == number}
            return self.over(chosen) if chosen else None

        engine = self.engine
        mine = {root: tree_sum(leaves, root, leaf, _add_) for root in roots(leaves, engine.rank, engine.world)}
        made = {root: sums for root, sums in mine.items() if sums is not None}
        every = {root: sums for part in engine.gather(made) for root, sums in part.items()}
        total = combine(leaves, every, _add_)
        assert total is not None  # a step has at least one micro-batch
        return total

    def over(self, micro_batches: Mapping[int, Any]) -> Sums:
        """One leaf: piece after piece, gradients added up by autograd. The buffers are as before afterwards."""
        engine = self.engine
        loss = 0.0
        metrics: dict[str, tuple[float, float]] = {}
        for number, batch in micro_batches.items():
            for piece, part in enumerate(pieces(batch, self.split)):
                seed_all(derive(self.seed, "step", self.step, number, *((piece,) if self.split > 1 else ())))
                with engine.autocast():
                    sums = self.task.loss(engine.model, part.to(engine.device))
                    objective = torch.stack([t.sum / (self.totals[t.per] or 1.0) for t in sums.terms.values()]).sum()
                (objective * self.scale).backward()  # type: ignore[no-untyped-call]
                loss += objective.item()
                for name, (value, count) in sums.metrics.items():
                    before = metrics.get(name, (0.0, 0.0))
                    metrics[name] = (before[0] + value.item(), before[1] + count.item())
        buffers = engine.buffers()
        engine.put_buffers_back_(self.before)
        return Sums(engine.take_gradients_(), loss, metrics, buffers)


def _add_(left: Sums, right: Sums) -> Sums:
    """`right` added to `left`, in place."""
    for name, gradient in right.gradients.items():
        if name in left.gradients:
            left.gradients[name].add_(gradient)
        else:
            left.gradients[name] = gradient
    for name, buffer in right.buffers.items():
        if buffer.is_floating_point():
            left.buffers[name].add_(buffer)
    for name, (value, count) in right.metrics.items():
        before = left.metrics.get(name, (0.0, 0.0))
        left.metrics[name] = (before[0] + value, before[1] + count)
    left.loss += right.loss
    left.leaves += right.leaves
    return left
