"""`thawline average`."""

from __future__ import annotations

import click

from thawline.cli.app import json_option
from thawline.cli.output import give


@click.command()
@click.argument("run", type=click.Path())
@click.argument("target", metavar="DST", type=click.Path())
@click.option("--last", type=click.IntRange(1), metavar="N", help="The newest N.")
@click.option("--best", type=click.IntRange(1), metavar="N", help="The N with the best evaluations.")
@click.option("--step", "steps", type=int, multiple=True, help="Exactly this one; may be given several times.")
@click.option("--to", help="safetensors, torch, wenet, whisper or hf. Default: the base's own form.")
@click.option("--only", type=click.Choice(["weights", "ema"]), help="Average the weights as trained, or their EMA.")
@click.option("--base", type=click.Path(), help="Where the base is now, if it has moved.")
@click.option("--dtype", help="fp32, fp16 or bf16 for every floating tensor.")
@click.option("--force", is_flag=True, help="Replace an existing DST.")
@json_option
def average(
    run: str,
    target: str,
    last: int | None,
    best: int | None,
    steps: tuple[int, ...],
    to: str | None,
    only: str | None,
    base: str | None,
    dtype: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write the mean of checkpoints of RUN (or of a folder with WeNet's epoch_N.pt) as one model DST.

    Integer buffers stay integers. Of a run with LoRA the merged weights are averaged.
    """
    from thawline.tasks.averaging import average as make

    report = make(run, target, last=last, best=best, steps=steps, to=to, only=only, base=base, dtype=dtype, force=force)
    give(report.to_json(), report.table(), as_json=as_json)
