"""`thawline runs`."""

from __future__ import annotations

from pathlib import Path

import click

from thawline.cli.app import json_option
from thawline.cli.output import give


@click.command()
@click.argument("folder", default="runs", type=click.Path())
@json_option
def runs(folder: str, as_json: bool) -> None:
    """List the runs in FOLDER (default: runs): how each stands, its last evaluation, its best, its size."""
    from thawline.tasks.listing import list_runs, table, to_json

    rows = list_runs(Path(folder))
    give(to_json(rows), table(rows), as_json=as_json)
