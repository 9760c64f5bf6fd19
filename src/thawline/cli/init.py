"""`thawline init`."""

from __future__ import annotations

from pathlib import Path

import click

from thawline.cli.app import json_option
from thawline.cli.output import give
from thawline.errors import RecipeError


@click.command()
@click.argument("model", type=click.Path())
@click.option("--train", default="train.list", show_default=True, help="Training data, relative to the recipe.")
@click.option("--valid", default="dev.list", show_default=True, help="Held-back data.")
@click.option("-o", "--out", default="recipe.yaml", show_default=True, help="The recipe to write.")
@json_option
def init(model: str, train: str, valid: str, out: str, as_json: bool) -> None:
    """Write a commented recipe that fine-tunes MODEL (a WeNet or Hugging Face directory)."""
    from thawline.tasks.starter import starter_recipe

    target = Path(out)
    if target.exists():
        raise RecipeError(f"{out!r} exists already", fix="give another name with --out")
    text = starter_recipe(Path(model).absolute(), train=train, valid=valid, name=out)
    target.write_text(text, encoding="utf-8")
    give({"recipe": str(target)}, f"wrote {target}\n  next: thawline plan {target}", as_json=as_json)
