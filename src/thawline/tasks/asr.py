"""The speech task: WeNet and Whisper recognisers on recordings with transcripts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from thawline.data.manifest import read_manifest
from thawline.data.speech import SpeechBatch, SpeechSamples
from thawline.data.targets import what_is_not_learnt
from thawline.data.text import Tokenizer
from thawline.freeze.lora import has_adapters, merged_copy
from thawline.tasks.loading import draw, load, locate
from thawline.tasks.scoring import alignment, normalizer, score
from thawline.tasks.speech_decoding import decode, languages
from thawline.tasks.speech_home import SpeechHome
from thawline.tasks.speech_options import SpeechOptions
from thawline.tasks.speech_weights import notes_of
from thawline.train.recipe import Recipe
from thawline.train.task import Evaluation, LossSums, Samples

__all__ = ["SpeechOptions", "SpeechTask", "evaluate"]


class SpeechTask:
    """Fine-tuning a recogniser. Made anew for each run; remembers the run's home and options."""

    name = "speech"

    def __init__(self) -> None:
        self.options = SpeechOptions()
        self.home: SpeechHome | None = None
        self.notes: tuple[str, ...] = ()
        """What building the base did beyond copying tensors (new heads, changed units), and what of the transcripts
        cannot be learnt. One sentence each."""

    def complete(self, recipe: Recipe) -> Recipe:
        """The recipe with absolute paths for the files that `options` name, so that a run's copy of it finds them."""
        named = {}
        for key in ("units", "tokenizer"):
            if recipe.options.get(key):
                folder = recipe.folder("options", key)
                named[key] = str((folder / Path(str(recipe.options[key])).expanduser()).absolute())
        return recipe if not named else recipe.model_copy(update={"options": {**recipe.options, **named}})

    def build(self, recipe: Recipe) -> nn.Module:
        self.options = recipe.bind_part(SpeechOptions, "options")
        named = self.complete(recipe).options
        place = locate(recipe.path("model"))
        home = SpeechHome.of(place.home, tokenizer=Path(named["tokenizer"]) if named.get("tokenizer") else None)
        model = draw(place.home) if recipe.init == "random" else load(recipe.path("model"))
        self.notes = notes_of(model)
        if named.get("units"):
            home = home.with_units_(model, Path(named["units"]), seed=recipe.run.seed)
            if home.new_units is not None:
                self.notes = (*self.notes, str(home.new_units))
        self.home = home
        return model

    def samples(self, recipe: Recipe, model: nn.Module, split: str) -> Samples:
        home = self._home()
        training = split == "train"
        manifest = read_manifest(recipe.path("data", split), allow_pipes=self.options.allow_pipes)
        frontend, frames = home.frontend(recipe.data.conf), home.encoder_frames
        found = SpeechSamples(manifest, frontend, home.tokenizer(), training=training, encoder_frames=frames)
        if training:
            self.notes = (*self.notes, *what_is_not_learnt(found, encoder_frames=home.encoder_frames))
        return found

    def weights(self, model: Any, batch: SpeechBatch) -> Mapping[str, float]:
        weights: Mapping[str, float] = model.loss_weights(batch.target_lengths)
        return weights

    def loss(self, model: Any, batch: SpeechBatch) -> LossSums:
        return _loss_sums(model, batch, self.options)

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
        hypotheses = decode(model, batch, options, tokenizer)
        for key, reference, found in zip(batch.keys, batch.texts, hypotheses, strict=True):
            text = tokenizer.decode(found.tokens).strip()
            rows.append({"key": key, "ref": reference, "hyp": text, "score": found.score})
        if loss:
            sums = _loss_sums(model, batch, options)
            for term in sums.terms.values():
                total.add(term.per, float(term.sum))
            for name, weight in model.loss_weights(batch.target_lengths).items():
                weights.add(name, weight)
            for name, (part, count) in sums.metrics.items():
                ratios.add(name, float(part))
                ratios.add(f"{name}/count", float(count))
    metrics = scored_(rows, options)
    if loss:
        metrics["loss"] = sum(value / weights[name] for name, value in total.items())
        for name in [n for n in ratios if not n.endswith("/count")]:
            metrics[name] = ratios[name] / ratios[f"{name}/count"] if ratios[f"{name}/count"] else 0.0
    return Evaluation(metrics, rows)


def scored_(rows: list[dict[str, Any]], options: SpeechOptions) -> dict[str, float]:
    """Error rates over rows of {"ref", "hyp"}; puts "alignment" and "errors" (how many words are wrong) into each."""
    normalize = normalizer(options.normalizer)
    for row in rows:
        row["alignment"] = alignment(normalize(row["ref"]), normalize(row["hyp"]))
        row["errors"] = sum(word["op"] != "equal" for word in row["alignment"])
    return dict(score([r["ref"] for r in rows], [r["hyp"] for r in rows], normalize=normalize))


def _loss_sums(model: Any, batch: SpeechBatch, options: SpeechOptions) -> LossSums:
    sums: LossSums = model.loss_sums(
        batch.feats,
        batch.feats_lengths,
        batch.target,
        batch.target_lengths,
        languages=languages(batch, options),
        tasks=[options.task] * len(batch.keys),
    )
    return sums


class _Sums(dict[str, float]):
    def add(self, name: str, value: float) -> None:
        self[name] = self.get(name, 0.0) + value
