"""The loop: puts the rooms together in time. It orchestrates and does not compute.

A run is a function of (recipe, base, step, tensors at step). So there is one way in (`Session.open`): state comes from
a checkpoint or is the zero state, the model is the base with the state's tensors laid over it, the engine is built for
the state's phase, and reading goes on at the state's cursor. Entering a new phase takes the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from thawline.errors import DataError, Stopped, ThawlineError
from thawline.train.engine import Rate
from thawline.train.monitor import Monitor, SilentMonitor
from thawline.train.recipe import Recipe
from thawline.train.rundir import RunDirectory, append_row
from thawline.train.session import GlobalBatch, Session
from thawline.train.step import OutOfMemory, StepResult, train_step
from thawline.train.stopping import StopSignal
from thawline.train.task import Task


@dataclass(frozen=True, slots=True)
class Run:
    """A run and where it left things. `metrics` is the last evaluation; empty without validation samples."""

    dir: Path
    metrics: Mapping[str, float]
    step: int


def train(
    recipe: Recipe,
    task: Task,
    directory: Path,
    *,
    monitor: Monitor | None = None,
    allow: Sequence[str] = (),
    from_step: int | None = None,
    until: int | None = None,
) -> Run:
    """Begin the run in `directory`, or go on with it from its newest whole checkpoint (or that of `from_step`).

    until: leave off after this step without finishing, as `resume --verify` does in a copy of the run

    Raises Stopped (exit code 75) after a signal or the time limit, with a whole checkpoint written; LawBroken (5) where
    an audit fails; DataError (3), RecipeError (2), CheckpointError (4).
    """
    monitor = monitor or SilentMonitor()
    files = RunDirectory(directory.absolute())
    with files.locked(), StopSignal(recipe.run.time_limit) as stop:
        session = Session.open(recipe, task, files, monitor, allow, from_step)
        monitor.begin(step=session.state.step, total_steps=session.total_steps)
        try:
            _steps(session, stop, until)
            if until is None:
                session.finish()
        except ThawlineError as exc:
            files.event("stopped", step=session.state.step, reason=exc.what, exit_code=exc.exit_code)
            raise
        finally:
            session.close()
            monitor.end()
    last = dict(session.state.history[-1]) if session.state.history else {}
    return Run(files.path, last, session.state.step)


def _steps(session: Session, stop: StopSignal, until: int | None) -> None:
    while not session.done and session.state.step != until:
        for batch in session.rest_of_epoch():
            before = session.progress
            _step(session, batch)
            after = session.progress
            evaluated = session.due(session.recipe.run.evaluate, before, after) or session.done
            if evaluated:
                session.evaluate()
            thawed = not session.done and session.enter_due_phase()
            reason = stop.reason
            if evaluated or thawed or reason or session.checkpoint_due(before, after):
                session.save(wait=bool(reason) or session.done)
            if reason and not session.done:
                raise Stopped(
                    f"stopped by {reason} after step {session.state.step}, with a whole checkpoint",
                    where=str(session.files.path),
                    fix=f"thawline resume {session.files.path}",
                )
            if thawed or session.done or session.state.step == until:
                break  # the next phase builds its engine anew; reading goes on at the cursor


def _step(session: Session, batch: GlobalBatch) -> None:
    state = session.state
    rate = session.rate()
    for sample in batch.bad:
        session.files.event("bad sample", step=state.step, id=sample.id, key=sample.key, reason=sample.reason)
        session.monitor.note(f"left out sample {sample.key}: {sample.reason}")
    micro_batches = batch.micro_batches
    result = None
    if micro_batches:
        result = _take(session, micro_batches, rate)
        session.heed(result.findings)
    applied = result is not None and result.applied
    session.state = replace(
        session.state,
        step=state.step + 1,
        cursor=batch.next,
        index=0 if batch.next.epoch > state.cursor.epoch else state.index + batch.batches,
        in_a_row=0 if applied else state.in_a_row + 1,
        seen=state.seen + batch.samples,
        bad=state.bad + len(batch.bad),
    )
    row = _row(session, result, rate)
    append_row(session.files.metrics, row)
    session.monitor.step(row, session.clock.lap(batch.samples, session.state.step))
    if not applied:
        session.files.event("skipped step", step=session.state.step, keys=list(batch.keys), **_numbers(result))
        session.monitor.note(f"step {session.state.step} skipped: loss or gradient not finite")
        session.refuse_if_diverged()
    _refuse_too_many_bad(session)


def _take(session: Session, micro_batches: Sequence[Any], rate: Rate) -> StepResult:
    """The step; where it does not fit into memory, once more with every micro-batch halved, which is then kept."""
    largest = max(len(batch.keys) for batch in micro_batches)
    while True:
        split = session.state.split
        try:
            return train_step(
                session.engine,
                session.task,
                micro_batches,
                seed=session.recipe.run.seed,
                step=session.state.step,
                rate=rate,
                split=split,
            )
        except OutOfMemory as exc:
            if split >= largest or not hasattr(micro_batches[0], "rows"):
                raise ThawlineError(
                    f"step {session.state.step} does not fit into memory, even one sample at a time: {exc}",
                    where=str(session.files.path),
                    fix="a smaller data.batch, shorter samples, or less that trains",
                ) from exc
            session.state = replace(session.state, split=split * 2)
        # Outside the handler, where the traceback no longer holds the tensors of the step.
        session.engine.free_memory()
        session.files.event("out of memory", step=session.state.step, split=session.state.split)
        session.monitor.note(f"out of memory: each micro-batch is cut into {session.state.split} from here on")


def _row(session: Session, result: StepResult | None, rate: Rate) -> dict[str, Any]:
    row: dict[str, Any] = {"step": session.state.step, "epoch": round(session.progress.epoch, 6)}
    row |= {"lr": session.recipe.optim.lr * rate.factor, **_numbers(result)}
    return row


def _numbers(result: StepResult | None) -> dict[str, Any]:
    """The figures of a step as JSON holds them: a number that is not finite becomes its name."""
    if result is None:
        return {"loss": "empty", "grad_norm": 0.0}
    figures = {"loss": result.loss, "grad_norm": result.grad_norm, **result.metrics}
    return {k: v if math.isfinite(v) else str(v) for k, v in figures.items()}


def _refuse_too_many_bad(session: Session) -> None:
    state, limit = session.state, session.recipe.data.max_bad
    # One bad sample costs one sample, however small the set: the share is judged from the second one on.
    if state.bad > 1 and state.bad > limit * max(state.seen, len(session.train_samples)):
        session.save(wait=True)
        raise DataError(
            f"{state.bad} of {state.seen} samples could not be read, more than the stated share of {limit:.1%}",
            where=str(session.files.events),
            fix="the file lists them; mend or remove them, or raise data.max_bad",
        )
