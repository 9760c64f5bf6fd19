"""Recordings and transcripts into padded batches: WeNet's pipeline, each step a value of its `dataset_conf`.

Order of a read, as in wenet/dataset/dataset.py: decode, choose the channel, filter, resample, speed perturbation,
features, SpecAugment, SpecSub, SpecTrim. Every draw comes from one generator keyed by (seed, epoch, sample), so that a
sample looks the same in whatever batch, worker or process it is read. The filter is applied where batches are planned,
on durations and token counts, and once more on what was really read.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from thawline.core.config import Strict
from thawline.data import augment, features
from thawline.data.audio import decode, duration_s, resample
from thawline.data.augment import SpecAugConf, SpecSubConf, SpecTrimConf
from thawline.data.features import FbankConf, FeatureConf, LogMelConf, MfccConf
from thawline.data.manifest import Manifest, Utterance
from thawline.data.sampler import Batching
from thawline.data.text import Tokenizer
from thawline.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

PADDING = -1
"""What fills `target` after its end."""


class FilterConf(Strict):
    """Which utterances are left out of training; WeNet's names, bounds inclusive."""

    max_length: float = 10240
    """Longest in frames of 10 ms, before speed perturbation."""

    min_length: float = 10
    """Shortest in frames of 10 ms, before speed perturbation."""

    token_max_length: int = 200
    """Most tokens. Words spelled in characters need more than this sooner than one thinks."""

    token_min_length: int = 1
    """Fewest tokens; 0 keeps utterances without text."""

    min_output_input_ratio: float = 0.0005
    """Fewest tokens per frame of 10 ms."""

    max_output_input_ratio: float = 1.0
    """Most tokens per frame of 10 ms. An encoder that subsamples by 4 can emit 0.25 at most, which CTC needs: see
    `thawline data check`."""

    def reason(self, frames: float, tokens: int | None) -> str:
        """Why an utterance is left out; "" keeps it. `frames` of 10 ms; `tokens` None without a tokenizer."""
        if frames < self.min_length:
            return f"{frames:g} frames of 10 ms are fewer than min_length {self.min_length:g}"
        if frames > self.max_length:
            return f"{frames:g} frames of 10 ms are more than max_length {self.max_length:g}"
        if tokens is None:
            return ""
        if tokens < self.token_min_length:
            return f"{tokens} tokens are fewer than token_min_length {self.token_min_length}"
        if tokens > self.token_max_length:
            return f"{tokens} tokens are more than token_max_length {self.token_max_length}"
        if frames and tokens / frames < self.min_output_input_ratio:
            return (
                f"{tokens} tokens in {frames:g} frames are below min_output_input_ratio {self.min_output_input_ratio:g}"
            )
        if frames and tokens / frames > self.max_output_input_ratio:
            return (
                f"{tokens} tokens in {frames:g} frames are above max_output_input_ratio {self.max_output_input_ratio:g}"
            )
        return ""


class ResampleConf(Strict):
    """The rate that features are computed at."""

    resample_rate: int = Field(default=16000, ge=1000)
    """Hz. Recordings of any rate are brought to it by soxr."""


class ChannelConf(Strict):
    """Which channel of a recording is used (the misspelling of `singal_channel_conf` is WeNet's)."""

    channel: int | None = Field(default=0, ge=0)
    """From 0; null takes the mean of all."""


class SpeedPerturbConf(Strict):
    """Speeds to choose from, each with equal chance."""

    speeds: tuple[float, ...] = augment.SPEEDS
    """1.0 is the recording as it is; 0.9 is slower, longer and lower."""


class ShuffleConf(Strict):
    """WeNet's shuffle buffer."""

    shuffle_size: int = Field(default=10000, ge=1)
    """Without effect: every epoch is a permutation of the whole list, at no cost in memory."""


class SortConf(Strict):
    """WeNet's sort buffer."""

    sort_size: int = Field(default=4096, ge=1)
    """Utterances within which lengths are sorted before batches are cut: the window of the batch plan."""


class BatchConf(Strict):
    """WeNet's batch settings; a recipe's `data.batch` says the same."""

    batch_type: Literal["static", "bucket", "dynamic"] = "static"
    """Which of the following holds."""

    batch_size: int = Field(default=16, ge=1)
    """static: utterances per batch."""

    bucket_boundaries: tuple[int, ...] = ()
    """bucket: lengths in frames."""

    bucket_batch_sizes: tuple[int, ...] = ()
    """bucket: utterances per batch, one more than boundaries."""

    max_frames_in_batch: int = Field(default=12000, ge=1)
    """dynamic: frames per batch after padding."""

    def batching(self, *, sort: bool) -> Batching:
        """The same as the batch plan has it."""
        match self.batch_type:
            case "static":
                return Batching(size=self.batch_size, sort=sort)
            case "bucket":
                return Batching(
                    bucket_boundaries=self.bucket_boundaries, bucket_sizes=self.bucket_batch_sizes, sort=sort
                )
            case "dynamic":
                return Batching(frames=self.max_frames_in_batch, sort=sort)


class LanguageConf(Strict):
    """WeNet guesses each utterance's language with langid; here it comes from the list or the recipe."""

    limited_langs: tuple[str, ...] = ("zh", "en")
    """Without effect."""


class SpeechFrontend(Strict):
    """WeNet's `dataset_conf`. Augmentation happens in training only; evaluation also leaves nothing out."""

    feats_type: Literal["fbank", "mfcc", "log_mel_spectrogram"] = "fbank"
    """What the model reads: Kaldi filter banks, Kaldi cepstra, or Whisper's features."""

    fbank_conf: FbankConf = FbankConf()
    """For feats_type fbank."""

    mfcc_conf: MfccConf = MfccConf()
    """For feats_type mfcc."""

    log_mel_spectrogram_conf: LogMelConf = LogMelConf()
    """For feats_type log_mel_spectrogram."""

    resample_conf: ResampleConf = ResampleConf()
    """The rate of the model."""

    singal_channel_conf: ChannelConf = ChannelConf()
    """The channel that is used."""

    filter_conf: FilterConf = FilterConf()
    """Which utterances are left out of training."""

    speed_perturb: bool = False
    """Change speed and pitch. Does not change the epoch's number of utterances."""

    speed_perturb_conf: SpeedPerturbConf = SpeedPerturbConf()
    """For speed_perturb."""

    spec_aug: bool = True
    """Mask stretches of time and frequency. On where nothing is said, as in WeNet."""

    spec_aug_conf: SpecAugConf = SpecAugConf()
    """For spec_aug."""

    spec_sub: bool = False
    """Replace stretches by earlier ones."""

    spec_sub_conf: SpecSubConf = SpecSubConf()
    """For spec_sub."""

    spec_trim: bool = False
    """Cut the end."""

    spec_trim_conf: SpecTrimConf = SpecTrimConf()
    """For spec_trim."""

    shuffle: bool = True
    """New order each epoch."""

    shuffle_conf: ShuffleConf = ShuffleConf()
    """Without effect."""

    sort: bool = True
    """Batches of similar lengths."""

    sort_conf: SortConf = SortConf()
    """For sort."""

    batch_conf: BatchConf = BatchConf()
    """How batches are cut, where the recipe's data.batch does not say."""

    list_shuffle: bool = True
    """Without effect: see shuffle."""

    list_shuffle_conf: ShuffleConf = ShuffleConf()
    """Without effect."""

    cycle: int = Field(default=1, ge=1)
    """Without effect: run.epochs says how often the list is read."""

    language_conf: LanguageConf = LanguageConf()
    """Without effect."""

    speaker_conf: dict[str, Any] = {}
    """Without effect: WeNet's speaker ids are for models that tell speakers apart."""

    prefetch: int = Field(default=500, ge=1)
    """Without effect: the loader has its own."""

    pad_feat: bool = False
    """Without effect: WeNet's paraformer alone looks at it."""

    @model_validator(mode="after")
    def _possible(self) -> SpeechFrontend:
        if self.speed_perturb and (not self.speed_perturb_conf.speeds or min(self.speed_perturb_conf.speeds) <= 0):
            raise ValueError("speed_perturb_conf.speeds must hold speeds above 0")
        return self

    @property
    def feature_conf(self) -> FeatureConf:
        """The settings of the chosen feats_type."""
        match self.feats_type:
            case "fbank":
                return self.fbank_conf
            case "mfcc":
                return self.mfcc_conf
            case "log_mel_spectrogram":
                return self.log_mel_spectrogram_conf

    @property
    def rate_hz(self) -> int:
        """The sample rate of the model."""
        return self.resample_conf.resample_rate

    def batching(self) -> Batching:
        """What batch_conf and sort say."""
        return self.batch_conf.batching(sort=self.sort)

    def longest_frames(self, seconds: float, *, training: bool) -> float:
        """Frames that so much sound gives at most: at the slowest speed where speeds vary."""
        slowest = min(self.speed_perturb_conf.speeds) if training and self.speed_perturb else 1.0
        conf = self.feature_conf
        if isinstance(conf, LogMelConf) and conf.pad_or_trim:
            return features.n_frames(0, self.rate_hz, conf)
        return seconds / slowest * features.frames_per_second(self.rate_hz, conf)

    def features_of(self, samples: NDArray[np.float32], rng: np.random.Generator | None) -> NDArray[np.float32]:
        """Samples (n,) at `rate_hz` into features (frames, bins). `rng` draws the augmentation; None is evaluation."""
        if rng is not None and self.speed_perturb:
            samples = augment.speed_perturb(samples, self.rate_hz, rng, self.speed_perturb_conf.speeds)
        conf = self.feature_conf
        if isinstance(conf, LogMelConf) and conf.pad_or_trim and samples.size > conf.max_duration * self.rate_hz:
            raise DataError(
                f"{samples.size / self.rate_hz:.2f} s are more than the window of {conf.max_duration} s; "
                "the end would be lost while its text stayed",
                fix="cut it into segments (start and end in the list), or leave it out by filter_conf.max_length",
            )
        feats = features.compute(samples, self.rate_hz, conf, rng=rng)
        if rng is None:
            return feats
        if self.spec_aug:
            feats = augment.spec_aug(feats, rng, self.spec_aug_conf)
        if self.spec_sub:
            feats = augment.spec_sub(feats, rng, self.spec_sub_conf)
        if self.spec_trim:
            feats = augment.spec_trim(feats, rng, self.spec_trim_conf)
        return feats


@dataclass(frozen=True, slots=True)
class SpeechSample:
    """One utterance as the model sees it: feats (frames, bins) float32, target ids."""

    key: str
    feats: NDArray[np.float32]
    target: tuple[int, ...]
    text: str
    lang: str = ""
    task: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechBatch:
    """Utterances padded to one length.

    keys:           names, in the order of the rows
    feats:          (B, T, bins) float32, zero after each utterance's end
    feats_lengths:  (B,) int64, frames
    target:         (B, L) int64, -1 after each utterance's end; L is 0 without a tokenizer
    target_lengths: (B,) int64
    texts, langs, tasks: as the list has them
    weights:        {"utterances": B, "tokens": sum of target_lengths}: the denominators of losses
    """

    keys: tuple[str, ...]
    feats: Tensor
    feats_lengths: Tensor
    target: Tensor
    target_lengths: Tensor
    texts: tuple[str, ...]
    langs: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def input_features(self) -> Tensor:
        """(B, bins, T): what Whisper of transformers calls it; (B, 80, 3000) with pad_or_trim."""
        return self.feats.transpose(1, 2)

    def rows(self, start: int, stop: int) -> SpeechBatch:
        """The utterances from `start` to `stop`. The padded width stays: a convolution without a mask sees the padding
        of a batch in an utterance's last frames, so cutting it would change them."""
        lengths = self.target_lengths[start:stop]
        return replace(
            self,
            keys=self.keys[start:stop],
            feats=self.feats[start:stop],
            feats_lengths=self.feats_lengths[start:stop],
            target=self.target[start:stop],
            target_lengths=lengths,
            texts=self.texts[start:stop],
            langs=self.langs[start:stop],
            tasks=self.tasks[start:stop],
            weights={"utterances": float(stop - start), "tokens": float(lengths.sum())},
        )

    def to(self, device: torch.device | str) -> SpeechBatch:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            feats=self.feats.to(device, non_blocking=True),
            feats_lengths=self.feats_lengths.to(device, non_blocking=True),
            target=self.target.to(device, non_blocking=True),
            target_lengths=self.target_lengths.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An utterance that the plan does not contain, and why: by the filter, or because it cannot be read."""

    key: str
    reason: str
    unreadable: bool = False


class SpeechSamples:
    """The utterances of a manifest by number, for the loader.

    manifest:  what there is; rows without a duration are measured from their headers now
    frontend:  WeNet's dataset_conf
    tokenizer: None reads without targets
    training:  augments, and leaves out what filter_conf says; evaluation does neither, and keeps the order
    """

    def __init__(
        self, manifest: Manifest, frontend: SpeechFrontend, tokenizer: Tokenizer | None = None, *, training: bool
    ) -> None:
        self.frontend = frontend
        self.tokenizer = tokenizer
        self.training = training
        kept: list[Utterance] = []
        left_out: list[LeftOut] = []
        for row in manifest:
            unreadable = False
            try:
                known = row if row.duration_s is not None else replace(row, duration_s=duration_s(row))
                reason = self._reason(known, known.duration_s or 0.0) if training else ""
            except DataError as error:
                # An evaluation keeps it, so that it is counted where it is read.
                known, reason = replace(row, duration_s=0.0), str(error) if training else ""
                unreadable = True
            if reason:
                left_out.append(LeftOut(row.key, reason, unreadable))
            else:
                kept.append(known)
        if not kept:
            raise DataError(
                f"none of the {len(manifest)} utterances is left; the first was left out because {left_out[0].reason}",
                where=str(manifest.path),
                fix="check filter_conf and the files, e.g. with: thawline data check",
            )
        self.manifest = Manifest(kept, path=manifest.path, format=manifest.format)
        self.left_out = tuple(left_out)

    def __len__(self) -> int:
        return len(self.manifest)

    @property
    def fingerprint(self) -> str:
        """Of the utterances that are left, in their order."""
        return self.manifest.fingerprint

    def key(self, id: int) -> str:
        """The name of utterance `id`."""
        return self.manifest[id].key

    def length(self, id: int) -> float:
        """Frames of utterance `id`, at most (before the exact rounding of windows; at the slowest speed)."""
        return self.frontend.longest_frames(self.manifest[id].duration_s or 0.0, training=self.training)

    def read(self, id: int, epoch: int) -> SpeechSample:
        """Utterance `id`. Augmentation is keyed by the global generator of `random`, which the loader seeds.

        `epoch` is in that key. Raises DataError for an utterance that cannot be used.
        """
        row = self.manifest[id]
        conf = self.frontend
        samples, native_hz = decode(
            row.wav, start_s=row.start_s, end_s=row.end_s, channel=conf.singal_channel_conf.channel
        )
        reason = self._reason(row, samples.size / native_hz) if self.training else ""
        if reason:
            raise DataError(reason, where=row.wav)
        rng = np.random.Generator(np.random.PCG64(random.getrandbits(63))) if self.training else None
        try:
            feats = conf.features_of(resample(samples, native_hz, conf.rate_hz), rng)
        except DataError as error:
            raise DataError(error.what, where=row.wav, fix=error.fix) from error
        if len(feats) == 0:
            raise DataError(f"{samples.size} samples at {native_hz} Hz are less than one frame", where=row.wav)
        target = tuple(self.tokenizer.encode(row.txt)) if self.tokenizer is not None else ()
        return SpeechSample(row.key, feats, target, row.txt, row.lang, row.task)

    def collate(self, samples: Sequence[SpeechSample]) -> SpeechBatch:
        """Pad the utterances, in their order."""
        return collate(samples)

    def _reason(self, row: Utterance, seconds: float) -> str:
        tokens = len(self.tokenizer.encode(row.txt)) if self.tokenizer is not None else None
        return self.frontend.filter_conf.reason(round(seconds * 100, 3), tokens)


def collate(samples: Sequence[SpeechSample]) -> SpeechBatch:
    """Pad utterances to one length, features with 0 and targets with -1. Order is kept."""
    frames = [len(s.feats) for s in samples]
    tokens = [len(s.target) for s in samples]
    feats = np.zeros((len(samples), max(frames), samples[0].feats.shape[1]), np.float32)
    target = np.full((len(samples), max(tokens)), PADDING, np.int64)
    for i, s in enumerate(samples):
        feats[i, : frames[i]] = s.feats
        target[i, : tokens[i]] = s.target
    return SpeechBatch(
        keys=tuple(s.key for s in samples),
        feats=torch.from_numpy(feats),
        feats_lengths=torch.tensor(frames, dtype=torch.int64),
        target=torch.from_numpy(target),
        target_lengths=torch.tensor(tokens, dtype=torch.int64),
        texts=tuple(s.text for s in samples),
        langs=tuple(s.lang for s in samples),
        tasks=tuple(s.task for s in samples),
        weights={"utterances": float(len(samples)), "tokens": float(sum(tokens))},
    )
