"""Durations are measured once; what is remembered counts only while the file is what it was, to the last bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest

from thawline.data import cache as keeping
from thawline.data import durations as module
from thawline.data.audio import duration_s
from thawline.data.durations import WORTH_KEEPING, Durations
from thawline.data.manifest import read_manifest
from thawline.data.speech import SpeechSamples
from thawline.data.speech_frontend import SpeechFrontend
from thawline.data.utterance import Utterance
from thawline.errors import DataError

soundfile = pytest.importorskip("soundfile", reason="the speech extra is not installed")

N = WORTH_KEEPING + 6
LONG_AGO_NS = 1_600_000_000_000_000_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder; files just written count as settled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_FRESH_NS", 0)
    return tmp_path / "cache" / "thawline"


def corpus(folder: Path, n: int = N) -> Path:
    folder.mkdir(exist_ok=True)
    rows = []
    for i in range(n):
        soundfile.write(folder / f"{i}.wav", np.full(801 + 7 * i, 0.1, np.float32), 8000)
        rows.append({"key": f"u{i}", "wav": f"{i}.wav", "txt": "one"})
    (folder / "data.list").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder / "data.list"


def durations(path: Path) -> tuple[list[float], int]:
    """Of every row, and how many headers were read for that."""
    manifest = read_manifest(path)
    measured = Durations.of(manifest.path)
    found = [measured.seconds(row) for row in manifest]
    measured.keep()
    return found, measured.measured


def test_a_list_is_measured_once_and_the_second_time_gives_the_same_bits(tmp_path: Path):
    path = corpus(tmp_path / "d")
    want = [duration_s(row) for row in read_manifest(path)]
    first, again = durations(path), durations(path)
    assert (first[1], again[1]) == (N, 0)
    for found in (first[0], again[0]):
        assert struct.pack(f"{N}d", *found) == struct.pack(f"{N}d", *want)


def test_the_samples_of_a_run_use_it(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    path = corpus(tmp_path / "d")
    read: list[str] = []
    whole = module.whole_s
    monkeypatch.setattr(module, "whole_s", lambda wav: read.append(wav) or whole(wav))
    one, two = (SpeechSamples(read_manifest(path), SpeechFrontend(), training=True) for _ in range(2))
    assert len(read) == N
    assert [one.length(i) for i in range(N)] == [two.length(i) for i in range(N)]
    assert one.fingerprint == two.fingerprint
    assert len(list((cache / "durations").iterdir())) == 1


def test_a_file_that_changed_is_measured_again(tmp_path: Path):
    path = corpus(tmp_path / "d")
    first, _ = durations(path)
    soundfile.write(tmp_path / "d/3.wav", np.full(4000, 0.1, np.float32), 8000)
    found, measured = durations(path)
    assert measured == 1
    assert (found[3], first[3]) == (0.5, 822 / 8000)


def test_the_same_size_and_a_forged_time_do_not_deceive(tmp_path: Path):
    path = corpus(tmp_path / "d")
    wav = tmp_path / "d/3.wav"
    before = wav.stat()
    durations(path)
    body = bytearray(wav.read_bytes())
    body[24:32] = struct.pack("<II", 16000, 32000)  # another rate: half as long, as many bytes
    wav.write_bytes(body)
    os.utime(wav, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert wav.stat().st_size == before.st_size
    assert durations(path)[0][3] == 822 / 16000


def test_a_file_just_written_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = corpus(tmp_path / "d")
    monkeypatch.setattr(module, "_FRESH_NS", 3600 * 10**9)
    assert durations(path)[1] == N
    assert durations(path)[1] == N


@pytest.mark.parametrize(
    "damage",
    [
        lambda body: b"",
        lambda body: body[:-1],
        lambda body: body.replace(b"0.100125", b"9.100125"),
        lambda body: b'{"x": 1}',
        lambda body: body.replace(b"durations 1", b"durations 0"),
        lambda body: b"\xff" * 100,
    ],
)
def test_what_is_torn_or_altered_is_noticed_and_replaced(tmp_path: Path, cache: Path, damage: object):
    path = corpus(tmp_path / "d")
    want, _ = durations(path)
    (kept,) = (cache / "durations").iterdir()
    whole = kept.read_bytes()
    damaged = damage(whole)  # type: ignore[operator]
    assert damaged != whole
    kept.write_bytes(damaged)
    assert durations(path) == (want, N)
    assert kept.read_bytes() == whole


def test_a_place_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = corpus(tmp_path / "d")
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    want, _ = durations(path)
    assert durations(path) == (want, N)
    monkeypatch.setattr(keeping, "folder", lambda: None)
    assert durations(path) == (want, N)


def test_a_short_list_leaves_nothing_behind(tmp_path: Path, cache: Path):
    durations(corpus(tmp_path / "d", 5))
    assert not cache.exists()


def test_two_lists_of_one_name_do_not_share_what_is_kept(tmp_path: Path, cache: Path):
    durations(corpus(tmp_path / "one"))
    durations(corpus(tmp_path / "two"))
    assert len(list((cache / "durations").iterdir())) == 2


def test_stretches_of_one_recording_read_its_header_once(tmp_path: Path):
    corpus(tmp_path / "d", 1)
    wav = str(tmp_path / "d/0.wav")
    measured = Durations(None)
    rows = [Utterance(key=f"{i}", wav=wav, start_s=i / 1000, end_s=(i + 9) / 1000) for i in range(20)]
    assert [measured.seconds(row) for row in rows] == [duration_s(row) for row in rows]
    assert measured.measured == 1
    with pytest.raises(DataError, match=r"the stretch begins at 1 s, the file ends at 0\.100125 s"):
        measured.seconds(Utterance(key="x", wav=wav, start_s=1.0))


def test_a_file_that_cannot_be_measured_is_asked_again_each_time(tmp_path: Path):
    path = corpus(tmp_path / "d")
    (tmp_path / "d/3.wav").write_bytes(b"RIFF")
    manifest = read_manifest(path)
    for _ in range(2):
        with pytest.raises(DataError, match=r"3\.wav"):
            Durations.of(manifest.path).seconds(manifest[3])


def _write_many(place: Path, mark: int) -> None:
    for i in range(200):
        assert keeping.keep(place, "test 1", {"mark": mark, "i": i, "filler": "x" * 20000})


def test_writers_beside_each_other_leave_one_whole_file(tmp_path: Path):
    place = tmp_path / "kept.json"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(place, mark)) for mark in range(3)]
    for writer in writers:
        writer.start()
    deadline = time.monotonic() + 60
    while not place.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    while any(writer.is_alive() for writer in writers):
        found = keeping.kept(place, "test 1")
        assert found is not None
        assert len(found["filler"]) == 20000
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert keeping.kept(place, "test 1")["i"] == 199
    assert [p.name for p in tmp_path.iterdir()] == ["kept.json"]
    assert keeping.kept(place, "test 2") is None


def test_what_is_kept_may_be_read_by_others_as_the_umask_allows(tmp_path: Path):
    keeping.keep(tmp_path / "kept.json", "test 1", [])
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "kept.json").stat().st_mode & 0o777 == 0o666 & ~umask
