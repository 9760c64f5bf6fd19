"""A classifier ready to use: images in, classes out, and its score on a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from thawline.ckpt.delta import BaseRef, read_delta
from thawline.ckpt.formats.thawline_run import base_of_bare_delta, is_checkpoint
from thawline.ckpt.load import Checkpoint, read_checkpoint, read_newest
from thawline.core.config import near_names
from thawline.data.image import read_pixels
from thawline.data.image_transforms import seen
from thawline.errors import CheckpointError, DataError
from thawline.models.vision.architecture import logits_of
from thawline.models.vision.head import resize_head_
from thawline.tasks.evaluating import evaluate_samples
from thawline.tasks.restoring import restore_
from thawline.tasks.vision import VisionTask, evaluate, labelled
from thawline.tasks.vision_home import VisionHome, find_head_of
from thawline.train.law import Law
from thawline.train.recipe import read_recipe
from thawline.train.rundir import RunDirectory
from thawline.train.task import Evaluation


def load_classifier(path: Path | str, base: Path | str | None = None) -> tuple[nn.Module, VisionHome]:
    """The classifier at `path`, in eval mode, and what its files say of it.

    path: an exported or Hugging Face directory, a weights file, a run directory (its result, or where there is none
          yet its newest whole checkpoint), a checkpoint in a run directory, or a delta
    base: the base of a run or a delta, where it is no longer where the run found it

    The names of the classes of a new head are in its run alone: a delta away from it gives numbered ones.
    """
    path = Path(path).expanduser().absolute()
    under = base_of_bare_delta(path)
    if under is not None:
        return _of_delta(path, under if base is None else Path(base).expanduser().absolute())
    run = RunDirectory(path)
    if run.begun:
        if run.finished and base is None:
            return load_classifier(run.model)
        return _at_checkpoint(run, read_newest(run.checkpoints, report=_nobody), base)
    if is_checkpoint(path):
        return _at_checkpoint(RunDirectory(path.parent.parent), read_checkpoint(path), base)
    home = VisionHome.of(path)
    model = home.load()
    return model, find_head_of(home, model, "")


def _at_checkpoint(run: RunDirectory, checkpoint: Checkpoint, base: Path | str | None) -> tuple[nn.Module, VisionHome]:
    overrides = {} if base is None else {"model": str(Path(base).expanduser().absolute())}
    recipe = read_recipe(run.recipe, overrides)
    if (run.path / "base").is_dir() and base is None:  # a random start was written down as a base
        recipe = recipe.model_copy(update={"model": str(run.path / "base"), "init": "pretrained"})
    task = VisionTask()
    model = task.build(recipe)
    law = Law.open(recipe.plan, model, run, seed=recipe.run.seed, source=recipe.path("model"))
    law.restore_(model, checkpoint)
    return model.eval(), task.vision_home


def _of_delta(path: Path, base: Path) -> tuple[nn.Module, VisionHome]:
    """A delta away from its run, over the base that it was made of."""
    if not base.exists():
        raise CheckpointError(
            f"it changes a base that is not there any more: {base}", where=str(path), fix="say where it is with --base"
        )
    delta = read_delta(path) if path.is_file() else read_checkpoint(path).difference
    model, home = load_classifier(base)
    before = BaseRef.of(model, path=str(base))
    held = [f"{home.head}{layer}.weight" for layer in ("", ".base_layer")]  # the latter under an adapter
    rows = next((delta.tensors[name] for name in held if name in delta.tensors), None)
    if held[0] in delta.base.made and rows is not None:
        resize_head_(model, home.head, len(rows))
        home = find_head_of(replace(home, classes=()), model, home.head)
    restore_(model, delta, before, source=str(path))
    return model.eval(), home


def _nobody(message: str) -> None:
    """The damaged checkpoints that were passed over are the trainer's concern."""


@dataclass(frozen=True, slots=True)
class Guess:
    """What an image was taken for: classes with their probabilities, likeliest first."""

    file: str
    classes: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Classifier:
    """A model with its classes and its input."""

    model: nn.Module
    home: VisionHome

    @classmethod
    def open(cls, path: Path | str, *, base: Path | str | None = None) -> Classifier:
        """Load whatever `load_classifier` knows."""
        return cls(*load_classifier(path, base))

    @torch.inference_mode()
    def predict(self, files: Sequence[Path | str], *, top: int = 5, batch_size: int = 32) -> list[Guess]:
        """The likeliest classes of each image file, in order. Raises DataError naming the first that cannot be read."""
        guesses: list[Guess] = []
        for start in range(0, len(files), batch_size):
            part = files[start : start + batch_size]
            images = torch.stack([seen(read_pixels(_existing(Path(file))), self.home.input) for file in part])
            chances = logits_of(self.model, images).float().softmax(-1)
            best = chances.topk(min(top, chances.shape[-1]), dim=-1)
            for file, values, numbers in zip(part, best.values.tolist(), best.indices.tolist(), strict=True):
                named = tuple((self.home.classes[n], value) for n, value in zip(numbers, values, strict=True))
                guesses.append(Guess(str(file), named))
        return guesses

    def evaluate(
        self, data: Path | str, *, batch_size: int = 32, workers: int = 0, limit: int | None = None
    ) -> Evaluation:
        """Accuracy on a data set, and a row an image. What cannot be read is counted as `unreadable`."""
        return evaluate_samples(
            labelled(Path(data), self.home),
            lambda batches: evaluate(self.model, self.home.classes, batches),
            batch_size=batch_size,
            workers=workers,
            limit=limit,
        )


def _existing(path: Path) -> Path:
    if not path.is_file():
        near = near_names(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else []
        raise DataError(
            "no such image file",
            where=str(path),
            fix=f"did you mean {path.parent / near[0]}?" if near else "check the path",
        )
    return path
