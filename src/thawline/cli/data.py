"""`thawline data`."""

from __future__ import annotations

from pathlib import Path

import click

from thawline.cli.app import json_option
from thawline.cli.output import give


@click.group()
def data() -> None:
    """Look at data before training on them."""


@data.command()
@click.argument("path", type=click.Path())
@click.option("--valid", type=click.Path(), help="Held-back data: also look for what stands in both.")
@click.option("--units", type=click.Path(), help="A WeNet units.txt: also count what it cannot spell.")
@json_option
def check(path: str, valid: str | None, units: str | None, as_json: bool) -> None:
    """Format, utterances, hours, lengths, vocabulary, and every file that cannot be read."""
    from thawline.data.check import check_data

    report = check_data(
        Path(path), valid=None if valid is None else Path(valid), units=None if units is None else Path(units)
    )
    give(report.to_json(), report.table(), as_json=as_json)
