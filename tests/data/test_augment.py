"""Augmentation: pure, keyed, with WeNet's ranges and distributions."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thawline.data.augment import (
    SpecAugConf,
    SpecSubConf,
    SpecTrimConf,
    change_speed,
    dither,
    spec_aug,
    spec_sub,
    spec_trim,
    speed_perturb,
    volume,
)

Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]
ON_FEATURES: dict[str, Augment] = {"spec_aug": spec_aug, "spec_sub": spec_sub, "spec_trim": spec_trim}
ON_SAMPLES: dict[str, Augment] = {
    "dither": dither,
    "volume": volume,
    "speed": lambda x, rng: speed_perturb(x, 16000, rng, (0.9, 1.1)),
}


def feats(frames: int = 200, bins: int = 80) -> np.ndarray:
    return np.random.default_rng(0).uniform(1, 2, (frames, bins)).astype(np.float32)


def samples(n: int = 4000) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.5, 0.5, n).astype(np.float32)


def globals_now() -> tuple[object, ...]:
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


@pytest.mark.parametrize("name", [*ON_FEATURES, *ON_SAMPLES])
def test_the_result_is_a_function_of_input_and_key_alone(name: str):
    augment, x = (ON_FEATURES | ON_SAMPLES)[name], feats() if name in ON_FEATURES else samples()
    kept, before = x.copy(), globals_now()
    one, two = augment(x, np.random.default_rng(3)), augment(x, np.random.default_rng(3))
    others = [augment(x, np.random.default_rng(k)) for k in range(4, 12)]
    assert np.array_equal(one, two)
    assert any(o.shape != one.shape or not np.array_equal(o, one) for o in others)
    assert np.array_equal(x, kept)
    assert not np.shares_memory(one, x)
    assert globals_now() == before
    assert one.dtype == np.float32


def wenet_spec_aug_cells(frames: int, bins: int, conf: SpecAugConf, draw: random.Random) -> np.ndarray:
    """Which cells WeNet's spec_aug masks (wenet/dataset/processor.py), from Python's own random."""
    hit = np.zeros((frames, bins), bool)
    for _ in range(conf.num_t_mask):
        start = draw.randint(0, frames - 1)
        hit[start : min(frames, start + draw.randint(1, conf.max_t))] = True
    for _ in range(conf.num_f_mask):
        start = draw.randint(0, bins - 1)
        hit[:, start : min(bins, start + draw.randint(1, conf.max_f))] = True
    return hit


def test_spec_aug_masks_as_often_as_wenet_does_everywhere():
    conf, runs, x = SpecAugConf(num_t_mask=2, num_f_mask=2, max_t=8, max_f=4), 4000, feats(40, 12)
    ours, theirs = np.zeros((40, 12)), np.zeros((40, 12))
    draw = random.Random(1)
    for key in range(runs):
        ours += spec_aug(x, np.random.default_rng(key), conf) == 0
        theirs += wenet_spec_aug_cells(40, 12, conf, draw)
    # Each cell is a count of `runs` trials; the difference of two has a deviation of at most sqrt(runs / 2).
    assert np.abs(ours - theirs).max() < 5 * np.sqrt(runs / 2)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 30), st.integers(0, 2**32))
def test_spec_aug_keeps_what_it_does_not_mask(frames: int, max_t: int, key: int):
    conf = SpecAugConf(num_t_mask=1, num_f_mask=1, max_t=max_t, max_f=5)
    x = feats(frames, 20)
    y = spec_aug(x, np.random.default_rng(key), conf)
    assert np.array_equal(y[y != 0], x[y != 0])
    rows, columns = (y == 0).all(axis=1).sum(), (y == 0).all(axis=0).sum()
    assert rows <= max_t
    assert 1 <= columns <= 5 or rows == frames


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**32))
def test_spec_sub_only_looks_back(frames: int, key: int):
    x = np.repeat(np.arange(frames, dtype=np.float32)[:, None], 3, axis=1)
    y = spec_sub(x, np.random.default_rng(key), SpecSubConf(max_t=9, num_t_sub=2))
    assert y.shape == x.shape
    assert (y <= x).all()
    assert (y[:, 0] == y[:, 2]).all()
    assert (y != x).any(axis=1).sum() <= 18


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**32))
def test_spec_trim_cuts_less_than_half_of_the_tail(frames: int, key: int):
    x = feats(frames, 3)
    y = spec_trim(x, np.random.default_rng(key), SpecTrimConf(max_t=20))
    assert np.array_equal(y, x[: len(y)])
    assert len(y) == frames or (frames - len(y) <= 20 and frames - len(y) < frames / 2)


def test_every_speed_is_chosen_equally_often():
    x = samples(1000)
    lengths = Counter(len(speed_perturb(x, 16000, np.random.default_rng(k))) for k in range(900))
    assert sorted(lengths) == [909, 1000, 1111]
    assert min(lengths.values()) > 230  # expected 300, deviation 14


@pytest.mark.parametrize("speed", [0.9, 1.1])
def test_speed_changes_length_and_pitch_together(speed: float):
    rate, hz = 16000, 1000
    tone = np.sin(2 * np.pi * hz * np.arange(rate) / rate).astype(np.float32)
    fast = change_speed(tone, rate, speed)
    assert abs(len(fast) - rate / speed) <= 1
    peak = np.abs(np.fft.rfft(fast * np.hanning(len(fast)))).argmax() * rate / len(fast)
    assert abs(peak - hz * speed) < 2
    inner = fast[1000:-1000]
    assert abs(np.abs(inner).max() - 1) < 0.01


def test_dither_and_volume_have_the_stated_strength():
    silence = np.zeros(50_000, np.float32)
    assert abs(dither(silence, np.random.default_rng(0), 3.0).std() * 32768 - 3) < 0.1
    gains = [volume(np.ones(1, np.float32), np.random.default_rng(k))[0] for k in range(500)]
    assert 10 ** (-6 / 20) <= min(gains) < 0.55
    assert 1.9 < max(gains) <= 10 ** (6 / 20)


@pytest.mark.parametrize("name", [*ON_FEATURES])
def test_no_frames_stay_no_frames(name: str):
    assert ON_FEATURES[name](np.zeros((0, 80), np.float32), np.random.default_rng(0)).shape == (0, 80)
