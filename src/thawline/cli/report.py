"""`thawline report`."""

from __future__ import annotations

from pathlib import Path

import click

from thawline.cli.app import json_option
from thawline.cli.output import give


@click.command()
@click.argument("directory", metavar="RUN", type=click.Path())
@click.option("--out", type=click.Path(), help="Where the page goes. Default: RUN/report.html.")
@click.option(
    "--review/--no-review",
    default=True,
    help="Show where a classifier is wrong; a run whose own figures are not kept is scored anew.",
)
@json_option
def report(directory: str, out: str | None, review: bool, as_json: bool) -> None:
    """Write one self-contained page about RUN: curves, phases, what changed, and where the model is wrong."""
    page = leave(Path(directory), out=None if out is None else Path(out), review=review)
    give({"report": str(page)}, f"wrote {page}", as_json=as_json)


def leave(directory: Path, *, out: Path | None = None, review: bool = True) -> Path:
    """Write the page of a run, finished or not; where it lies."""
    from thawline.report.page import write_page
    from thawline.tasks.vision_review import review_run

    return write_page(directory, out=out, review=review_run(directory) if review else None)
