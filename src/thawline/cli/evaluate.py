"""`thawline evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from thawline.cli.app import json_option
from thawline.cli.output import give


@click.command()
@click.argument("model", type=click.Path())
@click.argument("data", type=click.Path())
@click.option("--base", type=click.Path(), help="The base that a delta belongs to.")
@click.option("--mode", default="", help="ctc_greedy_search, ctc_prefix_beam_search, attention, attention_rescoring.")
@click.option("--beam", default=1, show_default=True, help="Hypotheses kept.")
@click.option("--language", default="", help="What a multilingual model is prompted with, e.g. en or zh.")
@click.option("--normalizer", default="none", show_default=True, help="none, basic or english, on both sides.")
@click.option("--batch", "batch_size", default=8, show_default=True, help="Utterances decoded at once.")
@click.option("--workers", default=0, show_default=True, help="Loader processes.")
@click.option("--limit", type=int, help="Only the first so many utterances.")
@click.option("--out", type=click.Path(), help="Write one JSON line an utterance: key, ref, hyp, errors.")
@json_option
def evaluate(
    model: str,
    data: str,
    base: str | None,
    mode: str,
    beam: int,
    language: str,
    normalizer: str,
    batch_size: int,
    workers: int,
    limit: int | None,
    out: str | None,
    as_json: bool,
) -> None:
    """Score MODEL (a model directory, a run, or a delta with --base) on DATA: word and character error rate."""
    from thawline.tasks.recognition import Recognizer

    recognizer = Recognizer.open(model, base=base, language=language, normalizer=normalizer, mode=mode, beam=beam)
    result = recognizer.evaluate(data, batch_size=batch_size, workers=workers, limit=limit)
    if out is not None:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows)
        Path(out).write_text(lines, encoding="utf-8")
    metrics = {k: int(v) if k in ("utterances", "words") else v for k, v in result.metrics.items()}
    text = (
        f"WER {metrics['wer']:.4f}  CER {metrics['cer']:.4f}  over {metrics['utterances']} utterances, "
        f"{metrics['words']} words"
    )
    give(metrics, text, as_json=as_json)
