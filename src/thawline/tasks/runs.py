"""Runs by name: a recipe's file becomes its task and its run directory."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thawline.core.config import near_names
from thawline.errors import RecipeError
from thawline.train.loop import Run
from thawline.train.loop import train as run_loop
from thawline.train.monitor import Monitor
from thawline.train.recipe import Recipe, read_recipe
from thawline.train.rundir import RunDirectory
from thawline.train.task import Task

TASKS = {
    "speech": "thawline.tasks.asr:SpeechTask",
    "vision": "thawline.tasks.vision:VisionTask",
    "videochat": "thawline.tasks.videochat:VideoChatTask",
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
    return run_loop(value, task, directory, monitor=monitor, allow=allow)


def resume(
    directory: str | Path,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    step: int | None = None,
    allow: Sequence[str] = (),
    monitor: Monitor | None = None,
) -> Run:
    """Go on with the run in `directory`, from its newest whole checkpoint or from that of `step`."""
    files = RunDirectory(Path(directory).absolute())
    if not files.begun:
        raise RecipeError(
            f"{str(directory)!r} is not a run directory", fix="it would hold recipe.yaml; begin one with thawline train"
        )
    value, task = open_recipe(files.recipe, overrides)
    return run_loop(value, task, files.path, monitor=monitor, allow=allow, from_step=step)
