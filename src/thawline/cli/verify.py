"""`thawline verify`."""

from __future__ import annotations

import click

from thawline.cli.app import json_option
from thawline.cli.output import give


@click.command()
@click.argument("path", type=click.Path())
@click.option("--base", type=click.Path(), help="The base that a run, a delta or an adapter belongs to.")
@click.option("--tag", help="Which of several: a DeepSpeed tag, epoch_3, step-00001200; the weights' key of a DCP.")
@json_option
def verify(path: str, base: str | None, tag: str | None, as_json: bool) -> None:
    """Check any checkpoint at PATH (or a URL) for damage: sizes, digests, structure. Exit code 4 where it has some."""
    from thawline.ckpt.verify import verify as run

    report = run(path, base=base, tag=tag)
    give(report.to_json(), report.table(), as_json=as_json)
    if not report.ok:
        click.get_current_context().exit(4)
