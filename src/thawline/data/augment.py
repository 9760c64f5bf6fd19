"""Augmentation as pure functions: an array and a numpy Generator in, a new array out; the argument is never changed.

Names, ranges and distributions are those of wenet/dataset/processor.py; every bound is inclusive, as Python's
random.randint, which it uses, has it. No function draws more or fewer numbers depending on the values it sees, only on
shapes, so that a draw never shifts those after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from thawline.core.config import Strict
from thawline.data.audio import resample
from thawline.data.features import dither_

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Samples = NDArray[np.float32]
    Features = NDArray[np.float32]

SPEEDS = (0.9, 1.0, 1.1)
"""WeNet's choice, each with equal chance."""


class SpecAugConf(Strict):
    """SpecAugment (Park et al. 2019, without time warping): stretches of time and of frequency set to zero."""

    num_t_mask: int = Field(default=2, ge=0)
    """Masks over time. They may overlap."""

    num_f_mask: int = Field(default=2, ge=0)
    """Masks over frequency. They may overlap."""

    max_t: int = Field(default=50, ge=1)
    """Longest time mask in frames. Not bounded by the length of the utterance: short ones may be masked whole."""

    max_f: int = Field(default=10, ge=1)
    """Widest frequency mask in bins."""

    max_w: int = Field(default=80, ge=0)
    """Time warp: accepted because WeNet accepts it, and without effect there too."""


class SpecSubConf(Strict):
    """SpecSub (U2++, Wu et al. 2021, section 3.2.3): stretches replaced by earlier ones of the same utterance."""

    max_t: int = Field(default=20, ge=1)
    """Longest replaced stretch in frames."""

    num_t_sub: int = Field(default=3, ge=0)
    """Replaced stretches."""


class SpecTrimConf(Strict):
    """TrimTail (Song et al. 2022): the last frames are cut off, which teaches a streaming model to answer early."""

    max_t: int = Field(default=20, ge=1)
    """Most frames cut. Nothing is cut where that would be half of the utterance or more."""


def spec_aug(feats: Features, rng: np.random.Generator, conf: SpecAugConf | None = None) -> Features:
    """`feats` (frames, bins) with masked stretches set to 0."""
    conf = conf or SpecAugConf()
    out = feats.copy()
    frames, bins = feats.shape
    if frames == 0:
        return out
    for _ in range(conf.num_t_mask):
        start = int(rng.integers(0, frames))
        out[start : start + int(rng.integers(1, conf.max_t + 1))] = 0
    for _ in range(conf.num_f_mask):
        start = int(rng.integers(0, bins))
        out[:, start : start + int(rng.integers(1, conf.max_f + 1))] = 0
    return out


def spec_sub(feats: Features, rng: np.random.Generator, conf: SpecSubConf | None = None) -> Features:
    """`feats` (frames, bins) with stretches replaced by earlier ones (of the original, not of what was replaced)."""
    conf = conf or SpecSubConf()
    out = feats.copy()
    frames = len(feats)
    if frames == 0:
        return out
    for _ in range(conf.num_t_sub):
        start = int(rng.integers(0, frames))
        end = min(frames, start + int(rng.integers(1, conf.max_t + 1)))
        back = int(rng.integers(0, start + 1))
        out[start:end] = feats[start - back : end - back]
    return out


def spec_trim(feats: Features, rng: np.random.Generator, conf: SpecTrimConf | None = None) -> Features:
    """`feats` (frames, bins) without its last 1 to max_t frames."""
    conf = conf or SpecTrimConf()
    cut = int(rng.integers(1, conf.max_t + 1))
    return feats[: len(feats) - cut].copy() if cut < len(feats) / 2 else feats.copy()


def speed_perturb(
    samples: Samples, rate_hz: int, rng: np.random.Generator, speeds: Sequence[float] = SPEEDS
) -> Samples:
    """`samples` (n,) played at one of `speeds`: about n / speed samples, pitch changed with the tempo.

    As sox's `speed` followed by `rate`, here in one soxr pass: the samples are taken for ones at speed * rate.
    """
    speed = speeds[int(rng.integers(0, len(speeds)))]
    return change_speed(samples, rate_hz, speed)


def change_speed(samples: Samples, rate_hz: int, speed: float) -> Samples:
    """`samples` (n,) played `speed` times as fast."""
    return samples.copy() if speed == 1.0 else resample(samples, round(rate_hz * speed), rate_hz)


def dither(samples: Samples, rng: np.random.Generator, amount: float = 1.0) -> Samples:
    """`samples` (n,) in [-1, 1) with Gaussian noise of `amount` units of the 16-bit scale."""
    out = samples.copy()
    dither_(out, amount / 32768, rng)
    return out


def volume(
    samples: Samples, rng: np.random.Generator, *, min_gain_db: float = -6.0, max_gain_db: float = 6.0
) -> Samples:
    """`samples` (n,) at a loudness drawn evenly in decibels. Not clipped: features take any range."""
    gain_db = rng.uniform(min_gain_db, max_gain_db)
    louder: Samples = samples * np.float32(10 ** (gain_db / 20))
    return louder
