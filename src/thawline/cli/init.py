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
@click.option(
    "--continue",
    "tag",
    is_flag=False,
    flag_value="newest",
    metavar="[TAG]",
    help="Go on with the WeNet training in MODEL: from its newest checkpoint, or from TAG (epoch_12, step_9999).",
)
@click.option("-o", "--out", default="recipe.yaml", show_default=True, help="The recipe to write.")
@json_option
def init(model: str, train: str, valid: str, tag: str | None, out: str, as_json: bool) -> None:
    """Write a commented recipe that fine-tunes MODEL (a WeNet or Hugging Face directory), or goes on training it."""
    from thawline.tasks.foreign import WenetRun
    from thawline.tasks.starter import continuing_recipe, shell_word, starter_recipe
    from thawline.train.rundir import write_text

    target = Path(out)
    if target.exists():
        raise RecipeError(f"{out!r} exists already", fix="give another name with --out")
    if tag is None:
        text = starter_recipe(Path(model).absolute(), train=train, valid=valid, name=out)
        write_text(target, text)
        give({"recipe": str(target)}, f"wrote {target}\n  next: thawline plan {shell_word(target)}", as_json=as_json)
        return
    run = WenetRun.open(Path(model).absolute(), tag)
    write_text(target, continuing_recipe(run, train=train, valid=valid, name=out))
    said = "".join(f"\n    {term}" for term in run.terms())
    give(
        {"recipe": str(target), "tag": run.tag, "grade": "CONTINUES", "terms": run.terms()},
        f"wrote {target}\n  goes on from {run.tag}: CONTINUES{said}\n  next: thawline train {shell_word(target)}",
        as_json=as_json,
    )
