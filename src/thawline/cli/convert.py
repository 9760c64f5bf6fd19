"""`thawline convert` and `thawline verify`."""

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
@click.option("--to", required=True, help="safetensors, torch, wenet, whisper, hf or delta.")
@click.option("--base", type=click.Path(), help="The base that a run or a delta belongs to.")
@click.option("--dtype", help="fp32, fp16 or bf16 for every floating tensor.")
@click.option("--only", default="weights", show_default=True, help="weights or ema.")
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
    only: str,
    rename: str | None,
    max_memory: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Turn any checkpoint SRC into DST, verified by reading it again. SRC is never changed."""
    from thawline.ckpt.convert import convert as run
    from thawline.core.config import read_yaml

    report = run(
        Path(source),
        Path(target),
        to=to,
        base=Path(base) if base is not None else None,
        dtype=dtype,
        only=only,
        rename=None if rename is None else read_yaml(rename).data,
        force=force,
        max_memory=None if max_memory is None else _bytes(max_memory),
    )
    give(report.to_json(), report.table(), as_json=as_json)


def _bytes(text: str) -> int:
    """`500MB`, `1.5GB` or a plain number as bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgG]?)[bB]?\s*", text)
    if found is None:
        raise RecipeError(f"{text!r} is not an amount of memory", where="--max-memory", fix="e.g. 500MB")
    return int(float(found[1]) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}[found[2].lower()])


@click.command()
@click.argument("path", type=click.Path())
@json_option
def verify(path: str, as_json: bool) -> None:
    """Check any checkpoint at PATH for damage: sizes, digests, structure."""
    from thawline.ckpt.verify import verify as run

    report = run(Path(path))
    give(report.to_json(), report.table(), as_json=as_json)
