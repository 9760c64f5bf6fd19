"""`thawline export`."""

from __future__ import annotations

from typing import Any

import click

from thawline.cli.app import json_option
from thawline.cli.making import making_options
from thawline.cli.output import give


@click.command()
@click.argument("run", type=click.Path())
@click.argument("target", metavar="DST", type=click.Path())
@click.option("--to", help="safetensors, torch, wenet, whisper, hf, peft or videochat2. Default: the base's own form.")
@click.option("--step", type=int, help="Of this kept checkpoint rather than the result.")
@making_options
@json_option
def export(run: str, target: str, as_json: bool, **options: Any) -> None:
    """Write what RUN has made as a model DST that stands alone: adapters merged, configuration beside the weights."""
    from thawline.tasks.exporting import export as make

    report = make(run, target, **options)
    give(report.to_json(), report.table(), as_json=as_json)
