"""A VideoChat2 model at a path of any kind: a home, a run's checkpoint, a delta, or a file over its base."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import nn

from thawline.ckpt.delta import BaseRef, check_base, lay_over, read_delta
from thawline.ckpt.formats.thawline_run import is_checkpoint, is_delta, is_run, newest_checkpoint
from thawline.ckpt.formats.thawline_run import read_delta as header
from thawline.ckpt.load import load_strict_, read_checkpoint
from thawline.core.config import near_names
from thawline.errors import CheckpointError, RecipeError
from thawline.models.videochat.alignment import VideoAlignment
from thawline.models.videochat.build import Opened
from thawline.tasks.restoring import restore_
from thawline.tasks.videochat import VideoChatOptions, VideoChatTask, home_of
from thawline.tasks.videochat_alignment import AlignmentTask
from thawline.tasks.videochat_alignment_home import AlignmentHome, is_alignment
from thawline.tasks.videochat_home import ChatHome
from thawline.tasks.videochat_recognition import home_at, is_part, recognises
from thawline.train.law import Law, shape_
from thawline.train.recipe import read_recipe
from thawline.train.rundir import RunDirectory


def is_meant(path: Path, base: Path | None = None) -> bool:
    """Whether `path` (or the base it is to be laid over) is a VideoChat2 model of any stage; reads names only."""
    path = path.expanduser().absolute()
    run = _owner(path)
    if run is not None:
        return read_recipe(run / "recipe.yaml").task in (VideoChatTask.name, AlignmentTask.name)
    delta = _delta_file(path)
    if delta is not None:
        return is_part(tuple(header(delta).base))
    return is_alignment(path) or recognises(path) or (base is not None and recognises(base))


def load_model(path: Path, base: Path | None = None) -> nn.Module:
    """The model at `path`, of any stage, in eval mode; errors as `open_chat`."""
    path = path.expanduser().absolute()
    run = _owner(path)
    if is_alignment(path) or (run is not None and read_recipe(run / "recipe.yaml").task == AlignmentTask.name):
        return open_alignment(path, base)[0]
    return open_chat(path, base)[0].model


def open_alignment(path: Path, base: Path | None = None) -> tuple[VideoAlignment, AlignmentHome]:
    """A stage-1 model: what a run exported, a run, or one of its checkpoints, over `base` where its own has moved."""
    if is_alignment(path):
        home = AlignmentHome.of(path)
        return home.open()[0], home
    run = RunDirectory(_owner(path) or path)
    if path == run.path and run.finished and base is None:
        return open_alignment(run.model)
    begun = run.path / "base"
    source = base if base is not None else (begun if begun.is_dir() else None)
    recipe = read_recipe(run.recipe, {} if source is None else {"model": str(source)})
    recipe = recipe.model_copy(update={"init": "pretrained"})
    task = AlignmentTask()
    model = task.build(recipe)
    assert isinstance(model, VideoAlignment)
    checkpoint = read_checkpoint(newest_checkpoint(path)[0] if path == run.path else path)
    Law.open(recipe.plan, model, run, seed=recipe.run.seed, source=recipe.path("model")).restore_(model, checkpoint)
    assert task.home is not None
    model.eval()
    return model, task.home


def open_chat(path: Path, base: Path | None = None, *, dtype: str = "") -> tuple[Opened, ChatHome]:
    """The model with its tokenizers, in eval mode, and its home.

    path: a home (see `videochat_recognition`), a run, one of its checkpoints, a delta, or a file of trained tensors
    base: what a delta or such a file belongs to, where that is not found by itself
    dtype: of the language model's weights in place of the home's; not for deltas, whose base is known by its bytes
    Raises CheckpointError (BaseMismatch for another base) naming tensors, files and the remedy.
    """
    path = path.expanduser().absolute()
    base = None if base is None else base.expanduser().absolute()
    if not path.exists():
        near = near_names(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else []
        hint = f"did you mean {path.parent / near[0]}?" if near else "check the path"
        raise CheckpointError("no such file or directory", where=str(path), fix=hint)
    run = _owner(path)
    if run is not None and RunDirectory(run).finished and path == run and base is None:
        return _opened(home_at(RunDirectory(run).model), dtype)
    if dtype and (run is not None or _delta_file(path) is not None):
        raise RecipeError(
            f"{dtype} cannot be asked for here: a delta's base is recognised by its bytes",
            where=str(path),
            fix="ask for it with the run's exported model/, or leave it out",
        )
    if run is not None:
        if path == run:
            path = newest_checkpoint(run)[0]
        return _of_run(run, path, base)
    delta = _delta_file(path)
    if delta is not None:
        return _over_home(path, delta, base)
    return _opened(home_at(path, base=base), dtype)


def _opened(home: ChatHome, dtype: str) -> tuple[Opened, ChatHome]:
    home = dataclasses.replace(home, dtype=dtype) if dtype else home
    return home.open()[0], home


def _of_run(run: Path, checkpoint: Path, base: Path | None) -> tuple[Opened, ChatHome]:
    """A checkpoint of a run: the base as its recipe names it, shaped as its plan says, and the delta over it."""
    begun = run / "base"
    drawn = read_recipe(run / "recipe.yaml").init == "random"
    source = base if base is not None else (begun if drawn else None)
    recipe = read_recipe(run / "recipe.yaml", {} if source is None else {"model": str(source)})
    options = recipe.bind_part(VideoChatOptions, "options")
    home = home_of(recipe, options)
    opened = home.open(seed=recipe.run.seed)[0]
    found = read_checkpoint(checkpoint)
    check_base(found.base, BaseRef.of(opened.model, path=str(home.path)), source=str(checkpoint))
    held = set(opened.model.state_dict())
    shape_(opened.model, recipe.plan, seed=recipe.run.seed)
    new = set(opened.model.state_dict()) - held
    laid = lay_over(opened.model.state_dict(), found.difference, as_shaped=new, source=str(checkpoint))
    load_strict_(opened.model, laid, source=str(checkpoint))
    opened.model.eval()
    return opened, home


def _over_home(path: Path, file: Path, base: Path | None) -> tuple[Opened, ChatHome]:
    """A delta away from its run, over the base it was made of."""
    delta = read_delta(file)
    where = base if base is not None else Path(delta.base.path)
    if not recognises(where):
        raise CheckpointError(
            f"a delta over a VideoChat2 model that is not given; it was {delta.base.path or 'not recorded'} "
            f"(fingerprint {delta.base.fingerprint[:16]})",
            where=str(path),
            fix=f"thawline chat {path} VIDEO --base DIR, where DIR holds the model that the run started from",
        )
    home = home_at(where)
    opened = home.open()[0]
    restore_(opened.model, delta, BaseRef.of(opened.model, path=str(where)), source=str(path))
    opened.model.eval()
    return opened, home


def _owner(path: Path) -> Path | None:
    """The run directory that `path` is, or is a checkpoint of."""
    if is_run(path) and RunDirectory(path).begun:
        return path
    owner = path.parent.parent
    return owner if is_checkpoint(path) and RunDirectory(owner).begun else None


def _delta_file(path: Path) -> Path | None:
    if is_checkpoint(path):
        return path / "delta.safetensors"
    return path if is_delta(path) else None
