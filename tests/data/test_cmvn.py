from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from thawline.data.cmvn import cmvn_sums
from thawline.data.manifest import read_manifest
from thawline.data.speech import SpeechSamples
from thawline.data.speech_frontend import SpeechFrontend
from thawline.errors import DataError
from thawline.models.wenet.cmvn import read_cmvn

soundfile = pytest.importorskip("soundfile", reason="the extra `speech` is not installed")
pytest.importorskip("kaldi_native_fbank", reason="the extra `speech` is not installed")


def recordings(folder: Path, *lengths: int) -> SpeechSamples:
    rng = np.random.default_rng(1)
    rows = []
    for i, n in enumerate(lengths):
        soundfile.write(folder / f"{i}.wav", rng.normal(0, 0.1, n), 16000)
        rows.append(json.dumps({"key": str(i), "wav": f"{i}.wav", "txt": "a"}))
    (folder / "data.list").write_text("\n".join(rows))
    return SpeechSamples(read_manifest(folder / "data.list"), SpeechFrontend(), training=False)


def test_the_statistics_bring_the_features_they_were_taken_from_to_mean_zero_and_variance_one(tmp_path: Path):
    samples = recordings(tmp_path, 8000, 16000)
    (tmp_path / "global_cmvn").write_text(json.dumps(cmvn_sums(samples).to_json()))
    read = read_cmvn(tmp_path / "global_cmvn", is_json=True)
    feats = np.concatenate([samples.read(i, 0).feats for i in range(2)])
    normalised = (feats - np.array(read.mean)) * np.array(read.istd)
    # float32 features of magnitude 10: sums in float64, so only the features' own rounding is left
    np.testing.assert_allclose(normalised.mean(axis=0), 0.0, atol=1e-5)
    np.testing.assert_allclose(normalised.std(axis=0), 1.0, atol=1e-5)


def test_a_recording_that_cannot_be_read_is_named_and_left_out_of_the_sums(tmp_path: Path):
    samples = recordings(tmp_path, 8000, 16000)
    whole = cmvn_sums(samples)
    (tmp_path / "1.wav").write_bytes(b"RIFF")
    without = cmvn_sums(samples)
    assert whole.left_out == ()
    assert [row.key for row in without.left_out] == ["1"]
    assert without.frame_num == len(samples.read(0, 0).feats) < whole.frame_num


def test_a_set_of_which_nothing_can_be_read_is_refused(tmp_path: Path):
    samples = recordings(tmp_path, 8000)
    (tmp_path / "0.wav").unlink()
    with pytest.raises(DataError, match=r"none of the 1 recordings can be read; the first: .*0\.wav"):
        cmvn_sums(samples)
