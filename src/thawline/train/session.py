"""A run while it is in memory: the model, the engine of the phase in force, the readers, and where the run is.

`Session.open` is the one way in, for a new run, a resumed one and a forked one alike.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thawline.ckpt.load import Checkpoint, checkpoints, read_checkpoint, read_newest
from thawline.ckpt.retention import Keep, prune
from thawline.ckpt.save import Saver
from thawline.ckpt.store import atomic_dir, retire
from thawline.core.rng import derive
from thawline.core.span import Span
from thawline.data.loader import BadSample, BatchRequest, LoadedBatch, Loader
from thawline.data.sampler import BatchPlan, Cursor
from thawline.errors import CheckpointError, DataError, LawBroken, RecipeError, ThawlineError
from thawline.freeze import doctor
from thawline.freeze.doctor import Finding
from thawline.freeze.schedule import Progress, phase_at, warmup_factor
from thawline.train import rundir, schedule
from thawline.train.clock import Clock
from thawline.train.compatibility import environment, judge
from thawline.train.engine import Engine, Rate, pick_device
from thawline.train.evaluation import best_step, better_sign, evaluate
from thawline.train.law import Law, write_audit
from thawline.train.monitor import Monitor
from thawline.train.recipe import Recipe
from thawline.train.rundir import RunDirectory
from thawline.train.seeding import seed_all
from thawline.train.state import RunState
from thawline.train.task import Samples, Task

_NOT_FINITE = "not-finite"


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """What one step sees.

    micro_batches: collated, in their numbered order; a micro-batch whose samples were all unreadable is left out
    next:          cursor of the first batch after these
    batches:       planned batches it is made of (`run.accumulate`, fewer at the end of an epoch)
    samples, keys: how many samples were asked for, and the readable ones by key
    """

    micro_batches: tuple[Any, ...]
    next: Cursor
    batches: int
    samples: int
    keys: tuple[str, ...]
    bad: tuple[BadSample, ...]


@dataclass(slots=True)
class Session:
    """The moving parts of one run. `state` is the only thing that a step changes besides tensors."""

    recipe: Recipe
    task: Task
    files: RunDirectory
    monitor: Monitor
    model: nn.Module
    law: Law
    engine: Engine
    state: RunState
    train_samples: Samples
    valid_samples: Samples | None
    plan: BatchPlan
    loader: Loader[Any, Any]
    clock: Clock
    recorded: Mapping[str, Any]
    saver: Saver = field(init=False)
    _last_save_s: float = field(default_factory=time.monotonic)
    _began_at: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._began_at = self.state.step
        self.heed(doctor.before(self.model, self.engine.resolution, self.engine.optimizer))
        self.saver = Saver(self.files.checkpoints, base=self.law.base, after=self._written, report=self.monitor.note)

    @classmethod
    def open(
        cls,
        recipe: Recipe,
        task: Task,
        files: RunDirectory,
        monitor: Monitor,
        allow: Sequence[str] = (),
        from_step: int | None = None,
    ) -> Session:
        """Begin a run, or take it up at its newest whole checkpoint (or at that of `from_step`)."""
        device = pick_device(recipe.run.device)
        recipe, model = _base_model(recipe, task, files)
        checkpoint = _checkpoint(files, monitor, from_step)
        state = RunState() if checkpoint is None else RunState.from_json(checkpoint.state["run"])
        if checkpoint is not None:
            torch.set_num_threads(checkpoint.state["environment"]["threads"])
        law = Law.open(recipe.plan, model, files, seed=recipe.run.seed, source=recipe.path("model"))
        resolution = law.enter(model, state.phase)
        parked: Mapping[str, Any] = {}
        if checkpoint is not None:
            law.restore_(model, checkpoint)
            parked = checkpoint.optimizer
        train_samples = task.samples(recipe, model, "train")
        valid_samples = task.samples(recipe, model, "valid") if recipe.data.valid is not None else None
        recorded = {
            "recipe": recipe.resolved(),
            "data": {
                "train": train_samples.fingerprint,
                "valid": valid_samples.fingerprint if valid_samples is not None else None,
            },
            "environment": environment(device),
        }
        if checkpoint is None:
            files.create(recipe)
            files.event("started", environment=recorded["environment"], data=recorded["data"])
        else:
            verdict = judge(checkpoint.state, recorded, allow=allow, where=str(files.path))
            files.event("resumed", step=state.step, grade=verdict.grade, reasons=list(verdict.reasons))
            because = f" ({'; '.join(verdict.reasons)})" if verdict.reasons else ""
            monitor.note(f"going on after step {state.step}: {verdict.grade}{because}")
        for note in getattr(task, "notes", ()):
            files.event("note", text=note)
            monitor.note(note)
        _report_left_out(train_samples, recipe, files, monitor)
        if from_step is not None:
            _give_up_later(files, from_step)
        files.rewind_metrics(state.step)
        engine = Engine(model, resolution, recipe.optim, device, recipe.run.precision)
        engine.restore_optimizer_(parked)
        return cls(
            recipe=recipe,
            task=task,
            files=files,
            monitor=monitor,
            model=model,
            law=law,
            engine=engine,
            state=state,
            train_samples=train_samples,
            valid_samples=valid_samples,
            plan=BatchPlan(
                len(train_samples),
                seed=recipe.run.seed,
                batching=recipe.data.batch,
                length=train_samples.length,
            ),
            loader=Loader(train_samples, seed=recipe.run.seed, workers=recipe.run.workers),
            clock=Clock(files.speed),
            recorded=recorded,
        )

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.plan.batches_in_epoch(0) // self.recipe.run.accumulate)

    @property
    def total_steps(self) -> int:
        """The horizon of the schedules: the epochs at the length of the first, or `run.steps` if that is shorter."""
        total = self.steps_per_epoch * self.recipe.run.epochs
        return min(total, self.recipe.run.steps or total)

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        cursor = self.state.cursor
        share = self.state.index / self.plan.batches_in_epoch(cursor.epoch) if self.state.index else 0.0
        return Progress(
            step=self.state.step,
            epoch=cursor.epoch + share,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
        )

    @property
    def done(self) -> bool:
        run = self.recipe.run
        return self.state.cursor.epoch >= run.epochs or (run.steps is not None and self.state.step >= run.steps)

    def rate(self) -> Rate:
        """The rate of the next update."""
        factor = schedule.lr_factor(
            self.recipe.optim.schedule,
            self.state.step,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
        )
        progress, history = self.progress, self.state.history
        return Rate(factor, lambda since: warmup_factor(self.law.plan, since, progress, history))

    def due(self, every: Span, before: Progress, after: Progress) -> bool:
        """Whether a multiple of `every` was reached by the step from `before` to `after`."""
        if every.unit == "minutes":
            return time.monotonic() - self._last_save_s >= every.amount * 60
        if every.unit == "epochs":
            return _count(after.epoch, every.amount) > _count(before.epoch, every.amount)
        steps = max(1, every.in_steps(steps_per_epoch=self.steps_per_epoch, total_steps=self.total_steps))
        return after.step // steps > before.step // steps

    def checkpoint_due(self, before: Progress, after: Progress) -> bool:
        return self.done or self.due(self.recipe.run.checkpoint.every, before, after)

    def rest_of_epoch(self) -> Iterator[GlobalBatch]:
        """Global batches from the cursor to the end of its epoch, read ahead by the loader."""
        upcoming: deque[Cursor] = deque()
        epoch = self.state.cursor.epoch

        def requests() -> Iterator[BatchRequest]:
            waiting: BatchRequest | None = None
            for cursor, ids in self.plan.batches(self.state.cursor):
                if waiting is not None:
                    upcoming.append(cursor)
                    yield waiting
                waiting = BatchRequest(epoch=epoch, cursor=cursor, ids=ids)
            if waiting is not None:
                upcoming.append(Cursor(epoch + 1, 0, 0))
                yield waiting

        loaded = _timed(self.loader.iterate(requests()), self.clock.waited)
        group: list[LoadedBatch[Any]] = []
        for batch in loaded:
            group.append(batch)
            following = upcoming.popleft()
            if len(group) == self.recipe.run.accumulate or following.epoch > epoch:
                yield _global_batch(group, following)
                group = []

    def evaluate(self) -> None:
        """Score the held-back samples; the figures join the history that phases and the best checkpoint depend on."""
        if self.valid_samples is None:
            return
        metrics, bad = evaluate(self.task, self.model, self.valid_samples, self.recipe, self.engine.device)
        for sample in bad:
            self.files.event("bad sample", step=self.state.step, split="valid", key=sample.key, reason=sample.reason)
            self.monitor.note(f"left out held-back sample {sample.key}: {sample.reason}")
        row = {"step": self.state.step, "epoch": round(self.progress.epoch, 6)}
        row |= {f"valid/{name}": value for name, value in metrics.items()}
        best = self.recipe.run.checkpoint.best
        if best is not None and best not in row:
            known = ", ".join(k for k in row if k.startswith("valid/"))
            raise RecipeError(
                f"the evaluation gives no {best!r}",
                where=self.recipe.run.checkpoint.where("best"),
                fix=f"it gives {known}",
            )
        self.state = replace(self.state, history=(*self.state.history, row))
        rundir.append_row(self.files.metrics, row)
        self.monitor.evaluation(row)

    def enter_due_phase(self) -> bool:
        """Enter the phase that progress and metrics call for: capture, build the engine anew, restore."""
        phase = phase_at(self.law.plan, self.progress, self.state.history)
        if phase == self.state.phase:
            return False
        moments = self.engine.optimizer_state()
        resolution = self.law.enter(self.model, phase)
        self.engine = Engine(self.model, resolution, self.recipe.optim, self.engine.device, self.recipe.run.precision)
        self.engine.restore_optimizer_(moments)
        self.heed(doctor.before(self.model, resolution, self.engine.optimizer))
        self.files.event(
            "phase", step=self.state.step, phase=phase, trains=len(resolution.trainable_names), before=self.state.phase
        )
        self.monitor.note(f"phase {phase} from step {self.state.step}: {len(resolution.trainable_names)} tensors train")
        self.state = replace(self.state, phase=phase)
        return True

    def save(self, *, wait: bool = False) -> None:
        """Write a checkpoint behind the training, after the frozen tensors have been shown to be untouched.

        A storage that refuses is reported and leaves the last good checkpoint and the run going; with `wait` (at the
        end, and when the run stops) it is raised.
        """
        rundir.flush(self.files.metrics)  # a checkpoint must not outlive the rows that lead to it
        handle = self.saver.save(
            step=self.state.step,
            delta=self.law.delta(self.model),
            optimizer=self.engine.optimizer_state(),
            state={"run": self.state.to_json(), **self.recorded},
        )
        self._last_save_s = time.monotonic()
        if wait:
            handle.wait()

    def _written(self, newest: Path) -> None:
        """Retention, in the writing thread, once a checkpoint is on the device."""
        settings = self.recipe.run.checkpoint
        best, sign = settings.best, better_sign(self.recipe)
        scores = {} if best is None else {int(r["step"]): sign * r[best] for r in self.state.history}
        prune(self.files.checkpoints, Keep(last=settings.keep, best=len(scores) and 1), scores=scores, trusted=newest)

    def heed(self, findings: Sequence[Finding]) -> None:
        """Tell what the doctor found; an error ends the run now rather than with its last audit."""
        for finding in findings:
            self.files.event("doctor", step=self.state.step, **finding.to_dict())
            self.monitor.note(str(finding))
        # A gradient that is not finite is the step's own business: it is skipped and counted.
        errors = [f for f in findings if f.severity == "error" and f.code != _NOT_FINITE]
        if errors:
            raise LawBroken(f"{errors[0].what}: {', '.join(errors[0].names)}", fix=errors[0].fix)

    def refuse_if_diverged(self) -> None:
        """Stop after `run.nonfinite_limit` skipped steps in a row: the weights are those before the first of them."""
        limit = self.recipe.run.nonfinite_limit
        if self.state.in_a_row >= limit:
            raise ThawlineError(
                f"{limit} steps in a row had a loss or a gradient that is not finite",
                where=str(self.files.events),
                fix="a lower optim.lr, a longer warm-up, or fp32; the file lists the samples of those steps",
            )

    def finish(self) -> None:
        """Audit, export the result, and say where it is. A finished run that took no further step stays as it is."""
        if self.files.finished and self.state.step == self._began_at:
            return
        report = self.law.audit(self.model)
        write_audit(self.files, report)
        report.raise_if_broken()
        exported = self._best_model()
        with atomic_dir(self.files.model, force=True) as folder:
            self.task.export(exported, folder)
        self.files.event("finished", step=self.state.step, model=str(self.files.model))

    def close(self) -> None:
        """Let the loader's processes go, and the save under way finish."""
        self.loader.close()
        self.saver.close()

    def _best_model(self) -> nn.Module:
        """The model to export: as it is, or as it was at the best evaluation where the recipe asks for that."""
        best = best_step(self.recipe, self.state.history)
        if best is None or best == self.state.step:
            return self.model
        checkpoint = _checkpoint(self.files, self.monitor, best)
        assert checkpoint is not None
        model = self.task.build(self.recipe)
        self.law.shaped_like(model)
        self.law.restore_(model, checkpoint)
        return model


def _count(epoch: float, every: float) -> int:
    return int(epoch / every + 1e-9)


def _timed(batches: Iterator[LoadedBatch[Any]], waited: Callable[[float], None]) -> Iterator[LoadedBatch[Any]]:
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        waited(time.perf_counter() - start)
        if batch is None:
            return
        yield batch


def _global_batch(group: Sequence[LoadedBatch[Any]], following: Cursor) -> GlobalBatch:
    whole = tuple(b.batch for b in group if b.batch is not None)
    return GlobalBatch(
        micro_batches=whole,
        next=following,
        batches=len(group),
        samples=sum(len(b.request.ids) for b in group),
        keys=tuple(key for batch in whole for key in batch.keys),
        bad=tuple(sample for b in group for sample in b.bad),
    )


def _give_up_later(files: RunDirectory, step: int) -> None:
    """Going back to a step gives up the checkpoints after it: they belong to a future that is trained anew."""
    later = [(s, path) for s, path in checkpoints(files.checkpoints) if s > step]
    for _, path in later:
        retire(path)
    files.event("went back", step=step, given_up=[s for s, _ in later])


def _report_left_out(samples: Samples, recipe: Recipe, files: RunDirectory, monitor: Monitor) -> None:
    """List what the plan of batches leaves out; too many unreadable samples end the run before it begins."""
    unreadable = [sample for sample in samples.left_out if sample.unreadable]
    filtered = [sample for sample in samples.left_out if not sample.unreadable]
    for sample in unreadable:
        files.event("bad sample", step=0, key=sample.key, reason=sample.reason)
        monitor.note(f"left out sample {sample.key}: {sample.reason}")
    if filtered:
        files.event("filtered", keys=[sample.key for sample in filtered], first=filtered[0].reason)
        monitor.note(
            f"the filter leaves out {len(filtered)} samples, the first ({filtered[0].key}): {filtered[0].reason}"
        )
    total = len(samples) + len(unreadable)
    if len(unreadable) > 1 and len(unreadable) > recipe.data.max_bad * total:
        raise DataError(
            f"{len(unreadable)} of {total} samples cannot be read, more than the stated share of "
            f"{recipe.data.max_bad:.1%}; the first: {unreadable[0].reason}",
            where=str(recipe.path("data", "train")),
            fix="`thawline data check` lists them; mend or remove them, or raise data.max_bad",
        )


def _base_model(recipe: Recipe, task: Task, files: RunDirectory) -> tuple[Recipe, nn.Module]:
    """The base with its weights. A random start is written down first: from then on it is a base like any other."""
    if recipe.init == "pretrained":
        return recipe, task.build(recipe)
    start = files.path / "base"
    if not start.is_dir():
        seed_all(derive(recipe.run.seed, "init"))
        drawn = task.build(recipe)
        with atomic_dir(start) as folder:
            task.export(drawn, folder)
    recipe = recipe.model_copy(update={"model": str(start), "init": "pretrained"})
    return recipe, task.build(recipe)


def _checkpoint(files: RunDirectory, monitor: Monitor, step: int | None) -> Checkpoint | None:
    if step is not None:
        path = files.checkpoints / f"step-{step:08d}"
        if not path.is_dir():
            kept = sorted(int(p.name.removeprefix("step-")) for p in files.checkpoints.glob("step-*"))
            raise CheckpointError(
                f"no checkpoint of step {step}", where=str(files.checkpoints), fix=f"kept are the steps {kept}"
            )
        return read_checkpoint(path)
    if not checkpoints(files.checkpoints):
        return None
    return read_newest(files.checkpoints, report=monitor.note)
