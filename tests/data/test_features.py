"""Features equal those that pretrained models were trained on."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from thawline.data.audio import decode, read_audio, resample
from thawline.data.features import (
    FbankConf,
    LogMelConf,
    MfccConf,
    compute,
    fbank,
    frames_per_second,
    log_mel,
    mfcc,
    n_frames,
)
from thawline.errors import DataError

knf = pytest.importorskip("kaldi_native_fbank", reason="the speech extra is not installed")
RATE = 16000


def speech_like(seconds: float = 1.0, rate: int = RATE, seed: int = 0) -> np.ndarray:
    n = round(seconds * rate)
    t = np.arange(n) / rate
    noise = np.random.default_rng(seed).standard_normal(n)
    return (0.2 * np.sin(2 * np.pi * (200 + 300 * t) * t) * (1 + np.sin(5 * t)) + 0.01 * noise).astype(np.float32)


def kaldi_fbank_by_definition(samples: np.ndarray, rate: int, bins: int) -> np.ndarray:
    """Kaldi's log-mel energies in float64, from the definition (feat/feature-window.cc, feat/mel-computations.cc)."""
    length, shift = rate * 25 // 1000, rate * 10 // 1000
    fft = 1 << (length - 1).bit_length()
    x = samples.astype(np.float64) * 32768
    frames = np.stack([x[i : i + length] for i in range(0, len(x) - length + 1, shift)])
    frames = frames - frames.mean(axis=1, keepdims=True)
    frames = frames - 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / (length - 1))) ** 0.85
    power = np.abs(np.fft.rfft(frames * window, n=fft)) ** 2
    mel = lambda hz: 1127 * np.log(1 + hz / 700)  # noqa: E731
    edges = np.linspace(mel(20), mel(rate / 2), bins + 2)
    at = mel(np.arange(fft // 2) * rate / fft)
    bank = np.maximum(0, np.minimum((at - edges[:-2, None]) / np.diff(edges)[:-1, None],
                                    (edges[2:, None] - at) / np.diff(edges)[1:, None]))  # fmt: skip
    return np.log(np.maximum(power[:, : fft // 2] @ bank.T, 1.1920929e-07))


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
def test_fbank_is_what_kaldi_defines(rate: int):
    samples = speech_like(rate=rate)
    got = fbank(samples, rate)
    want = kaldi_fbank_by_definition(samples, rate, 80)
    assert got.dtype == np.float32
    assert got.shape == want.shape == (98, 80)
    # float32 against float64; a bin that holds no FFT bin at 8 kHz sits on the floor in both
    assert np.abs(got - want).max() < 5e-3
    assert np.abs(got - want).mean() < 1e-4


def test_mfcc_is_the_liftered_cosine_transform_of_the_filter_bank():
    samples = speech_like()
    got = mfcc(samples, RATE, MfccConf(num_mel_bins=40, num_ceps=13))
    logs = kaldi_fbank_by_definition(samples, RATE, 40)
    n, k = np.arange(40), np.arange(13)
    dct = np.sqrt(2 / 40) * np.cos(np.pi / 40 * (n + 0.5) * k[:, None])
    dct[0] = np.sqrt(1 / 40)
    want = logs @ dct.T * (1 + 11 * np.sin(np.pi * k / 22))
    assert got.shape == (98, 13)
    assert np.abs(got - want).max() < 2e-2  # lifter multiplies the float32 error of up to 1e-3 by up to 12


def test_more_cepstra_than_bins_are_refused():
    with pytest.raises(DataError, match="num_ceps 40 is more than num_mel_bins 23"):
        mfcc(speech_like(), RATE, MfccConf(num_mel_bins=23))


@pytest.mark.parametrize("n", [0, 1, 399, 400, 559, 560, 16000])
def test_the_number_of_frames_is_known_beforehand(n: int):
    samples = speech_like()[:n]
    for conf in (FbankConf(), MfccConf(), FbankConf(frame_shift=20, frame_length=32)):
        assert len(compute(samples, RATE, conf)) == n_frames(n, RATE, conf)
    if n > 200:
        assert len(log_mel(samples, RATE)) == n_frames(n, RATE, LogMelConf())


def test_frames_per_second_follow_the_shift():
    assert frames_per_second(RATE, FbankConf()) == 100
    assert frames_per_second(RATE, LogMelConf()) == 100
    assert frames_per_second(RATE, FbankConf(frame_shift=12.5)) == 80


def test_dither_is_drawn_from_the_given_generator_and_nowhere_else():
    samples, conf = speech_like(), FbankConf(dither=1.0)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index, union-attr]
    one = fbank(samples, RATE, conf, rng=np.random.default_rng(5))
    two = fbank(samples, RATE, conf, rng=np.random.default_rng(5))
    other = fbank(samples, RATE, conf, rng=np.random.default_rng(6))
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index, union-attr]
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
    assert before == after
    assert np.array_equal(fbank(samples, RATE, conf), fbank(samples, RATE, FbankConf()))  # no generator, no dither


def test_dither_has_the_stated_strength_and_leaves_the_input_alone():
    silence = np.zeros(RATE, np.float32)
    energy = fbank(silence, RATE, FbankConf(dither=2.0), rng=np.random.default_rng(0)).mean()
    reference = fbank((2.0 / 32768 * np.random.default_rng(1).standard_normal(RATE)).astype(np.float32), RATE).mean()
    assert abs(energy - reference) < 0.1
    assert not silence.any()


def test_log_mel_does_not_depend_on_what_stands_in_other_blocks_of_frames():
    samples = speech_like(6.0)
    samples[:1000] = 1.0  # the maximum, on which the clipping depends, is in both
    whole, part = log_mel(samples, RATE), log_mel(samples[: 3 * RATE], RATE)
    assert np.array_equal(whole[:290], part[:290])


def test_log_mel_refuses_less_than_half_a_window():
    with pytest.raises(DataError, match="100 samples are too few for a window of 400"):
        log_mel(np.zeros(100, np.float32), RATE)


def by_transformers(samples: np.ndarray, arithmetic: str, bins: int = 80) -> np.ndarray:
    """The features that transformers computes in float64 by numpy, or in float32 by torch (its default)."""
    transformers = pytest.importorskip("transformers")
    extractor = transformers.WhisperFeatureExtractor(feature_size=bins)
    padded = np.pad(samples[: 30 * RATE], (0, max(0, 30 * RATE - len(samples))))[None]
    method = {"float64": extractor._np_extract_fbank_features, "float32": extractor._torch_extract_fbank_features}
    return method[arithmetic](padded, "cpu")[0]


@pytest.mark.parametrize("bins", [80, 128])
@pytest.mark.parametrize("seconds", [0.4, 3.3, 30.0, 31.0])
def test_log_mel_is_what_transformers_computes(seconds: float, bins: int):
    samples = speech_like(seconds)
    got = log_mel(samples, RATE, LogMelConf(pad_or_trim=True, num_mel_bins=bins)).T
    exact, rough = (by_transformers(samples, a, bins) for a in ("float64", "float32"))
    assert got.shape == exact.shape == (bins, 3000)
    assert np.abs(got - exact).max() < 2e-6  # one rounding to float32
    assert np.abs(got - rough).max() < 5e-5  # their float32 spectrum is as far from their own float64 one
    assert np.abs(exact - rough).max() > np.abs(got - exact).max()


# --- golden -----------------------------------------------------------------------------------------------------------


def test_fbank_equals_the_golden_features_of_wenet(shared: Path):
    from safetensors.numpy import load_file

    name = "librispeech-1995-1837-0001"
    want = load_file(shared / "parity/fbank" / f"{name}.safetensors")["fbank"]
    got = fbank(read_audio(shared / "parity/fbank" / f"{name}.wav"), RATE)
    # The golden file's advice is mean 1e-4 and max 5e-3; the same library gives the same bits.
    assert np.abs(got - want).max() < 1e-4


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_fbank_of_other_rates_is_kaldi_after_soxr(shared: Path, tmp_path: Path, rate: int, channels: int):
    import soundfile

    speech, native = decode(shared / "parity/fbank/aishell-BAC009S0724W0121.wav")
    recorded = resample(speech, native, rate)
    both = np.stack([recorded, 0.5 * recorded[::-1]], axis=1)[:, :channels]
    soundfile.write(tmp_path / "a.wav", both, rate, subtype="PCM_16")
    got = fbank(read_audio(tmp_path / "a.wav"), RATE)

    pcm = soundfile.read(tmp_path / "a.wav", dtype="float32", always_2d=True)[0].mean(axis=1, dtype=np.float32)
    options = knf.FbankOptions()
    options.frame_opts.dither = 0
    options.mel_opts.num_bins = 80
    options.energy_floor = 0
    direct = knf.OnlineFbank(options)
    direct.accept_waveform(RATE, (resample(pcm, rate, RATE) * 32768).tolist())
    direct.input_finished()
    want = np.stack([direct.get_frame(i) for i in range(direct.num_frames_ready)])
    assert np.array_equal(got, want)


def test_log_mel_of_real_speech_is_what_transformers_computes(shared: Path):
    samples = read_audio(shared / "parity/fbank/librispeech-1995-1837-0001.wav")
    got = log_mel(samples, RATE, LogMelConf(pad_or_trim=True)).T
    assert np.abs(got - by_transformers(samples, "float64")).max() < 2e-6
    assert np.abs(got - by_transformers(samples, "float32")).max() < 2e-5
