"""The loop: puts the rooms together in time. It orchestrates and does not compute.

A run is a function of (recipe, base, step, tensors at step). So there is one way in (`open_session`): state comes from
a checkpoint or is the zero state, the model is the base with the state's tensors laid over it, the engine is built for
the state's phase, and reading goes on at the state's cursor. Entering a new phase takes the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from thawline.ckpt.store import StorageError
from thawline.errors import DataError, Stopped
from thawline.train.engine import Rate
from thawline.train.memory import until_it_fits
from thawline.train.monitor import Monitor, SilentMonitor
from thawline.train.opening import open_session
from thawline.train.reading import GlobalBatch
from thawline.train.recipe import Recipe
from thawline.train.rewind import pass_over, too_many
from thawline.train.rundir import RunDirectory
from thawline.train.saving import end_of
from thawline.train.session import Session
from thawline.train.step import StepResult, train_step
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

    Raises Stopped (exit code 75) after a signal or the time limit, with a whole checkpoint written, and where storage
    refuses but there is a checkpoint to go on from; LawBroken (5) where an audit fails; DataError (3), RecipeError (2),
    CheckpointError (4). Whatever else is raised in a step leaves a checkpoint of the last whole step.
    """
    monitor = monitor or SilentMonitor()
    files = RunDirectory(directory.absolute())
    with files.locked(), StopSignal(recipe.run.time_limit) as stop:
        run = _stretch(partial(_open, recipe, task, files, monitor, allow, from_step), stop, until)
        while run is None:
            run = _stretch(partial(_open, recipe, task, files, monitor, allow), stop, until)
    return run


def _open(recipe: Recipe, task: Task, files: RunDirectory, monitor: Monitor, *options: Any) -> Session:
    try:
        return open_session(recipe, task, files, monitor, *options)
    except StorageError as exc:
        end = end_of(exc, files, monitor.note)
        if end is exc:
            raise
        raise end from exc


def _stretch(begin: Callable[[], Session], stop: StopSignal, until: int | None) -> Run | None:
    """The run from where it is to its end; None where it has gone back, and is to be taken up anew from there."""
    session = begin()
    session.monitor.begin(step=session.state.step, total_steps=session.total_steps)
    try:
        if not _steps(session, stop, until):
            session.keeper.drain()  # no save may be under way while checkpoints are given up
            pass_over(session.files, session.state, limit=session.recipe.run.nonfinite.limit)
            return None
        if until is None:
            session.finish()
        elif session.keeper.saved != until:
            session.save(wait=True)
    except BaseException as exc:
        end = session.end_with(exc)
        if end is exc:
            raise
        raise end from exc
    finally:
        session.close()
        session.monitor.end()
    last = dict(session.state.history[-1]) if session.state.history else {}
    return Run(session.files.path, last, session.state.step)


def _steps(session: Session, stop: StopSignal, until: int | None) -> bool:
    """Steps to the end of the run or to `until`; False where too many were not finite and the run is to go back."""
    _settle(session, stop)
    while not session.done and session.state.step != until:
        for batch in session.rest_of_epoch():
            _step(session, batch)
            if session.diverged and session.goes_back:
                return False
            thawed = _settle(session, stop)
            if thawed or session.done or session.state.step == until:
                break  # the next phase builds its engine anew; reading goes on at the cursor
    return True


def _settle(session: Session, stop: StopSignal) -> bool:
    """See to what is due after the last step: evaluation, thaw, checkpoint, a stop. True where a phase was entered.

    A checkpoint that had to be written before this was done is of a state that says so; then it is done on resume.
    """
    if session.state.unsettled is None:
        return False
    session.keeper.look_after()
    after = session.progress
    before = replace(after, step=after.step - 1, epoch=session.state.unsettled)
    evaluated = session.due(session.recipe.run.evaluate, before, after) or session.done
    if evaluated and not session.evaluated:
        session.evaluate()
    thawed = not session.done and session.enter_due_phase()
    regular = evaluated or thawed or session.due(session.recipe.run.checkpoint.every, before, after)
    anchor = after.step if regular and not session.state.in_a_row else session.state.anchor
    session.state = replace(session.state, unsettled=None, anchor=anchor)
    reason = stop.reason
    if regular or reason:
        session.save(wait=bool(reason) or session.done)
    if reason and not session.done:
        raise Stopped(
            f"stopped by {reason} after step {session.state.step}, with a whole checkpoint",
            where=str(session.files.path),
            fix=f"thawline resume {session.files.path}",
        )
    return thawed


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
    # A finite loss with a gradient that is not: with a scale above 1 it is the scale that is too large.
    overflowed = (
        session.scales and state.scale.factor > 1 and result is not None and not applied and math.isfinite(result.loss)
    )
    if applied and session.ema is not None:
        session.ema.update_(session.engine.trainables, state.step)
    session.state = replace(
        session.state,
        step=state.step + 1,
        cursor=batch.next,
        index=0 if batch.next.epoch > state.cursor.epoch else state.index + batch.batches,
        in_a_row=0 if applied else state.in_a_row + (not overflowed),
        scale=state.scale.after(overflowed=overflowed) if session.scales and (applied or overflowed) else state.scale,
        unsettled=session.progress.epoch,
        seen=state.seen + batch.samples,
        bad=state.bad + len(batch.bad),
    )
    session.record(_row(session, result, rate), batch.samples)
    if not applied:
        session.files.event("skipped step", step=session.state.step, keys=list(batch.keys), **_numbers(result))
        session.monitor.note(f"step {session.state.step} skipped: loss or gradient not finite")
    if session.diverged and not session.goes_back:
        raise too_many(session.files, session.recipe.run.nonfinite.limit)
    _refuse_too_many_bad(session)


def _take(session: Session, micro_batches: Mapping[int, Any], rate: Rate) -> StepResult:
    """The step; where it does not fit into memory, once more with every micro-batch halved, which is then kept."""
    step = session.state.step
    return until_it_fits(
        lambda split: train_step(
            session.engine,
            session.task,
            micro_batches,
            seed=session.recipe.run.seed,
            step=step,
            rate=rate,
            split=split,
            elastic=session.recipe.run.micro_batches,
            scale=session.state.scale.factor if session.scales else 1.0,
        ),
        session.state.split,
        largest=max(len(batch.keys) for batch in micro_batches.values()),
        what=f"step {step}",
        where=str(session.files.path),
        tell=session.cut,
    )


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
        raise DataError(
            f"{state.bad} of {state.seen} samples could not be read, more than the stated share of {limit:.1%}",
            where=str(session.files.events),
            fix="the file lists them; mend or remove them, or raise data.max_bad",
        )
