"""A run while it is in memory: the model, the engine of the phase in force, the readers, and where the run is.

How it comes to be there, of a new run, a resumed one and a forked one alike, is `opening`'s matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import nn

from thawline.ckpt.load import read_checkpoint
from thawline.ckpt.mirror import mirror_model
from thawline.ckpt.store import StorageError, atomic_dir
from thawline.core.span import Span
from thawline.data.loader import Loader
from thawline.data.sampler import BatchPlan
from thawline.errors import CheckpointError, LawBroken, RecipeError, ThawlineError
from thawline.freeze import doctor
from thawline.freeze.doctor import Finding
from thawline.freeze.schedule import Progress, phase_at, warmup_factor
from thawline.train import schedule
from thawline.train.board import Board
from thawline.train.clock import Clock
from thawline.train.ema import Ema
from thawline.train.engine import Engine, Rate
from thawline.train.evaluation import best_step, evaluate, scores
from thawline.train.held_back import keep_rows
from thawline.train.law import Law, write_audit
from thawline.train.microbatch import PlannedStep, count_for, planned_steps
from thawline.train.monitor import Monitor
from thawline.train.reading import GlobalBatch, global_batches
from thawline.train.recipe import Recipe
from thawline.train.rundir import RowLog, RunDirectory
from thawline.train.saving import Keeper, end_of
from thawline.train.state import RunState
from thawline.train.task import Samples, Task

_NOT_FINITE = "not-finite"


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
    ema: Ema | None
    recorded: Mapping[str, Any]
    clock: Clock = field(init=False)
    metrics: RowLog = field(init=False)
    board: Board | None = field(init=False)
    keeper: Keeper = field(init=False)
    _began_at: int = field(init=False)

    def __post_init__(self) -> None:
        self._began_at = self.state.step
        self.heed(doctor.before(self.model, self.engine.resolution, self.engine.optimizer))
        self.clock = Clock(self.files.speed, step=self.state.step, total_steps=self.total_steps)
        self.metrics = RowLog(self.files.metrics)
        self.board = Board(self.files.board, step=self.state.step) if self.recipe.run.tensorboard else None
        self.keeper = Keeper(
            files=self.files,
            settings=self.recipe.run.checkpoint,
            base=self.law.base,
            rows=self.metrics,
            scores=lambda: scores(self.recipe, self.state.history),
            also=lambda: [self.state.anchor] if self.goes_back else [],
            tell=self.monitor.note,
            waited=partial(self.clock.waited, "saving"),
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
        """The rate and the momentum of the next update."""
        settings, step = self.recipe.optim.schedule, self.state.step
        length = {"total_steps": self.total_steps, "steps_per_epoch": self.steps_per_epoch}
        progress, history = self.progress, self.state.history
        return Rate(
            schedule.lr_factor(settings, step, **length),
            lambda since: warmup_factor(self.law.plan, since, progress, history),
            schedule.momentum(settings, step, **length),
        )

    def due(self, every: Span, before: Progress, after: Progress) -> bool:
        """Whether a multiple of `every` was reached by the step from `before` to `after`."""
        if every.unit == "minutes":
            return self.keeper.minutes >= every.amount
        if every.unit == "epochs":
            return _count(after.epoch, every.amount) > _count(before.epoch, every.amount)
        steps = max(1, every.in_steps(steps_per_epoch=self.steps_per_epoch, total_steps=self.total_steps))
        return after.step // steps > before.step // steps

    def rest_of_epoch(self) -> Iterator[GlobalBatch]:
        """Global batches from the cursor to the end of its epoch, read ahead by the loader."""
        return global_batches(self.loader, self.planned_steps(), waited=partial(self.clock.waited, "data"))

    def planned_steps(self) -> Iterator[PlannedStep]:
        """This rank's part of the steps from the cursor to the end of its epoch."""
        run, engine = self.recipe.run, self.engine
        count = count_for(accumulate=run.accumulate, world=engine.world, fixed=run.micro_batches)
        return planned_steps(self.plan, self.state.cursor, run.accumulate, count, engine.rank, engine.world)

    @property
    def evaluated(self) -> bool:
        """Whether the history has an evaluation of this step."""
        return bool(self.state.history) and self.state.history[-1]["step"] == self.state.step

    def evaluate(self) -> None:
        """Score the held-back samples; the figures join the history that phases and the best checkpoint depend on."""
        if self.valid_samples is None:
            return
        with self.clock.waiting("evaluation"), self.averaged():
            found, bad = evaluate(
                self.task,
                self.model,
                self.valid_samples,
                self.recipe,
                self.engine.device,
                split=self.state.valid_split,
                tell=partial(self.cut, evaluating=True),
                waits=partial(tell_wait, self.files, self.monitor),
            )
        for sample in bad:
            self.files.event("bad sample", step=self.state.step, split="valid", key=sample.key, reason=sample.reason)
            self.monitor.note(f"left out held-back sample {sample.key}: {sample.reason}")
        row = {"step": self.state.step, "epoch": round(self.progress.epoch, 6)}
        row |= {f"valid/{name}": value for name, value in found.metrics.items()}
        best = self.recipe.run.checkpoint.best
        if best is not None and best not in row:
            known = ", ".join(k for k in row if k.startswith("valid/"))
            raise RecipeError(
                f"the evaluation gives no {best!r}",
                where=self.recipe.run.checkpoint.where("best"),
                fix=f"it gives {known}",
            )
        self.state = replace(self.state, history=(*self.state.history, row))
        self.metrics.append(row)
        best_so_far = best_step(self.recipe, self.state.history)
        keep_rows(self.files, self.state.step, found.rows, best=best_so_far, tell=self.monitor.note)
        self.monitor.evaluation(row)
        if self.board is not None:
            self.board.scalars(self.state.step, row)

    def cut(self, split: int, *, evaluating: bool = False) -> None:
        """Cut each micro-batch, or each batch of an evaluation, into so many pieces from here on."""
        state = self.state
        self.state = replace(state, valid_split=split) if evaluating else replace(state, split=split)
        what = "evaluation" if evaluating else "step"
        self.files.event("out of memory", step=self.state.step, during=what, split=split)
        self.monitor.note(f"out of memory in the {what}: each batch of it is cut into {split} from here on")

    def enter_due_phase(self) -> bool:
        """Enter the phase that progress and metrics call for: capture, build the engine anew, restore."""
        phase = phase_at(self.law.plan, self.progress, self.state.history)
        if phase == self.state.phase:
            return False
        moments = self.engine.optimizer_state()
        resolution = self.law.enter(self.model, phase)
        self.engine = Engine(self.model, resolution, self.recipe.optim, self.engine.device, self.recipe.run.precision)
        self.engine.restore_optimizer_(moments)
        if self.ema is not None:
            self.ema.follow_(self.engine.trainables)
        self.heed(doctor.before(self.model, resolution, self.engine.optimizer))
        self.files.event(
            "phase", step=self.state.step, phase=phase, trains=len(resolution.trainable_names), before=self.state.phase
        )
        self.monitor.note(f"phase {phase} from step {self.state.step}: {len(resolution.trainable_names)} tensors train")
        self.state = replace(self.state, phase=phase)
        return True

    def save(self, *, wait: bool = False) -> None:
        """Write a checkpoint behind the training, after the frozen tensors have been shown to be untouched.

        What a storage that refuses leads to is the keeper's to say; with `wait` (at the end, and when the run stops) it
        is raised.
        """
        if self.board is not None:
            self.board.flush()
        self.keeper.save(
            step=self.state.step,
            wait=wait,
            delta=self.law.delta(self.model),
            optimizer=self.engine.optimizer_state(),
            parked=self.engine.parked,
            ema={} if self.ema is None else self.law.under_every_name(self.ema.averages),
            state={"run": self.state.to_json(), **self.recorded},
        )

    def end_with(self, exc: BaseException) -> BaseException:
        """What the run ends with because of `exc`, once the last whole step has its checkpoint, if that can be had."""
        end: BaseException = exc
        if isinstance(exc, StorageError):
            end = end_of(exc, self.files, self.monitor.note)
        elif not isinstance(exc, LawBroken):
            self._rescue()
        code = {"exit_code": end.exit_code} if isinstance(end, ThawlineError) else {}
        self.files.event("stopped", step=self.state.step, reason=_sentence(end), **code)
        return end

    def _rescue(self) -> None:
        step = self.state.step
        if step in (self._began_at, self.keeper.saved):
            return
        if self.engine.torn:
            self.monitor.note(f"cut off inside the update after step {step}: the last checkpoint before it stays")
            return
        if self.ema is not None and self.ema.away:
            self.monitor.note("cut off between weights and averages: the last checkpoint before that stays")
            return
        try:
            self.save(wait=True)
        except StorageError as exc:
            self.monitor.note(str(exc))
        else:
            self.monitor.note(f"a checkpoint of step {step} is written")

    def heed(self, findings: Sequence[Finding]) -> None:
        """Tell what the doctor found; an error ends the run now rather than with its last audit."""
        for finding in findings:
            self.files.event("doctor", step=self.state.step, **finding.to_dict())
            self.monitor.note(str(finding))
        # A gradient that is not finite is the step's own business: it is skipped and counted.
        errors = [f for f in findings if f.severity == "error" and f.code != _NOT_FINITE]
        if errors:
            raise LawBroken(f"{errors[0].what}: {', '.join(errors[0].names)}", fix=errors[0].fix)

    @property
    def scales(self) -> bool:
        """Whether the loss is scaled."""
        return self.recipe.run.precision == "fp16"

    @property
    def diverged(self) -> bool:
        """Whether too many steps in a row were not finite."""
        return self.state.in_a_row >= self.recipe.run.nonfinite.limit

    @property
    def goes_back(self) -> bool:
        """Whether that is answered by going back, and not by stopping."""
        return self.recipe.run.nonfinite.then == "rewind"

    def record(self, row: Mapping[str, Any], samples: int) -> None:
        """Log a step over `samples` samples, which makes it one that the run has taken, and show it."""
        self.metrics.append(row)
        self.engine.torn = False
        speed = self.clock.lap(samples, self.state.step)
        self.monitor.step(row, speed)
        if self.board is not None:
            self.board.scalars(self.state.step, row, under="train/")
            self.board.scalars(self.state.step, speed, under="speed/")

    def averaged(self) -> AbstractContextManager[None]:
        """Meanwhile the model holds the averages of its weights, in a run that keeps them."""
        return nullcontext() if self.ema is None else self.ema.in_place()

    def finish(self) -> None:
        """Audit, export the result, and say where it is. A finished run that took no further step stays as it is."""
        if self.files.finished and self.state.step == self._began_at:
            return
        report = self.law.audit(self.model)
        write_audit(self.files, report)
        report.raise_if_broken()
        with self._result() as exported, atomic_dir(self.files.model, force=True) as folder:
            if self.ema is not None:  # the law holds for averages too
                self.law.audit(exported, stepped=False).raise_if_broken()
            self.task.export(exported, folder)
        self.files.event("finished", step=self.state.step, model=str(self.files.model))
        self._mirror()

    def _mirror(self) -> None:
        """Send the result where the checkpoints went; it lies here all the same if that fails."""
        url = self.recipe.run.checkpoint.mirror
        if url is None:
            return
        try:
            mirror_model(self.files.path, url)
        except CheckpointError as exc:
            self.files.event("not mirrored", step=self.state.step, reason=str(exc))
            self.monitor.note(f"the result was not sent to {url}: {exc}")

    def close(self) -> None:
        """Let the loader's processes go, and the save under way finish."""
        self.loader.close()
        self.keeper.close()
        if self.board is not None:
            self.board.close()

    @contextmanager
    def _result(self) -> Iterator[nn.Module]:
        """The model to export: as it is, or as it was at the best evaluation where the recipe asks for that; with the
        averages of its weights, if they are kept."""
        best = best_step(self.recipe, self.state.history)
        if best is None or best == self.state.step:
            with self.averaged():
                yield self.model
            return
        checkpoint = read_checkpoint(self.files.checkpoint(best))
        model = self.task.build(self.recipe)
        self.law.shaped_like(model)
        self.law.restore_(model, checkpoint)
        settings = self.recipe.run.ema
        with nullcontext() if settings is None else Ema(settings, model, checkpoint.ema).in_place():
            yield model


def _count(epoch: float, every: float) -> int:
    return int(epoch / every + 1e-9)


def tell_wait(files: RunDirectory, monitor: Monitor, text: str) -> None:
    """Say that a reader waits for storage, and write it down."""
    files.event("waiting", reason=text)
    monitor.note(text)


def _sentence(exc: BaseException) -> str:
    return exc.what if isinstance(exc, ThawlineError) else f"{type(exc).__name__}: {exc}"
