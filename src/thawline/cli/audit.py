"""`thawline audit`."""

from __future__ import annotations

from pathlib import Path

import click

from thawline.cli.app import json_option
from thawline.cli.output import give


@click.command()
@click.argument("directory", metavar="RUN", type=click.Path())
@click.option("--base", type=click.Path(), help="The base, where it is no longer where the run found it.")
@json_option
def audit(directory: str, base: str | None, as_json: bool) -> None:
    """Prove from the files of RUN that only what its plan names differs from the base, bit for bit.

    Exit code 5 if anything else does.
    """
    from thawline.tasks.auditing import audit_run

    report = audit_run(Path(directory), base=None if base is None else Path(base))
    give(report.to_dict(), report.table(), as_json=as_json)
    report.raise_if_broken()
