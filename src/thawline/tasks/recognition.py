"""A recogniser ready to use: audio in, text and times out, and its score on a data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from thawline.core.config import near_names
from thawline.data.audio import decode as decode_audio
from thawline.data.audio import duration_s, resample
from thawline.data.loader import BatchRequest, Loader
from thawline.data.manifest import Utterance, read_manifest
from thawline.data.sampler import Batching, BatchPlan, Cursor
from thawline.data.speech import SpeechFrontend, SpeechSample, SpeechSamples, collate
from thawline.data.text import Tokenizer
from thawline.errors import DataError
from thawline.models.decode.align import ctc_align
from thawline.models.decode.hypothesis import Hypothesis
from thawline.models.wenet.model import U2Model
from thawline.tasks.asr import evaluate, scored_
from thawline.tasks.loading import load_located, locate
from thawline.tasks.speech_decoding import default_mode, prompt_ids, settings_of
from thawline.tasks.speech_home import SpeechHome
from thawline.tasks.speech_options import SpeechOptions
from thawline.tasks.speech_weights import notes_of
from thawline.tasks.speech_windows import LONGEST_S, quiet_windows
from thawline.tasks.transcript import Timed, Transcript, words_of
from thawline.train.recipe import read_recipe
from thawline.train.task import Evaluation

if TYPE_CHECKING:
    from numpy.typing import NDArray

LIMIT_S = 2 * 3600.0
"""The longest recording that is taken: its samples and features are held in memory, about 0.4 MB a second at worst."""

_WHISPER_WINDOW_S = 30.0


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
        own options hold where none are given.

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
            chosen = SpeechOptions.given({**recipe.options, **chosen.model_dump(exclude_unset=True)})
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
            path = _existing(Path(file))
            seconds = duration_s(Utterance(key=str(file), wav=str(path), txt=""))
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
            if isinstance(self.model, U2Model):
                return self._hear_wenet(recordings, times=times)
            short = [
                not times and len(samples) <= _WHISPER_WINDOW_S * self.frontend.rate_hz for _, samples in recordings
            ]
            together = self._hear_whisper([r for r, is_short in zip(recordings, short, strict=True) if is_short])
            found = iter(together)
            return [
                next(found) if is_short else self._hear_whisper_long(*recording)
                for recording, is_short in zip(recordings, short, strict=True)
            ]

    def _hear_wenet(self, recordings: Sequence[tuple[str, NDArray[np.float32]]], *, times: bool) -> list[Transcript]:
        rate = self.frontend.rate_hz
        pieces: list[tuple[int, float, SpeechSample]] = []  # recording, its begin in seconds, features
        for number, (name, samples) in enumerate(recordings):
            longest = int(LONGEST_S * rate)
            ranges = quiet_windows(samples, rate) if len(samples) > longest else [(0, len(samples))]
            for begin, end in ranges:
                feats = self.frontend.features_of(samples[begin:end], None)
                if len(feats) == 0 and len(ranges) == 1:
                    raise DataError(f"{len(samples)} samples at {rate} Hz are less than one frame", where=name)
                if len(feats):
                    pieces.append((number, begin / rate, SpeechSample(name, feats, (), "")))
        heard: list[list[tuple[float, Hypothesis, list[Timed]]]] = [[] for _ in recordings]
        for at in range(0, len(pieces), 8):
            group = pieces[at : at + 8]
            batch = collate([sample for _, _, sample in group])
            hypotheses, words = self._decode_timed(batch.feats, batch.feats_lengths, times=times)
            for (number, start_s, _), hypothesis, timed in zip(group, hypotheses, words, strict=True):
                moved = [Timed(w.start_s + start_s, w.end_s + start_s, w.text, w.confidence) for w in timed]
                heard[number].append((start_s, hypothesis, moved))
        return [
            self._joined(name, len(samples) / rate, parts)
            for (name, samples), parts in zip(recordings, heard, strict=True)
        ]

    def _decode_timed(
        self, feats: torch.Tensor, lengths: torch.Tensor, *, times: bool
    ) -> tuple[list[Hypothesis], list[list[Timed]]]:
        """Hypotheses of a batch, and with `times` their words: by CTC's own times, or by aligning the text with CTC."""
        model: Any = self.model
        language = self.options.language or "en"
        settings = settings_of(model, self.options, self.tokenizer, [language] * len(lengths))
        found: list[Hypothesis] = model.decode(feats, lengths, **settings)
        if not times:
            return found, [[] for _ in found]
        chunks = {"chunk_size": self.options.chunk_size, "left_chunks": self.options.left_chunks}
        aligned: list[tuple[int, ...]] = []
        if any(h.times is None for h in found):
            if default_mode(model) != "ctc_greedy_search":
                raise DataError("this model has no CTC head that was trained, so there are no times to give")
            out, frames = model.encode(feats, lengths, **chunks)
            log_probs = model.ctc_log_probs(out)
            for h, row, n in zip(found, log_probs, frames.tolist(), strict=True):
                try:
                    aligned.append(ctc_align(row[:n], h.tokens, blank=model.config.blank))
                except DataError:  # a text of more tokens than frames, as attention may loop
                    aligned.append(tuple(min(i, n - 1) for i in range(len(h.tokens))))
        else:
            aligned = [h.times or () for h in found]
        per_frame = model.config.encoder.subsampling_rate * 1.0 / self._frames_per_second()
        words = []
        for h, begins, n in zip(found, aligned, lengths.tolist(), strict=True):
            seconds = [frame * per_frame for frame in begins]
            confidence = h.tokens_confidence or ()
            words.append(words_of(self.tokenizer, h.tokens, seconds, n / self._frames_per_second(), confidence))
        return found, words

    def _frames_per_second(self) -> float:
        conf = self.frontend.feature_conf
        shift: float = getattr(conf, "frame_shift", 10.0)
        hop: int | None = getattr(conf, "hop_length", None)
        return self.frontend.rate_hz / hop if hop else 1000.0 / shift

    def _joined(self, name: str, seconds: float, parts: list[tuple[float, Hypothesis, list[Timed]]]) -> Transcript:
        texts = [self.tokenizer.decode(h.tokens).strip() for _, h, _ in parts]
        notes: tuple[str, ...] = ()
        if len(parts) > 1:
            notes = (
                f"decoded in {len(parts)} windows cut at quiet places: attention over all of it would need more memory",
            )
        nbest: tuple[tuple[str, float], ...] = ()
        if len(parts) == 1:
            best = parts[0][1]
            nbest = tuple(
                (self.tokenizer.decode(tokens).strip(), score)
                for tokens, score in zip(best.nbest, best.nbest_scores, strict=True)
            )
        return Transcript(
            file=name,
            text=" ".join(text for text in texts if text),
            tokens=tuple(t for _, h, _ in parts for t in h.tokens),
            seconds=seconds,
            score=sum(h.score for _, h, _ in parts),
            words=tuple(word for _, _, words in parts for word in words),
            windows=max(len(parts), 1),
            nbest=nbest,
            notes=notes,
        )

    def _hear_whisper(self, recordings: Sequence[tuple[str, NDArray[np.float32]]]) -> list[Transcript]:
        if not recordings:
            return []
        batch = collate([SpeechSample(n, self.frontend.features_of(s, None), (), "") for n, s in recordings])
        model: Any = self.model
        prompted = self._languages(batch.feats, batch.feats_lengths)
        settings = settings_of(model, self.options, self.tokenizer, prompted)
        found: list[Hypothesis] = model.decode(batch.feats, batch.feats_lengths, **settings)
        return [
            Transcript(
                file=name,
                text=self.tokenizer.decode(h.tokens).strip(),
                tokens=h.tokens,
                seconds=len(samples) / self.frontend.rate_hz,
                score=h.score,
                language=language,
            )
            for (name, samples), h, language in zip(recordings, found, prompted, strict=True)
        ]

    def _hear_whisper_long(self, name: str, samples: NDArray[np.float32]) -> Transcript:
        model: Any = self.model
        seconds = len(samples) / self.frontend.rate_hz
        conf = self.frontend.log_mel_spectrogram_conf
        whole = self.frontend.model_copy(
            update={"log_mel_spectrogram_conf": conf.model_copy(update={"pad_or_trim": seconds <= _WHISPER_WINDOW_S})}
        )
        feats = torch.from_numpy(whole.features_of(samples, None))
        language = self._languages(feats[None], torch.tensor([len(feats)]))[0]
        settings = settings_of(model, self.options, self.tokenizer, [language])
        found = model.decode_long(
            feats,
            beam=settings["beam"],
            language=language,
            task=self.options.task,
            prompt_tokens=prompt_ids(self.options, self.tokenizer),
            **({"length_penalty": self.options.length_penalty} if self.options.length_penalty else {}),
        )
        segments = [Timed(s.start_s, min(s.end_s, seconds), self.tokenizer.decode(s.tokens).strip()) for s in found]
        tokens = tuple(t for segment in found for t in segment.tokens)
        return Transcript(
            file=name,
            text="".join(self.tokenizer.decode(s.tokens) for s in found).strip(),
            tokens=tokens,
            seconds=seconds,
            language=language,
            segments=tuple(s for s in segments if s.text),
        )

    def _languages(self, feats: torch.Tensor, lengths: torch.Tensor) -> list[str]:
        """What each row is prompted with: the option's, else by the model's own judgement."""
        model: Any = self.model
        if self.options.language not in ("", "auto"):
            return [self.options.language] * len(lengths)
        found: list[str] = model.language(feats, lengths)
        return found

    # --- data sets ---------------------------------------------------------------------------------------------------

    def evaluate(
        self, data: Path | str, *, batch_size: int = 8, workers: int = 0, limit: int | None = None
    ) -> Evaluation:
        """Error rates on a data set, and a row an utterance.

        What cannot be read counts as said and not heard: all its words are deletions, `unreadable` says how many there
        are, and its row why.
        """
        manifest = read_manifest(Path(data))
        if limit is not None:
            manifest = manifest.keep(range(min(limit, len(manifest))))
        samples = SpeechSamples(manifest, self.frontend, self.tokenizer, training=False)
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


def _existing(path: Path) -> Path:
    if not path.is_file():
        near = near_names(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else []
        raise DataError(
            "no such audio file",
            where=str(path),
            fix=f"did you mean {path.parent / near[0]}?" if near else "check the path",
        )
    return path.absolute()
