"""`thawline convert`."""

from __future__ import annotations

import re
from pathlib import Path

import click

from thawline.cli.app import json_option
from thawline.cli.output import give
from thawline.errors import RecipeError


@click.command()
@click.argument("source", metavar="SRC", type=click.Path())
@click.argument("target", metavar="DST", type=click.Path())
@click.option("--to", required=True, help="safetensors, torch, wenet, whisper, hf, videochat2 or delta.")
@click.option("--base", type=click.Path(), help="The base that a run, a delta or an adapter belongs to.")
@click.option("--dtype", help="fp32, fp16 or bf16 for every floating tensor.")
@click.option("--only", type=click.Choice(["weights", "ema"]), help="The weights as trained, or their averages.")
@click.option("--tag", help="Which of several: a DeepSpeed tag, epoch_3, step-00001200; the weights' key of a DCP.")
@click.option("--rename", type=click.Path(), help="A YAML mapping of names or patterns.")
@click.option("--max-memory", help="A bound on memory, e.g. 500MB.")
@click.option("--force", is_flag=True, help="Replace an existing DST.")
@json_option
def convert(
    source: str,
    target: str,
    to: str,
    base: str | None,
    dtype: str | None,
    only: str | None,
    tag: str | None,
    rename: str | None,
    max_memory: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Turn any checkpoint SRC into DST, verified by reading it again. SRC is never changed.

    Both may be URLs (s3://bucket/...), with the extra `remote`.
    """
    from thawline.ckpt.convert import convert as run
    from thawline.ckpt.rename import read_rename_table

    report = run(
        source,
        target,
        to=to,
        base=base,
        dtype=dtype,
        only=only,
        tag=tag,
        rename=None if rename is None else read_rename_table(Path(rename)),
        force=force,
        max_memory=None if max_memory is None else _bytes(max_memory),
    )
    give(report.to_json(), report.table(), as_json=as_json)


def _bytes(text: str) -> int:
    """`500MB`, `1.5GB` or a plain number as bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgG]?)[bB]?\s*", text)
    if found is None:
        raise RecipeError(f"{text!r} is not an amount of memory", where="--max-memory", fix="e.g. 500MB")
    amount = int(float(found[1]) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[found[2].lower()])
    if not amount:
        raise RecipeError(f"{text!r} is no memory at all", where="--max-memory", fix="e.g. 500MB")
    return amount
