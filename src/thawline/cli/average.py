"""`thawline average`."""

from __future__ import annotations

from typing import Any

import click

from thawline.cli.app import json_option
from thawline.cli.making import making_options
from thawline.cli.output import give


@click.command()
@click.argument("run", type=click.Path())
@click.argument("target", metavar="DST", type=click.Path())
@click.option("--last", type=click.IntRange(1), metavar="N", help="The newest N.")
@click.option("--best", type=click.IntRange(1), metavar="N", help="The N with the best evaluations.")
@click.option("--step", "steps", type=int, multiple=True, help="Exactly this one; may be given several times.")
@click.option("--to", help="safetensors, torch, wenet, whisper or hf. Default: the base's own form.")
@making_options
@json_option
def average(run: str, target: str, as_json: bool, **options: Any) -> None:
    """Write the mean of checkpoints of RUN (or of a folder with WeNet's epoch_N.pt) as one model DST.

    Integer buffers stay integers. Of a run with LoRA the merged weights are averaged.
    """
    from thawline.tasks.averaging import average as make

    report = make(run, target, **options)
    give(report.to_json(), report.table(), as_json=as_json)
