"""`thawline data`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import click

from thawline.cli.app import json_option
from thawline.cli.output import give


@click.group()
def data() -> None:
    """Look at data before training on them."""


@data.command(short_help="Look for what is wrong in a list.")
@click.argument("path", type=click.Path())
@click.option("--valid", type=click.Path(), help="Held-back data: also look for what stands in both.")
@click.option("--units", type=click.Path(), help="A WeNet units.txt: also count what it cannot spell.")
@click.option("--model", type=click.Path(), help="A recogniser: count what it cannot spell, and what CTC cannot align.")
@click.option(
    "--tokenizer", type=click.Path(), help="With --model: a folder with a Whisper's tokenizer.json, if it has none."
)
@click.option("--allow-pipes", is_flag=True, help="Run the shell commands that a Kaldi wav.scp names.")
@json_option
def check(
    path: str,
    valid: str | None,
    units: str | None,
    model: str | None,
    tokenizer: str | None,
    allow_pipes: bool,
    as_json: bool,
) -> None:
    """Format, utterances, hours, lengths, vocabulary, and every file that cannot be read."""
    from thawline.data.check import check_data

    if units is not None and model is not None:
        raise click.UsageError("--units and --model exclude each other: a model has units")
    if tokenizer is not None and model is None:
        raise click.UsageError("--tokenizer goes with --model")
    known: dict[str, Any] = {} if units is None else {"units": Path(units)}
    if model is not None:
        from thawline.tasks.loading import locate
        from thawline.tasks.speech_home import SpeechHome

        home = SpeechHome.of(locate(model).home, tokenizer=None if tokenizer is None else Path(tokenizer).absolute())
        known = {"tokenizer": home.tokenizer(), "frontend": home.frontend({}), "encoder_frames": home.encoder_frames}
    report = check_data(Path(path), valid=None if valid is None else Path(valid), allow_pipes=allow_pipes, **known)
    give(report.to_json(), report.table(), as_json=as_json)


@data.command(short_help="Write WeNet's units.txt.")
@click.argument("path", type=click.Path())
@click.option("-o", "--out", default="units.txt", show_default=True, type=click.Path(), help="The file to write.")
@click.option("--level", type=click.Choice(["char", "word"]), default="char", show_default=True, help="What a unit is.")
@click.option(
    "--min-count",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="What is seen less often is left to <unk>.",
)
@json_option
def units(path: str, out: str, level: Literal["char", "word"], min_count: int, as_json: bool) -> None:
    """Write WeNet's units.txt for the texts of PATH: what a recogniser that starts from nothing can spell."""
    from thawline.ckpt.store import atomic_file
    from thawline.data.manifest import read_manifest
    from thawline.data.text import build_units, units_text

    table = build_units((row.txt for row in read_manifest(Path(path))), level=level, min_count=min_count)
    with atomic_file(Path(out)) as file:
        file.write(units_text(table).encode())
    give({"units": out, "size": len(table)}, f"wrote {out}: {len(table)} units", as_json=as_json)


@data.command(short_help="Write global CMVN statistics.")
@click.argument("path", type=click.Path())
@click.option("-o", "--out", default="global_cmvn", show_default=True, type=click.Path(), help="The file to write.")
@click.option("--conf", type=click.Path(), help="A WeNet train.yaml: take the features of its dataset_conf.")
@json_option
def cmvn(path: str, out: str, conf: str | None, as_json: bool) -> None:
    """Write global CMVN statistics (WeNet's JSON) of the recordings of PATH."""
    from thawline.ckpt.store import atomic_file
    from thawline.core.config import bind, read_yaml
    from thawline.data.cmvn import cmvn_sums
    from thawline.data.manifest import read_manifest
    from thawline.data.speech import SpeechSamples
    from thawline.data.speech_frontend import SpeechFrontend

    frontend = SpeechFrontend() if conf is None else bind(SpeechFrontend, read_yaml(Path(conf)), ("dataset_conf",))
    sums = cmvn_sums(SpeechSamples(read_manifest(Path(path)), frontend, training=False))
    with atomic_file(Path(out)) as file:
        file.write(json.dumps(sums.to_json()).encode() + b"\n")
    text = [f"wrote {out}: {sums.frame_num} frames", *(f"  left out {r.key}: {r.reason}" for r in sums.left_out)]
    value = {"cmvn": out, "frames": sums.frame_num, "left_out": [r.key for r in sums.left_out]}
    give(value, "\n".join(text), as_json=as_json)


@data.command()
@click.argument("path", metavar="LIST", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--force", is_flag=True, help="Replace an existing OUT.")
@json_option
def table(path: str, out: str, force: bool, as_json: bool) -> None:
    """Write the utterances of LIST as an Arrow table (OUT.arrow) that is read where it lies, or as OUT.parquet.

    Durations that LIST does not say are measured, so that batches by frames need no look at the files any more.
    """
    from thawline.ckpt.store import atomic_file
    from thawline.data.durations import Durations
    from thawline.data.manifest import read_manifest
    from thawline.data.manifests.table_writing import is_parquet, write_table

    target = Path(out).absolute()
    parquet = is_parquet(target)
    manifest = read_manifest(Path(path))
    measured = Durations.of(manifest.path)
    with atomic_file(target, force=force) as file:
        made = write_table(manifest, file, folder=target.parent, parquet=parquet, seconds=measured.seconds)
    measured.keep()
    value = {
        "table": out,
        "utterances": made.rows,
        "hours": made.seconds / 3600,
        "format": "parquet" if parquet else "arrow",
    }
    value["unmeasured"] = [{"key": key, "reason": reason} for key, reason in made.unmeasured]
    text = [f"wrote {out}: {made.rows} utterances, {made.seconds / 3600:.2f} hours"]
    text += [f"  duration unknown: {reason}" for _, reason in made.unmeasured]
    give(value, "\n".join(text), as_json=as_json)
