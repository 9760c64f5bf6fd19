"""`thawline transcribe`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from thawline.cli.app import json_option
from thawline.cli.decoding import decoding_options
from thawline.cli.output import give, refuse_unwritable, say


@click.command()
@click.argument("model", type=click.Path())
@click.argument("audio", nargs=-1, required=True, metavar="AUDIO...", type=click.Path())
@click.option("--base", type=click.Path(), help="The base that a delta belongs to.")
@decoding_options
@click.option("--times", is_flag=True, help="Times of words and tokens; printed with --json.")
@click.option("--srt", is_flag=True, help="Print SubRip subtitles.")
@click.option("--vtt", is_flag=True, help="Print WebVTT subtitles.")
@click.option("--out", type=click.Path(), help="Write subtitles into this folder, which is made, one file a recording.")
@click.option(
    "--max-minutes",
    type=click.FloatRange(0, min_open=True),
    default=120.0,
    show_default=True,
    help="Refuse longer recordings.",
)
@click.option(
    "--batch", "batch_size", type=click.IntRange(1), default=8, show_default=True, help="Recordings decoded at once."
)
@json_option
def transcribe(
    model: str,
    audio: tuple[str, ...],
    base: str | None,
    times: bool,
    srt: bool,
    vtt: bool,
    out: str | None,
    max_minutes: float,
    batch_size: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Turn AUDIO into text with MODEL (a model directory, a run, or a delta with --base).

    AUDIO is a file, or a folder: then every audio file below it, sorted by name. A data set with its texts (a list, a
    table, a Kaldi directory) is for `thawline evaluate`.
    """
    if srt + vtt + as_json > 1:
        raise click.UsageError("--json, --srt and --vtt exclude each other")
    if out is not None and not (srt or vtt):
        raise click.UsageError("--out is for --srt or --vtt")
    from thawline.tasks.recordings import recordings, targets

    files = recordings(audio)
    if (srt or vtt) and out is None and len(files) > 1:
        raise click.UsageError("subtitles of several recordings need a folder: --out DIR")
    suffix = ".srt" if srt else ".vtt"
    refuse_unwritable(folder=out)
    places = [None] * len(files) if out is None else targets(files, audio, Path(out), suffix)
    from thawline.tasks.recognition import Recognizer
    from thawline.tasks.transcript import subrip, webvtt
    from thawline.train.rundir import write_text

    recognizer = Recognizer.open(model, base=base, **options)
    for note in recognizer.notes:
        print(f"note: {note}", file=sys.stderr)
    named = len(files) > 1 or Path(audio[0]).is_dir()
    wanted = recognizer.transcripts(files, times=times or srt or vtt, batch_size=batch_size, limit_s=60.0 * max_minutes)
    rows = []
    for found, target in zip(wanted, places, strict=True):
        for note in found.notes:
            print(f"note: {found.file}: {note}", file=sys.stderr)
        if srt or vtt:
            text = subrip(found.cues()) if srt else webvtt(found.cues())
            if target is None:
                say(text.rstrip("\n"))
            else:
                write_text(target, text)
                say(str(target))
        elif as_json:
            rows.append(found.to_json())
        else:
            say(f"{found.file}\t{found.text}" if named else found.text)
    if as_json:
        give({"transcripts": rows}, "", as_json=True)
