"""Runs by name: a recipe's file becomes its task and its run directory."""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from thawline.ckpt.load import Checkpoint, checkpoints, newest_whole, read_checkpoint
from thawline.ckpt.mirror import bring_run
from thawline.ckpt.remote import is_url, local_path
from thawline.ckpt.store import atomic_dir, link, remove_tree
from thawline.core.config import near_names
from thawline.core.digest import digest_tensor
from thawline.errors import CheckpointError, LawBroken, RecipeError, Stopped
from thawline.train.compatibility import judge
from thawline.train.loop import Run
from thawline.train.loop import train as run_loop
from thawline.train.monitor import Monitor
from thawline.train.recipe import Recipe, read_recipe
from thawline.train.rundir import RunDirectory, read_rows
from thawline.train.task import Task

TASKS = {
    "speech": "thawline.tasks.asr:SpeechTask",
    "vision": "thawline.tasks.vision:VisionTask",
    "videochat": "thawline.tasks.videochat:VideoChatTask",
    "videochat_stage1": "thawline.tasks.videochat_alignment:AlignmentTask",
}
"""Name in a recipe -> module:class. Imported when a recipe asks for it."""


def task_of(recipe: Recipe) -> Task:
    """The task that a recipe names."""
    if recipe.task not in TASKS:
        near = near_names(recipe.task, list(TASKS))
        raise RecipeError(
            f"unknown task {recipe.task!r}",
            where=recipe.where("task"),
            fix=(f"did you mean {near[0]!r}? " if near else "") + f"known: {', '.join(TASKS)}",
        )
    module, _, name = TASKS[recipe.task].partition(":")
    task: Task = getattr(importlib.import_module(module), name)()
    return task


def open_recipe(path: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> tuple[Recipe, Task]:
    """The recipe with its task. What a task's own options say of the plan, and of files, is written out."""
    if Path(path).is_dir():
        begun = RunDirectory(Path(path)).begun
        raise RecipeError(
            f"this is a {'run' if begun else 'folder'}, and not a recipe",
            where=str(path),
            fix=f"`thawline resume {path}` goes on with it"
            if begun
            else f"`thawline init {path}` writes one for a model",
        )
    recipe = read_recipe(path, overrides)
    task = task_of(recipe)
    complete = getattr(task, "complete", None)
    return (complete(recipe) if complete is not None else recipe), task


def train(
    recipe: str | Path,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    run: str | Path | None = None,
    allow: Sequence[str] = (),
    monitor: Monitor | None = None,
) -> Run:
    """Train the recipe in `run` (default: runs/NAME beside the working directory), or go on with it there."""
    value, task = open_recipe(recipe, overrides)
    directory = Path(run) if run is not None else Path("runs") / Path(recipe).stem
    if directory.resolve() == value.path("model").resolve():
        raise RecipeError(
            f"the run would lie in the folder of its own base, {str(directory)!r}",
            where=value.where("model"),
            fix="give another folder with --run",
        )
    return run_loop(value, task, directory, monitor=monitor, allow=allow)


def resume(
    directory: str | Path,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    step: int | None = None,
    fork: str | Path | None = None,
    verify: int = 0,
    allow: Sequence[str] = (),
    monitor: Monitor | None = None,
) -> Run:
    """Go on with the run in `directory`, from its newest whole checkpoint or from that of `step`.

    directory: or the URL that a run was mirrored to (`run.checkpoint.mirror`), to go on with it here, in runs/NAME
    fork:   go on in this new folder instead, and leave the run (and what it is mirrored to) as it is
    verify: first repeat (in a copy) the last so many recorded steps and compare bits; LawBroken names the first
            that differs
    """
    if is_url(directory):
        here = Path("runs") / PurePosixPath(str(directory)).name if fork is None else Path(fork)
        files, step = _begun(bring_run(str(directory), here.absolute(), step=step)), None
    else:
        files = _begun(local_path(directory))
    if verify:
        repeated = repeat_steps(files.path, verify, step=step)
        if monitor is not None:
            monitor.note(f"repeated the last {repeated} recorded steps: the same bits")
    if fork is not None and not is_url(directory):
        branch(files, RunDirectory(Path(fork).absolute()), step=step)
        files, step = RunDirectory(Path(fork).absolute()), None
    if fork is not None:  # two runs must not send their checkpoints to one place
        files.write_recipe(read_recipe(files.recipe, {"run.checkpoint.mirror": None}))
    try:
        value, task = open_recipe(files.recipe, overrides)
        return run_loop(value, task, files.path, monitor=monitor, allow=allow, from_step=step)
    except RecipeError:
        if fork is not None and len(checkpoints(files.checkpoints)) == 1:  # refused before it took a step of its own
            remove_tree(files.path)
        raise


def branch(files: RunDirectory, target: RunDirectory, *, step: int | None = None) -> int:
    """Copy what a run is at its newest whole checkpoint, or at that of `step`, into a new folder; the step taken."""
    if target.path.exists():
        raise RecipeError(
            "exists already", where=str(target.path), fix="a fork begins in a new folder: give another name"
        )
    source = newest_whole(files.checkpoints, report=lambda line: None) if step is None else files.checkpoint(step)
    taken = read_checkpoint(source).step
    with atomic_dir(target.path) as folder:
        for file in (files.recipe, files.base, files.metrics):
            if file.exists():
                shutil.copyfile(file, folder / file.name)
        shutil.copytree(source, folder / "checkpoints" / source.name, copy_function=_link_or_copy)
    target.event("forked", step=taken, of=str(files.path))
    return taken


def _link_or_copy(old: str, new: str) -> None:
    if not link(Path(old), Path(new)):
        shutil.copyfile(old, new)


def repeat_steps(directory: str | Path, steps: int, *, step: int | None = None) -> int:
    """Take the last `steps` recorded steps of a run once more, in a copy, and compare with what was recorded.

    Begins at the newest kept checkpoint that lies so far back, or at the oldest there is; returns how many steps were
    repeated. Raises LawBroken naming the first row or the tensors that differ, CheckpointError where no earlier
    checkpoint is kept.
    """
    files = _begun(directory)
    value, task = open_recipe(files.recipe, {"run.checkpoint.mirror": None, "run.time_limit": None})
    states = {
        s: state
        for s, path in checkpoints(files.checkpoints)
        if (step is None or s <= step) and (state := _state_of(path)) is not None
    }
    end = max(states, default=0)
    kept = sorted(s for s, state in states.items() if s < end and _alike(state, {**state, "recipe": value.resolved()}))
    if not kept:
        raise CheckpointError(
            "no earlier checkpoint is kept to repeat from, or none that is whole and of the same settings",
            where=str(files.checkpoints),
            fix="resume without --verify; run.checkpoint.keep=2 keeps one more",
        )
    start = max((s for s in kept if s <= end - steps), default=kept[0])
    with tempfile.TemporaryDirectory(prefix="thawline-verify-") as folder:
        copy = RunDirectory(Path(folder) / "run")
        branch(files, copy, step=start)
        try:
            run_loop(value, task, copy.path, from_step=start, until=end)
        except Stopped as exc:
            raise Stopped(
                f"the run is as it was; while its last steps were repeated: {exc.what}",
                where=str(files.path),
                fix=f"thawline resume {files.path}",
            ) from exc
        recorded = [row for row in read_rows(files.metrics) if start < row["step"] <= end]
        repeated = [row for row in read_rows(copy.metrics) if start < row["step"] <= end]
        for before, after in zip(recorded, repeated, strict=False):
            if before != after:
                raise LawBroken(
                    f"step {before['step']} does not come out the same: {before} was recorded, now {after}",
                    where=str(files.metrics),
                    fix="the machine, its libraries or the data differ from what the run was begun with",
                )
        if len(recorded) != len(repeated):
            raise LawBroken(f"{len(recorded)} rows were recorded, {len(repeated)} came out", where=str(files.metrics))
        mine, other = (_digests(read_checkpoint(d.checkpoints / f"step-{end:08d}")) for d in (files, copy))
        differing = sorted(n for n in mine.keys() | other.keys() if mine.get(n) != other.get(n))
        if differing:
            raise LawBroken(f"{len(differing)} tensors come out otherwise: {', '.join(differing[:5])}")
    return end - start


def _state_of(path: Path) -> Mapping[str, Any] | None:
    """What a checkpoint records of its run; None for one that is not whole."""
    try:
        return read_checkpoint(path).state
    except CheckpointError:
        return None


def _alike(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether nothing that could matter has been allowed to change in between."""
    try:
        judge(recorded, now)
    except RecipeError:
        return False
    return True


def _digests(checkpoint: Checkpoint) -> dict[str, str]:
    """Digests of weights, of the optimizer's state and of averages, by name."""
    parts = {"optimizer": checkpoint.optimizer, "ema": checkpoint.ema}
    beside = {f"{part}/{name}": digest_tensor(t) for part, tensors in parts.items() for name, t in tensors.items()}
    return {**checkpoint.difference.digests, **beside}


def _begun(directory: str | Path) -> RunDirectory:
    files = RunDirectory(Path(directory).absolute())
    if not files.begun:
        fix = "it would hold recipe.yaml and base.json; begin one with thawline train"
        if (files.path / "train.yaml").is_file():
            fix = (
                f"a WeNet training goes on by `thawline init {directory} --continue` and training the recipe it writes"
            )
        elif files.path.is_file():
            fix = f"a recipe's run goes on by the command that began it: `thawline train {directory}`"
        raise RecipeError(f"{str(directory)!r} is not a run directory", fix=fix)
    return files
