"""How a recogniser hears: WeNet's `dataset_conf`, key by key, and samples into features as it says.

Order, as in wenet/dataset/dataset.py: decode, choose the channel, filter, resample, speed perturbation, features,
SpecAugment, SpecSub, SpecTrim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from thawline.core.config import Strict
from thawline.data import augment, features
from thawline.data.augment import SpecAugConf, SpecSubConf, SpecTrimConf
from thawline.data.features import FbankConf, FeatureConf, LogMelConf, MfccConf
from thawline.data.sampler import Batching
from thawline.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray


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

    def n_frames(self, seconds: float) -> int:
        """Frames that so much sound gives, as it is."""
        return features.n_frames(round(seconds * self.rate_hz), self.rate_hz, self.feature_conf)

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
