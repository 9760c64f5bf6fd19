"""`thawline diff`."""

from __future__ import annotations

import click

from thawline.cli.app import json_option
from thawline.cli.output import give


@click.command()
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--base", type=click.Path(), help="The base of a delta among the two.")
@json_option
def diff(a: str, b: str, base: str | None, as_json: bool) -> None:
    """Which tensors differ between A and B (checkpoints, runs, model directories), by block, and how much.

    Exit code 1 if any value differs, 0 if none.
    """
    from thawline.tasks.comparing import compare

    found = compare(a, b, base=base)
    give(found.to_json(), found.table(), as_json=as_json)
    if found.differs:
        click.get_current_context().exit(1)
