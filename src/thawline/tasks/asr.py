"""The speech task: WeNet and Whisper recognisers on recordings with transcripts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from thawline.core.config import Strict
from thawline.data.manifest import read_manifest
from thawline.data.speech import SpeechBatch, SpeechSamples
from thawline.data.text import Tokenizer
from thawline.freeze.lora import has_adapters, merged_copy
from thawline.tasks.loading import draw, load, locate
from thawline.tasks.scoring import Normalizer, alignment, normalizer, score
from thawline.tasks.speech_home import SpeechHome
from thawline.train.recipe import Recipe
from thawline.train.task import Evaluation, LossSums, Samples


class SpeechOptions(Strict):
    """`options` of a speech recipe, and of `evaluate` and `transcribe`."""

    language: str = ""
    """What a multilingual model is prompted with, e.g. en or zh; empty takes each row's own `lang`, else English."""
    task: Literal["transcribe", "translate"] = "transcribe"
    normalizer: Normalizer = "none"
    """How texts are made comparable before scoring: none, basic or english."""
    mode: str = ""
    """Decoding mode; empty takes ctc_greedy_search where the model has CTC, else attention."""
    beam: int = 1


class SpeechTask:
    """Fine-tuning a recogniser. Made anew for each run; remembers the run's home and options."""

    name = "speech"

    def __init__(self) -> None:
        self.options = SpeechOptions()
        self.home: SpeechHome | None = None

    def build(self, recipe: Recipe) -> nn.Module:
        self.options = recipe.bind_part(SpeechOptions, "options")
        place = locate(recipe.path("model"))
        self.home = SpeechHome.of(place.home)
        return draw(place.home) if recipe.init == "random" else load(recipe.path("model"))

    def samples(self, recipe: Recipe, model: nn.Module, split: str) -> Samples:
        home = self._home()
        training = split == "train"
        manifest = read_manifest(recipe.path("data", split))
        return SpeechSamples(manifest, home.frontend(recipe.data.conf), home.tokenizer(), training=training)

    def weights(self, model: Any, batch: SpeechBatch) -> Mapping[str, float]:
        weights: Mapping[str, float] = model.loss_weights(batch.target_lengths)
        return weights

    def loss(self, model: Any, batch: SpeechBatch) -> LossSums:
        sums: LossSums = model.loss_sums(
            batch.feats,
            batch.feats_lengths,
            batch.target,
            batch.target_lengths,
            languages=languages(batch, self.options),
            tasks=[self.options.task] * len(batch.keys),
        )
        return sums

    def evaluate(self, model: nn.Module, samples: Samples, batches: Iterator[Any]) -> Evaluation:
        return evaluate(model, self._home().tokenizer(), batches, self.options, loss=True)

    def export(self, model: nn.Module, folder: Path) -> None:
        self._home().export(merged_copy(model) if has_adapters(model) else model, folder)

    def _home(self) -> SpeechHome:
        if self.home is None:
            raise RuntimeError("the task has built no model yet")
        return self.home


def evaluate(
    model: Any, tokenizer: Tokenizer, batches: Iterator[SpeechBatch], options: SpeechOptions, *, loss: bool = False
) -> Evaluation:
    """Error rates of `model` over `batches` and a row an utterance; with `loss` also the objective and its parts."""
    rows: list[dict[str, Any]] = []
    total, weights, ratios = _Sums(), _Sums(), _Sums()
    for batch in batches:
        hypotheses = decode(model, batch, options)
        for key, reference, tokens in zip(batch.keys, batch.texts, hypotheses, strict=True):
            rows.append({"key": key, "ref": reference, "hyp": tokenizer.decode(tokens).strip()})
        if loss:
            sums = model.loss_sums(
                batch.feats,
                batch.feats_lengths,
                batch.target,
                batch.target_lengths,
                languages=languages(batch, options),
                tasks=[options.task] * len(batch.keys),
            )
            for term in sums.terms.values():
                total.add(term.per, float(term.sum))
            for name, weight in model.loss_weights(batch.target_lengths).items():
                weights.add(name, weight)
            for name, (part, count) in sums.metrics.items():
                ratios.add(name, float(part))
                ratios.add(f"{name}/count", float(count))
    normalize = normalizer(options.normalizer)
    metrics = dict(score([r["ref"] for r in rows], [r["hyp"] for r in rows], normalize=normalize))
    if loss:
        metrics["loss"] = sum(value / weights[name] for name, value in total.items())
        for name in [n for n in ratios if not n.endswith("/count")]:
            metrics[name] = ratios[name] / ratios[f"{name}/count"] if ratios[f"{name}/count"] else 0.0
    for row in rows:
        words = alignment(normalize(row["ref"]), normalize(row["hyp"]))
        row["errors"] = sum(w["op"] != "equal" for w in words)
    return Evaluation(metrics, rows)


def decode(model: Any, batch: SpeechBatch, options: SpeechOptions) -> list[Sequence[int]]:
    """The best token sequence of each utterance."""
    settings: dict[str, Any] = {"mode": options.mode or default_mode(model), "beam": options.beam}
    if _is_prompted(model):
        settings |= {"languages": languages(batch, options), "tasks": [options.task] * len(batch.keys)}
    found = model.decode(batch.feats, batch.feats_lengths, **settings)
    return [hypothesis.tokens for hypothesis in found]


def default_mode(model: Any) -> str:
    """How a model is decoded where nobody says: greedily, by CTC where it was trained with CTC."""
    ctc = getattr(getattr(model, "config", None), "ctc_weight", 0.0)
    return "ctc_greedy_search" if ctc > 0 else "attention"


def languages(batch: SpeechBatch, options: SpeechOptions) -> list[str]:
    """The language of each utterance: the option's, else the row's own, else English."""
    if options.language:
        return [options.language] * len(batch.keys)
    return [lang or "en" for lang in (batch.langs or [""] * len(batch.keys))]


def _is_prompted(model: Any) -> bool:
    multilingual = getattr(model, "is_multilingual", None)
    if multilingual is not None:
        return bool(multilingual)
    return bool(getattr(getattr(model, "config", None), "is_whisper", False))


class _Sums(dict[str, float]):
    def add(self, name: str, value: float) -> None:
        self[name] = self.get(name, 0.0) + value
