"""`thawline predict`."""

from __future__ import annotations

import click

from thawline.cli.app import json_option
from thawline.cli.output import give


@click.command()
@click.argument("model", type=click.Path())
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...", type=click.Path())
@click.option("--base", type=click.Path(), help="The base of a run, where it is no longer where the run found it.")
@click.option("--top", default=5, show_default=True, type=click.IntRange(min=1), help="Classes given for each image.")
@json_option
def predict(model: str, images: tuple[str, ...], base: str | None, top: int, as_json: bool) -> None:
    """Say what IMAGES show, with MODEL (a model directory, a run, or a checkpoint in one)."""
    from thawline.tasks.vision_classifier import Classifier

    guesses = Classifier.open(model, base=base).predict(images, top=top)
    rows = [
        {"file": g.file, "classes": [{"class": name, "probability": chance} for name, chance in g.classes]}
        for g in guesses
    ]
    text = "\n".join(f"{g.file}\t" + "  ".join(f"{name} {chance:.3f}" for name, chance in g.classes) for g in guesses)
    give({"predictions": rows}, text, as_json=as_json)
