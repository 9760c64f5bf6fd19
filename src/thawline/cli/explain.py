"""`thawline explain`."""

from __future__ import annotations

import click

from thawline.cli.app import json_option
from thawline.cli.output import give


@click.command()
@click.argument("word")
@json_option
def explain(word: str, as_json: bool) -> None:
    """Say more about WORD: an exit code (4), an error (BaseMismatch), a finding (norm-drifts), a grade (EXACT)."""
    from thawline.tasks.explaining import explain as page_about

    page = page_about(word)
    give(page.to_json(), page.text(), as_json=as_json)
