"""`check_data`: what is wrong with a set of recordings, found before training on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from thawline.data.check import check_data
from thawline.data.text import build_units, units_text
from thawline.errors import DataError

soundfile = pytest.importorskip("soundfile", reason="the speech extra is not installed")


def add(folder: Path, name: str, *rows: tuple[str, float, str], **extra: object) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    with path.open("a") as file:
        for key, seconds, text in rows:
            wav = folder / f"{name}-{key}.wav"
            noise = np.random.default_rng(len(list(folder.iterdir()))).uniform(-0.3, 0.3, round(seconds * 16000))
            soundfile.write(wav, noise, 16000)
            file.write(json.dumps({"key": key, "wav": wav.name, "txt": text, "duration": seconds} | extra) + "\n")
    return path


def kinds(report: object) -> list[str]:
    return [f.kind for f in report.findings]  # type: ignore[attr-defined]


def test_a_sound_set_is_described(tmp_path: Path):
    path = add(tmp_path, "train.list", ("a", 0.7, "ab"), ("b", 1.5, "abc"), ("c", 1.8, ""), speaker="s1")
    report = check_data(path)
    assert (report.format, report.utterances, report.speakers, report.characters) == ("raw", 3, 1, 3)
    assert report.hours == pytest.approx(4 / 3600)
    assert report.empty_texts == 1
    assert report.histogram == {"0-0.5": 0, "0.5-1": 1, "1-2": 2}
    assert report.rates_hz == {16000: 3}
    assert report.findings == ()
    assert report.table().startswith(f"{path}: raw, 3 utterances, 0.00 hours, 1 speakers\n")
    assert "nothing to complain of" in report.table()
    assert json.loads(json.dumps(report.to_json()))["histogram"]["1-2"] == 2


def test_everything_that_is_wrong_is_found_at_once(tmp_path: Path):
    path = add(tmp_path, "train.list", ("a", 1.0, "ab"), ("b", 1.0, "ab"), ("c", 1.0, "ab"), ("d", 1.0, "ab" * 30))
    (tmp_path / "train.list-b.wav").write_bytes(b"")
    wav = (tmp_path / "train.list-c.wav").read_bytes()
    soundfile.write(tmp_path / "train.list-c.wav", soundfile.read(tmp_path / "train.list-c.wav")[0][:8000], 16000)
    assert wav
    with path.open("a") as file:
        file.write('{"key": "a", "wav": "train.list-a.wav", "txt": "x"}\n{"key": "e"}\n')
    (tmp_path / "units.txt").write_text(units_text(build_units(["a"])))
    report = check_data(path, units=tmp_path / "units.txt")
    assert kinds(report) == ["row", "row", "file", "duration", "ctc"]
    assert "the key 'a' is there twice" in report.findings[0].what
    assert report.findings[1].where == f"{path}:6"
    assert report.findings[2].what == "the file is empty (0 bytes)"
    assert report.findings[3].what == "0.50 s, the list says 1.00 s; is the sample rate in its header right?"
    assert report.findings[4].what == "60 tokens need 60 encoder frames, it has 23"
    assert (report.tokens, report.unknown) == (66, {"b": 33})
    assert len(report.bad) == 3
    table = report.table()
    assert "33 of 66 tokens (50.00%) are outside it" in table
    assert "rows that cannot be used: 2" in table
    assert "targets too long for CTC: 1" in table


def test_held_back_data_that_training_sees_are_found_by_key_file_and_sound(tmp_path: Path):
    train = add(tmp_path, "train.list", ("a", 1.0, "x"), ("b", 1.0, "y"), ("c", 1.0, "z"), speaker="s")
    valid = add(tmp_path, "valid.list", ("a", 1.0, "x"), ("d", 1.0, "w"), speaker="s")
    with valid.open("a") as file:
        file.write('{"key": "same-file", "wav": "train.list-b.wav", "txt": "y"}\n')
        copy = tmp_path / "copy.flac"
        soundfile.write(copy, soundfile.read(tmp_path / "train.list-c.wav")[0], 16000)  # another file, the same sound
        file.write('{"key": "same-sound", "wav": "copy.flac", "txt": "q"}\n')
    report = check_data(train, valid=valid)
    assert [(f.kind, f.where) for f in report.findings] == [
        ("leak", "a"),
        ("leak", "same-file"),
        ("leak", "same-sound"),
    ]
    assert report.findings[2].what == "the same recording is in training as c"
    assert report.overlap == {"speakers": 1, "texts": 2}


def test_long_lists_of_findings_are_cut_in_the_table_and_whole_in_json(tmp_path: Path):
    path = add(tmp_path, "train.list", ("a", 0.5, "x"))
    with path.open("a") as file:
        file.writelines(f'{{"key": "m{i}", "wav": "none{i}.wav", "txt": "x"}}\n' for i in range(30))
    report = check_data(path)
    assert "and 10 more (--json lists all)" in report.table()
    assert len(report.to_json()["findings"]) == 30


def test_no_data_at_all_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match="there is no 'train.list'".replace(".", r"\.")):
        check_data(tmp_path / "train.list")


def test_progress_is_told(tmp_path: Path):
    seen: list[tuple[int, int]] = []
    path = add(tmp_path, "train.list", ("a", 0.5, "x"), ("b", 0.5, "x"))
    check_data(path, progress=lambda i, n: seen.append((i, n)))
    assert seen == [(0, 2), (1, 2)]


def test_a_real_set_is_sound_but_for_what_is_known(shared: Path):
    data = shared / "data/fsdd"
    report = check_data(data / "new.train.list", valid=data / "new.dev.list")
    assert report.utterances == 450
    assert report.rates_hz == {8000: 450}
    assert not report.bad


def test_whole_numbers_that_were_written_as_floating_point_are_noticed(tmp_path: Path):
    path = add(tmp_path, "train.list", ("a", 1.0, "ab"), ("b", 1.0, "ab"))
    loud = np.random.default_rng(1).uniform(-9000, 9000, 16000).astype(np.float32)
    soundfile.write(tmp_path / "train.list-b.wav", loud, 16000, subtype="FLOAT")
    report = check_data(path)
    assert kinds(report) == ["scale"]
    assert "where 1 is full scale; were whole numbers written as floating point?" in report.findings[0].what
