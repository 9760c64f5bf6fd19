"""How a run comes to be in memory: the one way in, for a new run, a resumed one and a forked one alike.

The base is built, a checkpoint's tensors are laid over it, what is recorded is held against what is here, and the
engine and the readers are made for where the run is. From then on the run is a `Session`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from thawline.ckpt.delta import BaseRef
from thawline.ckpt.load import Checkpoint, checkpoints, read_checkpoint, read_newest
from thawline.ckpt.store import atomic_dir
from thawline.core.rng import derive
from thawline.data.loader import Loader
from thawline.data.sampler import BatchPlan
from thawline.errors import CheckpointError, DataError, RecipeError
from thawline.models.recompute import recompute_
from thawline.train import rewind
from thawline.train.compatibility import environment, judge
from thawline.train.ema import Ema
from thawline.train.engine import Engine, pick_device
from thawline.train.law import Law
from thawline.train.monitor import Monitor
from thawline.train.probe import choose
from thawline.train.recipe import Recipe
from thawline.train.rundir import RunDirectory
from thawline.train.seeding import seed_all
from thawline.train.session import Session, tell_wait
from thawline.train.start import first_moments, first_state, terms
from thawline.train.state import RunState
from thawline.train.task import Samples, Task


def open_session(
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
    if recipe.run.recompute:
        recompute_(model)
    if checkpoint is not None:
        law.restore_(model, checkpoint)
    train_samples = task.samples(recipe, model, "train")
    valid_samples = task.samples(recipe, model, "valid") if recipe.data.valid is not None else None
    plan = BatchPlan(len(train_samples), seed=recipe.run.seed, batching=recipe.data.batch, length=train_samples.length)
    recorded = {
        "recipe": recipe.resolved(),
        "data": {
            "train": train_samples.fingerprint,
            "valid": valid_samples.fingerprint if valid_samples is not None else None,
        },
        "environment": environment(device),
    }
    changed = False
    if checkpoint is None:
        files.create(recipe)
        files.event("started", environment=recorded["environment"], data=recorded["data"])
        state = first_state(recipe.start, plan, accumulate=recipe.run.accumulate)
        if recipe.start is not None:
            files.event("continued", step=state.step, grade="CONTINUES", reasons=[terms(recipe.start)])
            monitor.note(f"CONTINUES {terms(recipe.start)}")
    else:
        verdict = judge(checkpoint.state, recorded, allow=allow, where=str(files.path))
        changed = verdict.grade == "CONTINUES"
        files.event("resumed", step=state.step, grade=verdict.grade, reasons=list(verdict.reasons))
        because = f" ({'; '.join(verdict.reasons)})" if verdict.reasons else ""
        monitor.note(f"going on after step {state.step}: {verdict.grade}{because}")
    for note in getattr(task, "notes", ()):
        files.event("note", text=note)
        monitor.note(note)
    _report_left_out(train_samples, recipe, files, monitor)
    if from_step is not None:
        given_up = rewind.give_up_after(files.checkpoints, from_step)
        files.event("went back", step=from_step, given_up=given_up)
    files.rewind_metrics(state.step)
    engine = Engine(model, resolution, recipe.optim, device, recipe.run.precision)
    engine.restore_optimizer_(first_moments(recipe) if checkpoint is None else checkpoint.optimizer)
    ema = _ema(recipe, model, engine, checkpoint)
    waits = partial(tell_wait, files, monitor)
    session = Session(
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
        plan=plan,
        loader=Loader(train_samples, seed=recipe.run.seed, workers=recipe.run.workers, tell=waits),
        ema=ema,
        recorded=recorded,
    )
    if checkpoint is None and recipe.run.micro_batch is not None:
        _choose_pieces_(session, recipe.run.micro_batch)
    if changed:  # what was allowed once is what the run is from here on, also for those that resume it next
        files.write_recipe(recipe)
        session.save(wait=True)
    return session


def _base_model(recipe: Recipe, task: Task, files: RunDirectory) -> tuple[Recipe, nn.Module]:
    """The base with its weights. A random start is written down first: from then on it is a base like any other.

    Raises RecipeError where it was drawn for another seed or network and nothing else says so yet: before the first
    checkpoint, which records the recipe.
    """
    start = files.path / "base"
    note = start / "drawn.json"
    random = recipe.init == "random"
    if note.is_file() and not checkpoints(files.checkpoints):
        _refuse_another_draw(json.loads(note.read_text(encoding="utf-8")), recipe, task if random else None, files)
    if random and not start.is_dir():
        drawn = _draw(recipe, task)
        with atomic_dir(start) as folder:
            task.export(drawn, folder)
            made_of = {"seed": recipe.run.seed, "fingerprint": BaseRef.of(drawn, path="").fingerprint}
            (folder / note.name).write_text(json.dumps(made_of) + "\n", encoding="utf-8")
    if random:
        recipe = recipe.model_copy(update={"model": str(start), "init": "pretrained"})
    return recipe, task.build(recipe)


def _draw(recipe: Recipe, task: Task) -> nn.Module:
    seed_all(derive(recipe.run.seed, "init"))
    return task.build(recipe)


def _refuse_another_draw(made_of: Mapping[str, Any], recipe: Recipe, task: Task | None, files: RunDirectory) -> None:
    """task: draws once more, to be compared; None where the recipe begins at the written start, and no more than the
    seed can differ."""
    fix = "put it back, or begin a run of its own in another folder with --run"
    if made_of["seed"] != recipe.run.seed:
        what = f"the run's random start was drawn from run.seed {made_of['seed']}, not {recipe.run.seed}"
        raise RecipeError(what, where=str(files.path), fix=fix)
    if task is not None and BaseRef.of(_draw(recipe, task), path="").fingerprint != made_of["fingerprint"]:
        raise RecipeError(
            "the run's random start is of another network than the one that the recipe describes now",
            where=str(files.path),
            fix=fix,
        )


def _checkpoint(files: RunDirectory, monitor: Monitor, step: int | None) -> Checkpoint | None:
    if step is not None:
        return read_checkpoint(files.checkpoint(step))
    if checkpoints(files.checkpoints):
        return read_newest(files.checkpoints, report=monitor.note)
    if files.finished:
        raise CheckpointError(
            "the run is finished, and none of its checkpoints is left to go on from",
            where=str(files.checkpoints),
            fix="its result stays as it is; to train it again give another folder with --run",
        )
    if files.begun:
        monitor.note("there is no checkpoint: the run begins at its beginning")
    return None


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


def _ema(recipe: Recipe, model: nn.Module, engine: Engine, checkpoint: Checkpoint | None) -> Ema | None:
    """The averages as they were saved, or begun now."""
    if recipe.run.ema is None:
        return None
    ema = Ema(recipe.run.ema, model, {} if checkpoint is None else checkpoint.ema)
    ema.follow_(engine.trainables)
    return ema


def _choose_pieces_(session: Session, wanted: int | Literal["auto"]) -> None:
    """Cut micro-batches as the recipe says, once, before the first step; from then on the state has it."""
    seed = session.recipe.run.seed
    fit = choose(wanted, session.engine, session.task, session.train_samples, session.planned_steps(), seed=seed)
    session.state = replace(session.state, split=fit.split)
    session.files.event("micro-batch", samples=fit.rows, split=fit.split)
    session.monitor.note(f"{fit.rows} samples at a time: each micro-batch is cut into {fit.split}")
