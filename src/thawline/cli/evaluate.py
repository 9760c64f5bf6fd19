"""`thawline evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from thawline.cli.app import json_option
from thawline.cli.decoding import decoding_options
from thawline.cli.output import give, json_text, refuse_unwritable, say

if TYPE_CHECKING:
    from thawline.train.task import Evaluation


@click.command()
@click.argument("model", type=click.Path())
@click.argument("data", type=click.Path())
@click.option("--base", type=click.Path(), help="The base that a delta belongs to.")
@decoding_options
@click.option(
    "--normalizer",
    type=click.Choice(["none", "basic", "english"]),
    help="Folds both sides before scoring; default none.",
)
@click.option(
    "--allow-pipes", is_flag=True, default=None, help="Speech: run the shell commands that a Kaldi wav.scp names."
)
@click.option(
    "--batch", "batch_size", type=click.IntRange(1), default=8, show_default=True, help="Utterances decoded at once."
)
@click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help="Loader processes.")
@click.option("--limit", type=click.IntRange(1), help="Only the first so many utterances.")
@click.option("--out", type=click.Path(), help="Write one JSON line an utterance: key, ref, hyp, alignment, ...")
@click.option("--html", type=click.Path(), help="Speech: write a page with each alignment beside its sound.")
@json_option
def evaluate(
    model: str,
    data: str,
    base: str | None,
    normalizer: str | None,
    batch_size: int,
    workers: int,
    limit: int | None,
    out: str | None,
    html: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Score MODEL (a model directory, a run, or a delta with --base) on DATA: word and character error rate,
    the accuracy of an image classifier, loss and token accuracy of a video-chat model on an instruction file, or how
    often a caption finds its clip (stage 1 of VideoChat2)."""
    from thawline.tasks.kinds import kind_of

    refuse_unwritable(out, html)
    kind = kind_of(model, base)
    options["normalizer"] = normalizer
    if kind == "speech":
        _recogniser(_Question(model, data, base, batch_size, workers, limit, out, as_json), html, options)
        return
    meant = [name for name, value in {**options, "html": html}.items() if value]
    if meant:
        raise click.UsageError(f"--{meant[0].replace('_', '-')} means nothing to a {kind} model")
    judges = {"vision": _classifier, "videochat": _chat_model, "videochat_stage1": _caption_finder}
    judges[kind](_Question(model, data, base, batch_size, workers, limit, out, as_json))


@dataclass(frozen=True, slots=True)
class _Question:
    """What is asked of a model of any kind."""

    model: str
    data: str
    base: str | None
    batch_size: int
    workers: int
    limit: int | None
    out: str | None
    as_json: bool

    def put_to(self, model: Any, *, batch_size: int | None = None) -> Evaluation:
        """The answer of an opened model; its rows are written where they were asked for."""
        size = self.batch_size if batch_size is None else batch_size
        result: Evaluation = model.evaluate(self.data, batch_size=size, workers=self.workers, limit=self.limit)
        if self.out is not None:
            from thawline.train.rundir import write_text

            lines = "".join(f"{json_text(row)}\n" for row in result.rows)
            write_text(Path(self.out), lines)
        return result


def _recogniser(asked: _Question, html: str | None, options: Mapping[str, Any]) -> None:
    from thawline.tasks.recognition import Recognizer
    from thawline.tasks.speech_page import error_table

    recognizer = Recognizer.open(asked.model, base=asked.base, **options)
    for note in recognizer.notes:
        say(f"note: {note}", as_json=True)
    result = asked.put_to(recognizer)
    if html is not None:
        title = f"{Path(asked.model).name} on {asked.data}"
        _write_page(html, result, title, asked.data, allow_pipes=recognizer.options.allow_pipes)
    counts = ("utterances", "words", "unreadable")
    metrics: dict[str, Any] = {k: int(v) if k in counts else v for k, v in result.metrics.items()}
    table = error_table(result.rows)
    text = (
        f"WER {metrics['wer']:.4f}  CER {metrics['cer']:.4f}  over {metrics['utterances']} utterances, "
        f"{metrics['words']} words"
    )
    bad = [row for row in result.rows if row.get("unreadable")]
    if bad:
        text += f"\n{len(bad)} could not be read; their words count as deletions. First: {bad[0]['unreadable']}"
    for name, found in table.items():
        if found:
            common = ", ".join(f"{_confusion(row)} {row['count']}" for row in found[:8])
            text += f"\n{name:<11} {common}"
    give({**metrics, "errors": table}, text, as_json=asked.as_json)


def _confusion(row: Mapping[str, Any]) -> str:
    return f"{row['ref']} > {row['hyp']}" if row["ref"] and row["hyp"] else str(row["ref"] or row["hyp"])


def _write_page(html: str, result: Evaluation, title: str, data: str, *, allow_pipes: bool) -> None:
    from thawline.data.manifest import read_manifest
    from thawline.tasks.speech_page import evaluation_page
    from thawline.train.rundir import write_text

    utterances = {row.key: row for row in read_manifest(Path(data), allow_pipes=allow_pipes)}
    page = evaluation_page(result.rows, result.metrics, utterances, title=title)
    write_text(Path(html), page)


def _classifier(asked: _Question) -> None:
    from thawline.tasks.vision_classifier import Classifier

    result = asked.put_to(Classifier.open(asked.model, base=asked.base))
    metrics = {k: int(v) if k in ("images", "unreadable") else v for k, v in result.metrics.items()}
    top5 = f"  top-5 {metrics['top5']:.4f}" if "top5" in metrics else ""
    text = f"accuracy {metrics['accuracy']:.4f}{top5}  loss {metrics['loss']:.4f}  over {metrics['images']} images"
    give(metrics, text + _left_out(metrics), as_json=asked.as_json)


def _chat_model(asked: _Question) -> None:
    from thawline.tasks.videochat_asking import ChatModel

    one_a_row = 1 if asked.out is not None else None  # a row is a sample
    result = asked.put_to(ChatModel.open(asked.model, base=asked.base), batch_size=one_a_row)
    metrics = {k: v if k in ("loss", "accuracy") else int(v) for k, v in result.metrics.items()}
    text = (
        f"loss {metrics['loss']:.4f}  token accuracy {metrics['accuracy']:.4f}  over {metrics['samples']} samples, "
        f"{metrics['tokens']} tokens"
    )
    give(metrics, text + _left_out(metrics), as_json=asked.as_json)


def _caption_finder(asked: _Question) -> None:
    from thawline.tasks.videochat_finding import CaptionFinder

    result = asked.put_to(CaptionFinder.open(asked.model, base=asked.base))
    metrics = {k: int(v) if k in ("samples", "unreadable") else v for k, v in result.metrics.items()}
    text = (
        f"recall@1 {metrics['recall1']:.4f}  recall@5 {metrics['recall5']:.4f}  loss {metrics['loss']:.4f}  over "
        f"{metrics['samples']} captions"
    )
    give(metrics, text + _left_out(metrics), as_json=asked.as_json)


def _left_out(metrics: Mapping[str, Any]) -> str:
    return f"\n{metrics['unreadable']} could not be read and are not in these figures" if metrics["unreadable"] else ""
