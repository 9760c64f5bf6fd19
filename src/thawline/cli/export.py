"""`thawline export`."""

from __future__ import annotations

import click

from thawline.cli.app import json_option
from thawline.cli.output import give


@click.command()
@click.argument("run", type=click.Path())
@click.argument("target", metavar="DST", type=click.Path())
@click.option("--to", help="safetensors, torch, wenet, whisper, hf, peft or videochat2. Default: the base's own form.")
@click.option("--step", type=int, help="Of this kept checkpoint rather than the result.")
@click.option("--only", type=click.Choice(["weights", "ema"]), help="The weights as trained, or their averages.")
@click.option("--base", type=click.Path(), help="Where the base is now, if it has moved.")
@click.option("--dtype", help="fp32, fp16 or bf16 for every floating tensor.")
@click.option("--force", is_flag=True, help="Replace an existing DST.")
@json_option
def export(
    run: str,
    target: str,
    to: str | None,
    step: int | None,
    only: str | None,
    base: str | None,
    dtype: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write what RUN has made as a model DST that stands alone: adapters merged, configuration beside the weights."""
    from thawline.tasks.exporting import export as make

    report = make(run, target, to=to, step=step, only=only, base=base, dtype=dtype, force=force)
    give(report.to_json(), report.table(), as_json=as_json)
