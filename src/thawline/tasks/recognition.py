"""A recogniser ready to use: audio in, text and times out, and its score on a data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from thawline.data.audio import decode as decode_audio
from thawline.data.audio import resample
from thawline.data.loader import BatchRequest, Loader
from thawline.data.manifest import read_manifest
from thawline.data.sampler import Batching, BatchPlan, Cursor
from thawline.data.speech import SpeechSamples
from thawline.data.speech_frontend import SpeechFrontend
from thawline.data.text import Tokenizer
from thawline.errors import DataError
from thawline.models.wenet.model import U2Model
from thawline.tasks.asr import evaluate, scored_
from thawline.tasks.loading import load_located, locate
from thawline.tasks.recordings import existing, seconds_of
from thawline.tasks.speech_decoding import settings_of
from thawline.tasks.speech_home import SpeechHome
from thawline.tasks.speech_options import SpeechOptions
from thawline.tasks.speech_weights import notes_of
from thawline.tasks.speech_windows import LONGEST_S
from thawline.tasks.transcript import Transcript
from thawline.tasks.wenet_hearing import hear_wenet
from thawline.tasks.whisper_hearing import hear_whisper
from thawline.train.recipe import read_recipe
from thawline.train.task import Evaluation

if TYPE_CHECKING:
    from numpy.typing import NDArray

LIMIT_S = 2 * 3600.0
"""The longest recording that is taken: its samples and features are held in memory, about 0.4 MB a second at worst."""


@dataclass(frozen=True, slots=True)
class Recognizer:
    """A model with its features and its tokenizer. notes: what loading did beyond copying tensors."""

    model: nn.Module
    frontend: SpeechFrontend
    tokenizer: Tokenizer
    options: SpeechOptions
    notes: tuple[str, ...] = ()

    @classmethod
    def open(cls, model: Path | str, *, base: Path | str | None = None, **options: Any) -> Recognizer:
        """Load a model directory, a run, a checkpoint, or a delta with `base`. Options as in `SpeechOptions`; a run's
        own options hold where none are given, but for `allow_pipes`.

        Raises RecipeError for an unknown option, a mode that the model cannot serve, and hotwords that it cannot spell,
        before anything is decoded.
        """
        chosen = SpeechOptions.given(options)
        place = locate(model, base)
        owner = place.run or _run_of(Path(model).absolute())
        conf: dict[str, Any] = {}
        if owner is not None:
            recipe = read_recipe(owner / "recipe.yaml")
            conf = dict(recipe.data.conf)
            inherited = {name: value for name, value in recipe.options.items() if name != "allow_pipes"}
            chosen = SpeechOptions.given({**inherited, **chosen.model_dump(exclude_unset=True)})
        loaded = load_located(place)
        home = SpeechHome.of(place.home, tokenizer=Path(chosen.tokenizer).absolute() if chosen.tokenizer else None)
        if chosen.units and place.run is not None:
            home = replace(home, units=Path(chosen.units))
        found = cls(loaded, home.frontend(conf), home.tokenizer(), chosen, notes_of(loaded))
        found.check()
        return found

    def with_options(self, **options: Any) -> Recognizer:
        """The same with other options, of which those left out stay."""
        chosen = SpeechOptions.given({**self.options.model_dump(exclude_unset=True), **options})
        made = replace(self, options=chosen)
        made.check()
        return made

    def check(self) -> None:
        """Raise RecipeError for options that this model cannot serve, by decoding a moment of nothing."""
        settings = settings_of(self.model, self.options, self.tokenizer, [self.options.language or "en"])
        if isinstance(self.model, U2Model):
            frames = 40 * self.model.config.encoder.subsampling_rate
            feats = torch.zeros(1, frames, self.model.config.encoder.input_size)
            with torch.inference_mode():
                self.model.decode(feats, torch.tensor([frames]), **settings)
        elif settings.get("languages"):
            prompt: Any = self.model
            prompt.prompt(1, torch.device("cpu"), settings["languages"], settings["tasks"])

    # --- files -------------------------------------------------------------------------------------------------------

    def transcribe(self, files: Sequence[Path | str], *, batch_size: int = 8) -> list[str]:
        """The text of each audio file, in order. Raises DataError naming the first that cannot be read."""
        return [found.text for found in self.transcripts(files, batch_size=batch_size)]

    def transcripts(
        self, files: Sequence[Path | str], *, times: bool = False, batch_size: int = 8, limit_s: float = LIMIT_S
    ) -> Iterator[Transcript]:
        """What was said in each file, in order, and with `times` when.

        A WeNet model takes up to 60 s in one piece, and a longer recording in windows cut at quiet places; Whisper
        takes 30 s, and follows its own time marks through a longer one. Raises DataError naming the first file that
        cannot be read, or is longer than `limit_s`.
        """
        waiting: list[tuple[str, NDArray[np.float32]]] = []
        for file in files:
            path = existing(Path(file))
            seconds = seconds_of(path)
            if seconds > limit_s:
                raise DataError(
                    f"{seconds / 3600:.2f} hours are more than the limit of {limit_s / 3600:.2f}",
                    where=str(file),
                    fix="raise the limit (--max-minutes) where there is memory, about 0.4 MB a second, or cut the file",
                )
            samples, native_hz = decode_audio(path, channel=self.frontend.singal_channel_conf.channel)
            waiting.append((str(file), resample(samples, native_hz, self.frontend.rate_hz)))
            if len(waiting) == batch_size or seconds > LONGEST_S:
                yield from self.hear(waiting, times=times)
                waiting = []
        yield from self.hear(waiting, times=times)

    def hear(self, recordings: Sequence[tuple[str, NDArray[np.float32]]], *, times: bool = False) -> list[Transcript]:
        """(name, samples (n,) at the model's rate) -> what was said, decoded together where lengths allow."""
        if not recordings:
            return []
        with torch.inference_mode():
            hear = hear_wenet if isinstance(self.model, U2Model) else hear_whisper
            return hear(self, recordings, times=times)

    # --- data sets ---------------------------------------------------------------------------------------------------

    def evaluate(
        self, data: Path | str, *, batch_size: int = 8, workers: int = 0, limit: int | None = None
    ) -> Evaluation:
        """Error rates on a data set, and a row an utterance.

        What cannot be read counts as said and not heard: all its words are deletions, `unreadable` says how many there
        are, and its row why.
        """
        manifest = read_manifest(Path(data), allow_pipes=self.options.allow_pipes)
        if limit is not None:
            manifest = manifest.keep(range(min(limit, len(manifest))))
        frames = self.model.config.encoder_frames if isinstance(self.model, U2Model) else None
        samples = SpeechSamples(manifest, self.frontend, self.tokenizer, training=False, encoder_frames=frames)
        plan = BatchPlan(len(samples), seed=0, batching=Batching(size=batch_size), length=samples.length, shuffle=False)
        bad: dict[int, str] = {}

        def batches() -> Iterator[Any]:
            requests = (BatchRequest(epoch=0, cursor=c, ids=ids) for c, ids in plan.batches(Cursor()))
            with Loader(samples, seed=0, workers=workers) as loader:
                for loaded in loader.iterate(requests):
                    bad.update({sample.id: sample.reason for sample in loaded.bad})
                    if loaded.batch is not None:
                        yield loaded.batch

        with torch.inference_mode():
            result = evaluate(self.model, self.tokenizer, batches(), self.options)
        rows = {row["key"]: dict(row) for row in result.rows}
        ordered: list[dict[str, Any]] = []
        for number, utterance in enumerate(samples.manifest):
            if number in bad:
                row: dict[str, Any] = {"key": utterance.key, "ref": utterance.txt, "hyp": "", "score": None}
                ordered.append({**row, "unreadable": bad[number]})
            else:
                ordered.append(rows[utterance.key])
            ordered[-1]["wav"] = utterance.wav
        metrics = scored_(ordered, self.options)
        return Evaluation({**metrics, "unreadable": float(len(bad))}, ordered)


def _run_of(model: Path) -> Path | None:
    """The run whose result `model` is: the run directory itself, or its `model/`."""
    for folder in (model, model.parent if model.name == "model" else model):
        if (folder / "recipe.yaml").is_file() and (folder / "base.json").is_file():
            return folder
    return None
