"""The vision task: classifiers of single images, with the head that fits the classes at hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from thawline.core.config import Strict, near_names
from thawline.core.rng import derive
from thawline.data.image import read_images
from thawline.data.image_transforms import ImageBatch, ImageConf, ImageSamples, check_kornia
from thawline.errors import DataError, RecipeError
from thawline.freeze.inspect import original_class
from thawline.freeze.lora import has_adapters, merged_copy
from thawline.models.vision.architecture import logits_of
from thawline.models.vision.head import HeadChange, replace_head_
from thawline.tasks.vision_home import VisionHome, find_head_of
from thawline.train.recipe import Recipe
from thawline.train.rundir import RunDirectory
from thawline.train.task import Evaluation, PlainSums, Samples, SumTerm

TOP = 5


class VisionOptions(Strict):
    """`options` of a vision recipe."""

    head: Literal["keep", "replace"] = "keep"
    """keep: the data's classes are among the model's. replace: the last layer gets the data's classes; rows of classes
    that the model knows by the same name are kept, the others drawn from the seed."""
    head_name: str = ""
    """Dotted path of the layer that gives the logits; empty takes the last linear layer."""
    classes: tuple[str, ...] = ()
    """Names and order of the classes of a new head; empty takes those of data.train."""
    model_fn: str = ""
    """module:function that makes the network of a bare weights file; also timm:NAME and torchvision:NAME."""
    model_args: dict[str, Any] = {}
    """Its keyword arguments."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each label that is spread over all classes (Szegedy et al. 2016)."""


class VisionTask:
    """Fine-tuning an image classifier. Made anew for each run; remembers the home of what it built."""

    name = "vision"

    def __init__(self) -> None:
        self.options = VisionOptions()
        self.home: VisionHome | None = None
        self.head_change: HeadChange | None = None
        self.notes: tuple[str, ...] = ()

    def build(self, recipe: Recipe) -> nn.Module:
        self.options = options = recipe.bind_part(VisionOptions, "options")
        conf: ImageConf = recipe.bind_part(ImageConf, "data", "conf")
        home = VisionHome.of(_written(recipe), model_fn=options.model_fn, model_args=options.model_args)
        model = home.empty() if recipe.init == "random" else home.load()
        home = find_head_of(home, model, options.head_name)
        home = replace(home, input=conf.over(home.input))
        if options.head == "replace":
            classes = options.classes or read_images(recipe.path("data", "train")).classes
            self.head_change = replace_head_(
                model, home.head, old=home.classes, new=classes, seed=derive(recipe.run.seed, "head")
            )
            home = replace(home, classes=tuple(classes))
            self.notes = (str(self.head_change),)
        self.home = home
        return model

    def samples(self, recipe: Recipe, model: nn.Module, split: str) -> Samples:
        home = self.vision_home
        conf: ImageConf = recipe.bind_part(ImageConf, "data", "conf")
        augment = conf.augment if split == "train" else None
        if augment is not None:
            check_kornia(augment)
        return labelled(recipe.path("data", split), home, augment)

    def weights(self, model: nn.Module, batch: ImageBatch) -> Mapping[str, float]:
        return {"images": float(len(batch.keys))}

    def loss(self, model: nn.Module, batch: ImageBatch) -> PlainSums:
        logits = logits_of(model, batch.images).float()
        loss = F.cross_entropy(logits, batch.labels, reduction="sum", label_smoothing=self.options.label_smoothing)
        right = (logits.detach().argmax(-1) == batch.labels).sum()
        return PlainSums(
            {"cross_entropy": SumTerm(loss, "images")}, {"accuracy": (right, torch.tensor(float(len(batch.keys))))}
        )

    def evaluate(self, model: nn.Module, samples: Samples, batches: Iterator[ImageBatch]) -> Evaluation:
        return evaluate(model, self.vision_home.classes, batches)

    def export(self, model: nn.Module, folder: Path) -> None:
        if has_adapters(model):
            model = merged_copy(model)
        before = dict(self.vision_home.empty().named_modules())
        # Only what the plan made differs from what the architecture builds: its GroupNorm layers.
        changed = tuple(
            path
            for path, module in model.named_modules()
            if original_class(module) is nn.GroupNorm and not isinstance(before.get(path), nn.GroupNorm)
        )
        home = replace(self.vision_home, groupnorm=(*self.vision_home.groupnorm, *changed))
        home.export(model, folder)

    @property
    def vision_home(self) -> VisionHome:
        if self.home is None:
            raise RuntimeError("the task has built no model yet")
        return self.home


def labelled(path: Path, home: VisionHome, augment: Any = None) -> ImageSamples:
    """The images at `path` with the classes of a model. Raises DataError for a class that the model does not have.

    Classes are matched by name. A model whose classes are only numbered takes them in order, if there are as many.
    """
    images = read_images(path)
    number = {name: i for i, name in enumerate(home.classes)}
    unknown = [name for name in images.classes if name not in number]
    labels: Sequence[int]
    if not unknown:
        labels = [number[name] for name in images.classes]
    elif not home.names_its_classes and len(images.classes) == len(home.classes):
        labels = range(len(images.classes))
    else:
        near = near_names(unknown[0], list(home.classes))
        raise DataError(
            f"the model has no class {unknown[0]!r} ({len(unknown)} such of {len(images.classes)}); it has "
            f"{', '.join(home.classes[:8])}{' ...' if len(home.classes) > 8 else ''}",
            where=str(path),
            fix=(f"did you mean {near[0]!r}? " if near else "")
            + "give a model trained for these classes, or train one with options.head: replace",
        )
    return ImageSamples(images, home.input, labels=labels, augment=augment)


@torch.no_grad()
def evaluate(model: nn.Module, classes: Sequence[str], batches: Iterator[ImageBatch]) -> Evaluation:
    """Top-1 and top-5 accuracy, mean cross-entropy, and a row an image: label, prediction, probability, loss.

    top5 is left out where there are no more than five classes.
    """
    rows: list[dict[str, Any]] = []
    inside = 0
    for batch in batches:
        logits = logits_of(model, batch.images).float().cpu()
        labels = batch.labels.cpu()
        losses = F.cross_entropy(logits, labels, reduction="none")
        chances = logits.softmax(-1)
        best = logits.topk(min(TOP, logits.shape[-1]), dim=-1).indices
        inside += int((best == labels[:, None]).any(-1).sum())
        for i, key in enumerate(batch.keys):
            label, said = int(labels[i]), int(best[i, 0])
            rows.append(
                {
                    "key": key,
                    "label": classes[label],
                    "predicted": classes[said],
                    "probability": float(chances[i, said]),
                    "label_probability": float(chances[i, label]),
                    "loss": float(losses[i]),
                }
            )
    count = len(rows)
    if not count:
        raise DataError("no image could be read", fix="look at the reasons given for the bad samples")
    metrics = {
        "accuracy": sum(row["label"] == row["predicted"] for row in rows) / count,
        "loss": sum(row["loss"] for row in rows) / count,
    }
    if len(classes) > TOP:
        metrics["top5"] = inside / count
    metrics["images"] = float(count)
    return Evaluation(metrics, rows)


def confusion(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> Tensor:
    """How often an image of class i was taken for class j: (classes, classes) int64."""
    number = {name: i for i, name in enumerate(classes)}
    table = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    for row in rows:
        table[number[row["label"]], number[row["predicted"]]] += 1
    return table


def _written(recipe: Recipe) -> Path:
    """What `model` names; of a run its result, which must be there."""
    path = recipe.path("model")
    run = RunDirectory(path)
    if not run.begun:
        return path
    if not run.finished:
        raise RecipeError(
            "the run has no result yet", where=recipe.where("model"), fix=f"finish it: thawline resume {path}"
        )
    return run.model
