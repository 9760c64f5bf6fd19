"""From a list to padded batches: WeNet's settings, keyed augmentation, nothing dropped in silence."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from thawline.data.audio import read_audio
from thawline.data.augment import change_speed
from thawline.data.features import FbankConf, LogMelConf, fbank, n_frames
from thawline.data.loader import BatchRequest, LoadedBatch, Loader
from thawline.data.manifest import read_manifest
from thawline.data.sample_reading import seed_sample
from thawline.data.sampler import Batching, BatchPlan, Cursor
from thawline.data.speech import SpeechBatch, SpeechSample, SpeechSamples, collate
from thawline.data.speech_frontend import FilterConf, SpeechFrontend
from thawline.data.text import CharTokenizer, build_units
from thawline.errors import DataError

soundfile = pytest.importorskip("soundfile", reason="the speech extra is not installed")
pytest.importorskip("kaldi_native_fbank", reason="the speech extra is not installed")
pytest.importorskip("soxr", reason="the speech extra is not installed")

PLAIN = SpeechFrontend(spec_aug=False)
ALL = SpeechFrontend(
    speed_perturb=True, spec_sub=True, spec_trim=True, fbank_conf=FbankConf(dither=1.0), filter_conf=FilterConf()
)
TOKENIZER = CharTokenizer(build_units(["one two three"]))


def speech_set(folder: Path, lengths: dict[str, float], *, text: str = "one", durations: bool = False) -> Path:
    rows = []
    for i, (key, seconds) in enumerate(lengths.items()):
        noise = np.random.default_rng(i).uniform(-0.3, 0.3, round(seconds * 8000)).astype(np.float32)
        soundfile.write(folder / f"{key}.wav", noise, 8000, subtype="FLOAT")
        rows.append({"key": key, "wav": f"{key}.wav", "txt": text} | ({"duration": seconds} if durations else {}))
    path = folder / "data.list"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def samples_of(path: Path, frontend: SpeechFrontend = PLAIN, *, training: bool = True) -> SpeechSamples:
    return SpeechSamples(read_manifest(path), frontend, TOKENIZER, training=training)


def test_a_sample_is_resampled_and_given_the_features_that_are_asked_for(tmp_path: Path):
    samples = samples_of(speech_set(tmp_path, {"a": 0.5}))
    got = samples.read(0, 0)
    want = fbank(read_audio(tmp_path / "a.wav"), 16000)
    assert got.key == "a"
    assert got.text == "one"
    assert got.target == tuple(TOKENIZER.encode("one"))
    assert np.array_equal(got.feats, want)


def test_augmentation_is_keyed_by_sample_and_epoch_and_off_in_evaluation(tmp_path: Path):
    path = speech_set(tmp_path, {"a": 1.0, "b": 1.0})
    training, evaluation = samples_of(path, ALL), samples_of(path, ALL, training=False)

    def read(samples: SpeechSamples, seed: int, epoch: int, id: int) -> np.ndarray:
        seed_sample(seed, epoch, id)
        return samples.read(id, epoch).feats

    one = read(training, 1, 0, 0)
    assert np.array_equal(read(training, 1, 0, 0), one)
    others = [read(training, 2, 0, 0), read(training, 1, 1, 0), read(training, 1, 2, 0)]
    assert all(o.shape != one.shape or not np.array_equal(o, one) for o in others)
    plain = fbank(read_audio(tmp_path / "a.wav"), 16000)
    assert np.array_equal(read(evaluation, 1, 0, 0), plain)
    assert np.array_equal(read(evaluation, 2, 5, 0), plain)


def test_each_kind_of_augmentation_is_applied(tmp_path: Path):
    path = speech_set(tmp_path, {"a": 1.0})
    plain = samples_of(path).read(0, 0).feats

    def read(frontend: SpeechFrontend) -> np.ndarray:
        seed_sample(3, 0, 0)
        return samples_of(path, frontend).read(0, 0).feats

    masked = read(SpeechFrontend())
    assert (masked == 0).any()
    assert np.array_equal(masked[masked != 0], plain[masked != 0])
    substituted = read(SpeechFrontend(spec_aug=False, spec_sub=True))
    assert substituted.shape == plain.shape
    assert {row.tobytes() for row in substituted} <= {row.tobytes() for row in plain}
    trimmed = read(SpeechFrontend(spec_aug=False, spec_trim=True))
    assert np.array_equal(trimmed, plain[: len(trimmed)])
    assert len(trimmed) < len(plain)
    slow = read(SpeechFrontend.model_validate({"spec_aug": False, "speed_perturb": True, "speed_perturb_conf": {"speeds": [0.5]}}))  # fmt: skip # noqa: E501
    assert np.array_equal(slow, fbank(change_speed(read_audio(tmp_path / "a.wav"), 16000, 0.5), 16000))
    dithered = read(SpeechFrontend(spec_aug=False, fbank_conf=FbankConf(dither=1.0)))
    # Below 4 kHz there is sound, which the last bit does not change much; above there is none but dither.
    assert 0 < np.abs(dithered - plain)[:, :50].max() < 0.1
    assert (dithered[:, 75:] > plain[:, 75:]).all()


def test_a_batch_is_padded_with_zeros_and_minus_one():
    feats = [np.full((n, 2), n, np.float32) for n in (2, 3)]
    batch = collate(
        [
            SpeechSample("a", feats[0], (5, 6, 7), "x", lang="zh"),
            SpeechSample("b", feats[1], (8,), "y", task="translate"),
        ]
    )
    assert batch.keys == ("a", "b")
    assert batch.texts == ("x", "y")
    assert (batch.langs, batch.tasks) == (("zh", ""), ("", "translate"))
    assert batch.feats.tolist() == [[[2, 2], [2, 2], [0, 0]], [[3, 3]] * 3]
    assert batch.feats_lengths.tolist() == [2, 3]
    assert batch.target.tolist() == [[5, 6, 7], [8, -1, -1]]
    assert batch.target_lengths.tolist() == [3, 1]
    assert batch.weights == {"utterances": 2, "tokens": 4}
    types = (batch.feats.dtype, batch.feats_lengths.dtype, batch.target.dtype, batch.target_lengths.dtype)
    assert types == (torch.float32, torch.int64, torch.int64, torch.int64)
    moved = batch.to("meta")
    assert moved.feats.device.type == moved.target.device.type == "meta"
    assert moved.keys == batch.keys


def test_whisper_features_are_thirty_seconds_whatever_the_utterance(tmp_path: Path):
    frontend = SpeechFrontend(
        feats_type="log_mel_spectrogram", log_mel_spectrogram_conf=LogMelConf(pad_or_trim=True), spec_aug=False
    )
    samples = samples_of(speech_set(tmp_path, {"a": 0.5, "b": 1.0}), frontend)
    batch = samples.collate([samples.read(0, 0), samples.read(1, 0)])
    assert batch.input_features.shape == (2, 80, 3000)
    assert batch.feats_lengths.tolist() == [3000, 3000]
    assert samples.length(0) == 3000


def test_an_utterance_longer_than_whispers_window_is_not_cut_in_silence(tmp_path: Path):
    frontend = SpeechFrontend(
        feats_type="log_mel_spectrogram",
        log_mel_spectrogram_conf=LogMelConf(pad_or_trim=True, max_duration=1),
        spec_aug=False,
    )
    samples = samples_of(speech_set(tmp_path, {"a": 1.5}), frontend)
    with pytest.raises(DataError, match=r"1\.50 s are more than the window of 1 s; the end would be lost"):
        samples.read(0, 0)


# --- the filter -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("conf", "frames", "tokens", "reason"),
    [
        ({}, 10, 1, ""),
        ({}, 9.9, 1, "fewer than min_length 10"),
        ({"max_length": 50}, 50, 1, ""),
        ({"max_length": 50}, 50.1, 1, "more than max_length 50"),
        ({}, 100, 0, "fewer than token_min_length 1"),
        ({"token_min_length": 0, "min_output_input_ratio": 0}, 100, 0, ""),
        ({"token_max_length": 5}, 100, 6, "more than token_max_length 5"),
        ({}, 3000, 1, "below min_output_input_ratio 0.0005"),
        ({"max_output_input_ratio": 0.25}, 100, 26, "above max_output_input_ratio 0.25"),
        ({"max_output_input_ratio": 0.25}, 100, 25, ""),
        ({"max_length": 50}, 40, None, ""),
    ],
)
def test_the_filter_says_why(conf: dict[str, float], frames: float, tokens: int | None, reason: str):
    said = FilterConf.model_validate(conf).reason(frames, tokens)
    assert (reason in said) if reason else said == ""


def test_what_the_filter_leaves_out_is_not_in_the_plan_and_is_listed(tmp_path: Path):
    path = speech_set(tmp_path, {"short": 0.05, "good": 0.5, "long": 2.0})
    samples = samples_of(path, SpeechFrontend(filter_conf=FilterConf(max_length=100)))
    assert [r.key for r in samples.manifest] == ["good"]
    assert [(left.key, left.reason.split(" are ")[0]) for left in samples.left_out] == [
        ("short", "5 frames of 10 ms"),
        ("long", "200 frames of 10 ms"),
    ]
    assert len(samples_of(path, SpeechFrontend(filter_conf=FilterConf(max_length=100)), training=False)) == 3


def test_a_list_that_lies_about_its_durations_is_caught_at_reading(tmp_path: Path):
    path = speech_set(tmp_path, {"a": 0.05})
    path.write_text('{"key": "a", "wav": "a.wav", "txt": "one", "duration": 5}\n')
    samples = samples_of(path)
    with pytest.raises(DataError, match=r"a\.wav: 5 frames of 10 ms are fewer than min_length 10"):
        samples.read(0, 0)


def test_nothing_left_is_an_error_with_the_first_reason(tmp_path: Path):
    path = speech_set(tmp_path, {"a": 0.05})
    with pytest.raises(DataError, match="none of the 1 utterances is left; the first was left out because 5 frames"):
        samples_of(path)


def test_an_unreadable_file_is_left_out_of_training_and_counted_in_evaluation(tmp_path: Path):
    path = speech_set(tmp_path, {"a": 0.5, "b": 0.5})
    (tmp_path / "b.wav").write_bytes((tmp_path / "b.wav").read_bytes()[:-100])
    training, evaluation = samples_of(path), samples_of(path, training=False)
    assert [r.key for r in training.manifest] == ["a"]
    assert "cut short" in training.left_out[0].reason
    got = next(Loader(evaluation, seed=1).iterate([BatchRequest(epoch=0, cursor=Cursor(), ids=(0, 1))]))
    assert got.batch is not None
    assert got.batch.keys == ("a",)
    assert [b.key for b in got.bad] == ["b"]


# --- lengths and batches ----------------------------------------------------------------------------------------------


def test_planned_lengths_bound_what_is_read_at_every_speed(tmp_path: Path):
    lengths = {f"u{i}": 0.2 + 0.1 * i for i in range(12)}
    frontend = SpeechFrontend(speed_perturb=True)
    samples = samples_of(speech_set(tmp_path, lengths), frontend)
    frames = 250
    plan = BatchPlan(len(samples), seed=1, batching=Batching(frames=frames), length=samples.length)
    for epoch in range(3):
        asked = (BatchRequest(epoch=epoch, cursor=c, ids=ids) for c, ids in plan.batches(Cursor(epoch)))
        for loaded in Loader(samples, seed=1).iterate(asked):
            assert loaded.batch is not None
            assert loaded.batch.feats.shape[0] * loaded.batch.feats.shape[1] <= frames
    assert samples_of(tmp_path / "data.list", frontend, training=False).length(8) == pytest.approx(100)
    assert samples.length(8) == pytest.approx(100 / 0.9)


def test_batches_with_all_augmentation_are_the_same_bits_from_workers(tmp_path: Path):
    samples = samples_of(speech_set(tmp_path, {f"u{i}": 0.3 + 0.05 * i for i in range(10)}), ALL)
    plan = BatchPlan(len(samples), seed=1, batching=Batching(size=3), length=samples.length)

    def bits(workers: int) -> list[tuple[object, ...]]:
        asked = (BatchRequest(epoch=2, cursor=c, ids=ids) for c, ids in plan.batches(Cursor(2)))
        with Loader(samples, seed=5, workers=workers) as loader:
            return [_bits(b) for b in loader.iterate(asked)]

    def _bits(loaded: LoadedBatch[SpeechBatch]) -> tuple[object, ...]:
        b = loaded.batch
        assert b is not None
        return (
            b.keys,
            b.feats.numpy().tobytes(),
            b.target.tolist(),
            b.feats_lengths.tolist(),
            dict(b.weights),
            loaded.bad,
        )

    assert bits(0) == bits(2)


def test_the_generators_of_the_process_other_than_the_seeded_one_are_not_touched(tmp_path: Path):
    samples = samples_of(speech_set(tmp_path, {"a": 0.5}), ALL)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    before = str(np.random.get_state()), torch.get_rng_state().tolist()
    samples.read(0, 0)
    assert (str(np.random.get_state()), torch.get_rng_state().tolist()) == before


# --- settings ---------------------------------------------------------------------------------------------------------


def test_the_dataset_conf_of_a_wenet_run_is_read_as_it_stands(shared: Path):
    for case in ("exp_dir_epoch_mode", "u2_conformer"):
        conf = yaml.safe_load((shared / f"parity/wenet/{case}/train.yaml").read_text())["dataset_conf"]
        frontend = SpeechFrontend.model_validate(conf)
        assert frontend.batching() == Batching(size=conf["batch_conf"]["batch_size"], sort=conf.get("sort", True))
        assert frontend.spec_aug_conf.max_t == conf.get("spec_aug_conf", {}).get("max_t", 50)


@pytest.mark.parametrize(
    ("batch_conf", "batching"),
    [
        ({"batch_type": "static", "batch_size": 12}, Batching(size=12)),
        ({"batch_type": "dynamic", "max_frames_in_batch": 900}, Batching(frames=900)),
        (
            {"batch_type": "bucket", "bucket_boundaries": [500, 1000], "bucket_batch_sizes": [8, 4, 1]},
            Batching(bucket_boundaries=(500, 1000), bucket_sizes=(8, 4, 1)),
        ),
    ],
)
def test_wenets_batch_settings_become_ours(batch_conf: dict[str, object], batching: Batching):
    assert SpeechFrontend.model_validate({"batch_conf": batch_conf}).batching() == batching


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ({"specaug": True}, "specaug"),
        ({"spec_aug_conf": {"max_time": 3}}, "max_time"),
        ({"feats_type": "plp"}, "feats_type"),
        ({"speed_perturb": True, "speed_perturb_conf": {"speeds": [0]}}, "speeds above 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(conf: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=message):
        SpeechFrontend.model_validate(conf)


def test_mfcc_is_computed_where_asked(tmp_path: Path):
    samples = samples_of(speech_set(tmp_path, {"a": 0.5}), SpeechFrontend(feats_type="mfcc", spec_aug=False))
    feats = samples.read(0, 0).feats
    assert feats.shape == (n_frames(8000, 16000, FbankConf()), 40)


@pytest.mark.parametrize("name", ["fsdd/new.dev.list", "an4/dev.list", "cmn-words/dev.list"])
def test_real_sets_are_read_whole(shared: Path, name: str):
    manifest = read_manifest(shared / "data" / name).keep(range(40))
    tokenizer = CharTokenizer(build_units(r.txt for r in manifest))
    samples = SpeechSamples(manifest, SpeechFrontend(speed_perturb=True), tokenizer, training=True)
    plan = BatchPlan(len(samples), seed=1, batching=Batching(size=8), length=samples.length)
    asked = (BatchRequest(epoch=0, cursor=c, ids=ids) for c, ids in plan.batches(Cursor()))
    loaded = list(Loader(samples, seed=1).iterate(asked))
    assert sum(len(b.batch.keys) for b in loaded if b.batch) == len(samples) == 40 - len(samples.left_out)
    assert not samples.left_out
    for b in loaded:
        assert b.batch is not None
        assert torch.isfinite(b.batch.feats).all()
        assert [tokenizer.decode([i for i in row if i >= 0]) for row in b.batch.target.tolist()] == list(b.batch.texts)
