"""Where a run's classifier is wrong: its confusion matrix and its worst mistakes, as plain data for the report."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thawline.core.extras import need
from thawline.data.image import Pixels, read_images
from thawline.errors import ThawlineError
from thawline.tasks.kinds import kind_of
from thawline.tasks.vision import confusion
from thawline.tasks.vision_classifier import Classifier
from thawline.tasks.vision_home import VisionHome
from thawline.train.evaluation import best_step
from thawline.train.held_back import kept_rows
from thawline.train.recipe import Recipe, read_recipe
from thawline.train.rundir import RunDirectory, read_rows
from thawline.train.task import Evaluation

_SIDE = 96
"""Largest side of a picture on the page, in pixels."""


def review_run(directory: Path, *, mistakes: int = 36) -> Mapping[str, Any] | None:
    """What the run's model made of its held-back images: as the run wrote it down, or else scored anew.

    Returns {"data", "metrics", "classes", "confusion", "mistakes"}, or {"missing": why}, or None for another task. The
    mistakes are the wrong answers with the largest loss, each with its picture as a data address.
    """
    files = RunDirectory(directory.absolute())
    if not files.begun or kind_of(directory) != "vision":
        return None
    recipe = read_recipe(files.recipe)
    if recipe.data.valid is None:
        return {"missing": "The recipe names no held-back images (data.valid)."}
    path = recipe.path("data", "valid")
    try:
        images = read_images(path)
        number = {images.key(i): i for i in range(len(images))}
        classes, result = _written_down(files, recipe) or _scored_anew(directory, path)
        if not all(row["key"] in number for row in result.rows):  # the images are others by now
            classes, result = _scored_anew(directory, path)
    except ThawlineError as exc:
        return {"missing": f"The model could not be scored: {exc}"}
    wrong = sorted((row for row in result.rows if row["label"] != row["predicted"]), key=lambda row: -row["loss"])
    return {
        "data": str(path),
        "metrics": dict(result.metrics),
        "classes": list(classes),
        "confusion": confusion(result.rows, classes).tolist(),
        "mistakes": [{**row, "image": _picture(images.pixels(number[row["key"]]))} for row in wrong[:mistakes]],
    }


def _written_down(files: RunDirectory, recipe: Recipe) -> tuple[tuple[str, ...], Evaluation] | None:
    """The classes of the exported model and the run's own evaluation of it; None where its rows are not kept, and where
    the run was taken up again since."""
    turns = [event["event"] for event in read_rows(files.events) if event["event"] in ("finished", "resumed")]
    scores = [row for row in read_rows(files.metrics) if any(name.startswith("valid/") for name in row)]
    if turns[-1:] != ["finished"] or not scores:
        return None
    best = best_step(recipe, scores)
    step = scores[-1]["step"] if best is None else best
    rows = kept_rows(files, step)
    if not rows:
        return None
    score = next(row for row in scores if row["step"] == step)
    metrics = {name.removeprefix("valid/"): value for name, value in score.items() if name.startswith("valid/")}
    return VisionHome.of(files.model).classes, Evaluation(metrics, rows)


def _scored_anew(directory: Path, data: Path) -> tuple[tuple[str, ...], Evaluation]:
    classifier = Classifier.open(directory)
    return classifier.home.classes, classifier.evaluate(data)


def _picture(pixels: Pixels) -> str:
    """A small PNG as a data address."""
    image = need("PIL.Image", extra="vision").fromarray(pixels)
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
