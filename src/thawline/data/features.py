"""Samples into features: Kaldi's filter banks and cepstra, Whisper's log-mel. Numpy in, numpy out, no global generator.

fbank and mfcc are kaldi-native-fbank with the settings that WeNet passes to torchaudio's Kaldi-compatible functions
(wenet/dataset/processor.py: compute_fbank, compute_mfcc), so a trained WeNet model sees the features it was trained
on. Dither is the exception: kaldi-native-fbank draws it from a generator of its own, which cannot be keyed, so it is
added to the waveform here, once per sample instead of once per frame and sample.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from thawline.core.config import Strict
from thawline.core.extras import need
from thawline.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Samples = NDArray[np.float32]
    Features = NDArray[np.float32]

_INT16 = np.float32(1 << 15)
"""Kaldi's features are defined on 16-bit integers; samples here are in [-1, 1)."""


class FbankConf(Strict):
    """Kaldi log-mel filter banks; the names are WeNet's."""

    num_mel_bins: int = Field(default=80, ge=4)
    """Bins between 20 Hz and half the sample rate. (WeNet's function defaults to 23, all its recipes say 80.)"""

    frame_length: float = Field(default=25, gt=0)
    """Window in milliseconds."""

    frame_shift: float = Field(default=10, gt=0)
    """From one frame to the next, in milliseconds."""

    dither: float = Field(default=0.0, ge=0)
    """Standard deviation of the noise added to the samples, on the scale of 16-bit integers (1.0 is the last bit).
    Training only; recognition never dithers."""

    window_type: Literal["povey", "hamming", "hanning", "rectangular", "blackman"] = "povey"
    """Shape of the window."""


class MfccConf(Strict):
    """Kaldi mel-frequency cepstra; the names are WeNet's."""

    num_mel_bins: int = Field(default=40, ge=4)
    """Bins of the filter bank below the cepstra; at least num_ceps. (WeNet's function defaults to 23 with 40 cepstra,
    which Kaldi refuses.)"""

    num_ceps: int = Field(default=40, ge=1)
    """Cepstra kept, c0 first."""

    frame_length: float = Field(default=25, gt=0)
    """Window in milliseconds."""

    frame_shift: float = Field(default=10, gt=0)
    """From one frame to the next, in milliseconds."""

    dither: float = Field(default=0.0, ge=0)
    """As for fbank_conf."""

    low_freq: float = Field(default=20.0, ge=0)
    """Lower end of the lowest bin in Hz."""

    high_freq: float = 0.0
    """Upper end of the highest bin in Hz; 0 or less counts from half the sample rate."""


class LogMelConf(Strict):
    """Whisper's log-mel spectrogram; the names are WeNet's."""

    n_fft: int = Field(default=400, ge=2)
    """Window in samples."""

    hop_length: int = Field(default=160, ge=1)
    """From one frame to the next, in samples."""

    num_mel_bins: int = Field(default=80, ge=1)
    """Bins; 80 for Whisper up to large-v2, 128 from large-v3."""

    padding: int = Field(default=0, ge=0)
    """Zero samples added at the end."""

    pad_or_trim: bool = False
    """Make every utterance `max_duration` long, as Whisper was trained."""

    max_duration: int = Field(default=30, ge=1)
    """Seconds, where pad_or_trim is set."""


FeatureConf = FbankConf | MfccConf | LogMelConf


def compute(samples: Samples, rate_hz: int, conf: FeatureConf, *, rng: np.random.Generator | None = None) -> Features:
    """The features that `conf` describes: (frames, bins) float32. `rng` draws the dither; None leaves it out."""
    match conf:
        case FbankConf():
            return fbank(samples, rate_hz, conf, rng=rng)
        case MfccConf():
            return mfcc(samples, rate_hz, conf, rng=rng)
        case LogMelConf():
            return log_mel(samples, rate_hz, conf)


def fbank(
    samples: Samples, rate_hz: int, conf: FbankConf | None = None, *, rng: np.random.Generator | None = None
) -> Features:
    """Natural-log mel energies (frames, num_mel_bins) float32; samples (n,) in [-1, 1).

    Frame i covers samples from i * shift to i * shift + length; what does not fill a frame at the end is dropped, so
    less than one window gives no frame. Settings besides `conf` are Kaldi's defaults: pre-emphasis 0.97, mean removed
    per frame, power spectrum, 20 Hz to half the rate.
    """
    conf = conf or FbankConf()
    knf = need("kaldi_native_fbank", extra="speech")
    options = knf.FbankOptions()
    options.mel_opts.num_bins = conf.num_mel_bins
    options.energy_floor = 0.0
    options.frame_opts.window_type = conf.window_type
    _frame_options(options.frame_opts, rate_hz, conf)
    return _run(knf.OnlineFbank(options), samples, rate_hz, conf.num_mel_bins, conf.dither, rng)


def mfcc(
    samples: Samples, rate_hz: int, conf: MfccConf | None = None, *, rng: np.random.Generator | None = None
) -> Features:
    """Cepstra (frames, num_ceps) float32; samples (n,) in [-1, 1). Lifter 22, no energy, otherwise as `fbank`."""
    conf = conf or MfccConf()
    if conf.num_ceps > conf.num_mel_bins:
        raise DataError(f"num_ceps {conf.num_ceps} is more than num_mel_bins {conf.num_mel_bins}")
    knf = need("kaldi_native_fbank", extra="speech")
    options = knf.MfccOptions()
    options.mel_opts.num_bins = conf.num_mel_bins
    options.mel_opts.low_freq = conf.low_freq
    options.mel_opts.high_freq = conf.high_freq
    options.num_ceps = conf.num_ceps
    options.use_energy = False
    _frame_options(options.frame_opts, rate_hz, conf)
    return _run(knf.OnlineMfcc(options), samples, rate_hz, conf.num_ceps, conf.dither, rng)


def dither_(samples: Samples, amount: float, rng: np.random.Generator) -> None:
    """Add Gaussian noise of standard deviation `amount` (on the scale of `samples`) in place."""
    samples += np.float32(amount) * rng.standard_normal(samples.size, dtype=np.float32)


def n_frames(n_samples: int, rate_hz: int, conf: FeatureConf) -> int:
    """How many frames `n_samples` give, without computing them."""
    if isinstance(conf, LogMelConf):
        whole = conf.max_duration * rate_hz if conf.pad_or_trim else n_samples + conf.padding
        return whole // conf.hop_length
    length, shift = int(rate_hz * 0.001 * conf.frame_length), int(rate_hz * 0.001 * conf.frame_shift)
    return 0 if n_samples < length else 1 + (n_samples - length) // shift


def frames_per_second(rate_hz: int, conf: FeatureConf) -> float:
    """Frames per second of sound."""
    return rate_hz / conf.hop_length if isinstance(conf, LogMelConf) else 1000 / conf.frame_shift


def _frame_options(options: Any, rate_hz: int, conf: FbankConf | MfccConf) -> None:
    options.samp_freq = rate_hz
    options.frame_length_ms = conf.frame_length
    options.frame_shift_ms = conf.frame_shift
    options.dither = 0.0  # ours, below


def _run(
    extractor: Any, samples: Samples, rate_hz: int, width: int, dither: float, rng: np.random.Generator | None
) -> Features:
    scaled: Samples = np.multiply(samples, _INT16, dtype=np.float32)
    if dither and rng is not None:
        dither_(scaled, dither, rng)
    # The binding takes any sequence of numbers; a memoryview is the fastest to walk (half the time of a list).
    extractor.accept_waveform(rate_hz, memoryview(scaled))  # type: ignore[arg-type]  # numpy's stubs lack Buffer
    extractor.input_finished()
    frames = extractor.num_frames_ready
    if frames == 0:
        return np.zeros((0, width), np.float32)
    # Each frame is a view into the extractor's memory: joined, and so copied, before it goes away.
    joined: Features = np.concatenate([extractor.get_frame(i) for i in range(frames)]).reshape(frames, width)
    return joined


# --- Whisper ----------------------------------------------------------------------------------------------------------


def log_mel(samples: Samples, rate_hz: int, conf: LogMelConf | None = None) -> Features:
    """Whisper's features (frames, num_mel_bins) float32; samples (n,) in [-1, 1).

    log10 of the mel power, clipped to 8 below the utterance's maximum, (x + 4) / 4. From openai/whisper's audio.py as
    wenet/dataset/processor.py has it (compute_log_mel_spectrogram). Computed in float64 and without BLAS, so that the
    bits depend neither on threads nor on the number of frames. transformers' extractor agrees to 1e-6 where it computes
    in float64 (numpy) and to 3e-5 where in float32 (torch).
    """
    conf = conf or LogMelConf()
    whole = np.asarray(samples, dtype=np.float64)
    if conf.padding:
        whole = np.pad(whole, (0, conf.padding))
    if conf.pad_or_trim:
        length = conf.max_duration * rate_hz
        whole = np.pad(whole[:length], (0, max(0, length - whole.size)))
    half = conf.n_fft // 2
    if whole.size <= half:
        raise DataError(f"{whole.size} samples are too few for a window of {conf.n_fft}")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(conf.n_fft) / conf.n_fft)
    padded = np.pad(whole, half, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, conf.n_fft)[:: conf.hop_length]
    frames = frames[: whole.size // conf.hop_length]  # the last frame is dropped, as in Whisper
    bank = _mel_bank(rate_hz, conf.n_fft, conf.num_mel_bins)
    mel = np.empty((conf.num_mel_bins, len(frames)))
    for begin in range(0, len(frames), 256):  # in blocks, so that a long file does not need its whole spectrum at once
        spectrum = np.fft.rfft(frames[begin : begin + 256] * window, axis=1)
        power = np.ascontiguousarray((spectrum.real**2 + spectrum.imag**2).T)  # (n_fft // 2 + 1, frames)
        for m, (first, weights) in enumerate(bank):
            block = mel[m, begin : begin + 256]
            block[:] = 0
            for k, weight in enumerate(weights):
                block += weight * power[first + k]
    log = np.log10(np.maximum(mel, 1e-10))
    log = (np.maximum(log, log.max() - 8.0) + 4.0) / 4.0
    return np.ascontiguousarray(log.T, dtype=np.float32)


@cache
def _mel_bank(rate_hz: int, n_fft: int, n_mels: int) -> tuple[tuple[int, tuple[float, ...]], ...]:
    """Slaney's triangular filters of unit area, 0 Hz to half the rate: per bin its first FFT bin and its weights.

    Auditory Toolbox (Slaney 1998), as librosa.filters.mel computes it: linear below 1 kHz, logarithmic above.
    """
    step = 200.0 / 3
    log_step = np.log(6.4) / 27.0

    def to_mel(hz: float) -> float:
        return float(15.0 + np.log(hz / 1000.0) / log_step) if hz >= 1000.0 else hz / step

    mels = np.linspace(0.0, to_mel(rate_hz / 2), n_mels + 2)
    edges = np.where(mels >= 15.0, 1000.0 * np.exp(log_step * (mels - 15.0)), mels * step)
    bins = np.arange(n_fft // 2 + 1) * rate_hz / n_fft
    out = []
    for low, mid, high in zip(edges[:-2], edges[1:-1], edges[2:], strict=True):
        rise, fall = (bins - low) / (mid - low), (high - bins) / (high - mid)
        weights = np.maximum(0.0, np.minimum(rise, fall)) * 2.0 / (high - low)
        used = np.flatnonzero(weights)
        first = int(used[0]) if used.size else 0
        out.append((first, tuple(weights[first : first + used.size].tolist())))
    return tuple(out)
