"""`thawline plan`."""

from __future__ import annotations

from pathlib import Path

import click

from thawline.cli.app import json_option
from thawline.cli.output import give


@click.command()
@click.argument("target", metavar="RECIPE|MODEL", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--train", multiple=True, metavar="SELECTOR", help="With a MODEL: what would train.")
@click.option("--preset", help="With a MODEL: a plan by name, e.g. head-only.")
@click.option(
    "--like",
    type=click.Choice(["wenet", "ask-anything", "ms-swift"]),
    help="With a MODEL: read KEY=VALUE as that tool's switches, and print the plan they mean.",
)
@json_option
def plan(
    target: str,
    overrides: tuple[str, ...],
    train: tuple[str, ...],
    preset: str | None,
    like: str | None,
    as_json: bool,
) -> None:
    """Show what a recipe would train: blocks, parameters, rates, phases, memory, and the doctor's findings.

    Nothing is trained. With a model directory or a weights file, --train, --preset or --like says the plan, e.g.
    thawline plan exp --like wenet freeze_modules=encoder,ctc
    """
    from thawline.tasks.planning import preview

    shown = preview(Path(target), list(overrides), train=train, preset=preset, like=like)
    give(shown.to_json(), shown.text(), as_json=as_json)
