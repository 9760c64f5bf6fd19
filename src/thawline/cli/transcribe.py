"""`thawline transcribe`."""

from __future__ import annotations

import click

from thawline.cli.app import json_option
from thawline.cli.output import give


@click.command()
@click.argument("model", type=click.Path())
@click.argument("audio", nargs=-1, required=True, type=click.Path())
@click.option("--base", type=click.Path(), help="The base that a delta belongs to.")
@click.option("--mode", default="", help="ctc_greedy_search, ctc_prefix_beam_search, attention, attention_rescoring.")
@click.option("--beam", default=1, show_default=True, help="Hypotheses kept.")
@click.option("--language", default="", help="What a multilingual model is prompted with, e.g. en or zh.")
@json_option
def transcribe(
    model: str, audio: tuple[str, ...], base: str | None, mode: str, beam: int, language: str, as_json: bool
) -> None:
    """Turn AUDIO files into text with MODEL (a model directory, a run, or a delta with --base)."""
    from thawline.tasks.recognition import Recognizer

    recognizer = Recognizer.open(model, base=base, language=language, mode=mode, beam=beam)
    rows = [{"file": path, "text": text} for path, text in zip(audio, recognizer.transcribe(audio), strict=True)]
    text = rows[0]["text"] if len(rows) == 1 else "\n".join(f"{row['file']}\t{row['text']}" for row in rows)
    give({"transcripts": rows}, text, as_json=as_json)
