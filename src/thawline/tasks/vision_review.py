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
from thawline.train.recipe import read_recipe
from thawline.train.rundir import RunDirectory

_SIDE = 96
"""Largest side of a picture on the page, in pixels."""


def review_run(directory: Path, *, mistakes: int = 36) -> Mapping[str, Any] | None:
    """Score the run's model on its held-back images once more.

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
        classifier = Classifier.open(directory)
        result = classifier.evaluate(path)
        images = read_images(path)
    except ThawlineError as exc:
        return {"missing": f"The model could not be scored: {exc}"}
    number = {images.key(i): i for i in range(len(images))}
    wrong = sorted((row for row in result.rows if row["label"] != row["predicted"]), key=lambda row: -row["loss"])
    return {
        "data": str(path),
        "metrics": dict(result.metrics),
        "classes": list(classifier.home.classes),
        "confusion": confusion(result.rows, classifier.home.classes).tolist(),
        "mistakes": [{**row, "image": _picture(images.pixels(number[row["key"]]))} for row in wrong[:mistakes]],
    }


def _picture(pixels: Pixels) -> str:
    """A small PNG as a data address."""
    image = need("PIL.Image", extra="vision").fromarray(pixels)
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
