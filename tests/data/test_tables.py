"""Arrow and Parquet tables are manifests like any other, but their rows stay on disk; bad ones name file and row."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path
from typing import Any

import pytest

from thawline.cli.app import run
from thawline.data.check import check_data
from thawline.data.loader import BatchRequest, Loader
from thawline.data.manifest import Manifest, read_manifest
from thawline.data.manifests import arrow_copy
from thawline.data.manifests.table_writing import write_table
from thawline.data.sampler import Batching, BatchPlan, Cursor
from thawline.data.speech import SpeechSamples
from thawline.data.speech_frontend import SpeechFrontend
from thawline.data.text import CharTokenizer, build_units
from thawline.data.utterance import Utterance
from thawline.errors import DataError, ThawlineError

np = pytest.importorskip("numpy")
pa = pytest.importorskip("pyarrow", reason="the extra `tables` is not installed")
pq = pytest.importorskip("pyarrow.parquet")
feather = pytest.importorskip("pyarrow.feather")
soundfile = pytest.importorskip("soundfile", reason="the speech extra is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "thawline"


ROWS = {
    "key": ["a", "b", "c"],
    "wav": ["a.wav", "b.wav", "sub/c.wav"],
    "txt": ["one", "two", "three"],
    "speaker": ["x", None, "y"],
    "start": [None, 0.5, 0.0],
    "end": [None, 1.5, None],
    "duration": [2.0, None, 1.25],
    "lang": ["en", "", "zh"],
    "task": [None, None, "translate"],
}
WANTED = [
    {"key": "a", "txt": "one", "speaker": "x", "duration_s": 2.0, "lang": "en"},
    {"key": "b", "txt": "two", "start_s": 0.5, "end_s": 1.5, "duration_s": 1.0},
    {
        "key": "c", "txt": "three", "speaker": "y", "start_s": 0.0, "end_s": 1.25, "duration_s": 1.25, "lang": "zh",
        "task": "translate",
    },
]  # fmt: skip


def wanted(folder: Path) -> list[Utterance]:
    names = ("a.wav", "b.wav", "sub/c.wav")
    return [Utterance(wav=str(folder / name), **row) for name, row in zip(names, WANTED, strict=True)]  # type: ignore[arg-type]


def sounds(folder: Path) -> Path:
    """Three files that exist."""
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    for name in ("a.wav", "b.wav", "sub/c.wav"):
        (folder / name).write_bytes(b"audio")
    return folder


def table(**columns: Any) -> Any:
    return pa.table({**ROWS, **columns})


def ipc(value: Any, path: Path, *, compression: str | None = None, rows: int | None = None) -> Path:
    with pa.ipc.new_file(str(path), value.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(value, max_chunksize=rows)
    return path


def stream(value: Any, path: Path) -> Path:
    with pa.ipc.new_stream(str(path), value.schema) as writer:
        writer.write_table(value)
    return path


def parquet(value: Any, path: Path) -> Path:
    pq.write_table(value, path, row_group_size=2)
    return path


def encoded(value: Any) -> Any:
    return value.set_column(3, "speaker", value["speaker"].dictionary_encode())


WRITERS = {
    "arrow": lambda v, p: ipc(v, p / "t.arrow"),
    "arrow in batches of one row": lambda v, p: ipc(v, p / "t.arrow", rows=1),
    "compressed": lambda v, p: ipc(v, p / "t.feather", compression="zstd"),
    "feather": lambda v, p: feather.write_feather(v, p / "t.feather") or p / "t.feather",
    "stream": lambda v, p: stream(v, p / "t.arrow"),
    "parquet": lambda v, p: parquet(v, p / "t.parquet"),
    "other types": lambda v, p: ipc(
        encoded(v).cast(
            pa.schema(
                [
                    (f.name, pa.large_string() if f.name == "txt" else pa.float32() if f.name == "duration" else f.type)
                    for f in encoded(v).schema
                ]
            )
        ),
        p / "t.arrow",
    ),
    "by its content": lambda v, p: ipc(v, p / "corpus.list"),
}


@pytest.mark.parametrize("kind", list(WRITERS))
def test_every_kind_of_table_gives_the_rows_that_a_list_gives(tmp_path: Path, kind: str):
    path = WRITERS[kind](table(), sounds(tmp_path))
    manifest = read_manifest(path)
    assert list(manifest) == wanted(tmp_path)
    assert [manifest[i] for i in (0, 1, 2)] == wanted(tmp_path)
    assert [manifest[-1], *manifest[:2]] == [wanted(tmp_path)[i] for i in (2, 0, 1)]
    assert manifest.format == ("parquet" if kind == "parquet" else "arrow")
    listed = tmp_path / "data.list"
    listed.write_text("".join(json.dumps(row) + "\n" for row in table().to_pylist()))
    assert list(read_manifest(listed)) == wanted(tmp_path)
    assert read_manifest(listed).fingerprint == manifest.fingerprint
    assert read_manifest(listed).keep([2, 0]).fingerprint == manifest.keep([2, 0]).fingerprint


def test_columns_may_have_the_names_that_other_lists_use_and_a_key_may_be_left_to_the_path(tmp_path: Path):
    sounds(tmp_path)
    value = pa.table({"file_name": ["a.wav", "sub/c.wav"], "sentence": [" one ", "cafe\u0301"], "extra": [1, 2]})
    manifest = read_manifest(ipc(value, tmp_path / "t.arrow"))
    assert [(r.key, r.txt) for r in manifest] == [("a", "one"), ("sub/c", "caf\u00e9")]


def test_the_audio_column_of_the_datasets_library_is_read_by_its_path(tmp_path: Path):
    sounds(tmp_path)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    outside = pa.table(
        {
            "audio": pa.array([{"bytes": None, "path": "a.wav"}, {"bytes": None, "path": "b.wav"}], kind),
            "text": ["x", "y"],
        }
    )
    for path in (parquet(outside, tmp_path / "t.parquet"), stream(outside, tmp_path / "t.arrow")):
        assert [Path(r.wav).name for r in read_manifest(path)] == ["a.wav", "b.wav"]
    inside = outside.set_column(0, "audio", pa.array([{"bytes": b"RIFF", "path": "a.wav"}] * 2, kind))
    for path in (parquet(inside, tmp_path / "t.parquet"), stream(inside, tmp_path / "t.arrow")):
        with pytest.raises(DataError, match=r"the sound itself lies in the column 'audio' \(bytes\)"):
            read_manifest(path)


# --- what is wrong ----------------------------------------------------------------------------------------------------


def without(*names: str) -> Any:
    return table().drop_columns(list(names))


WHOLE = [
    (without("wav"), "no column with the audio path; the columns are key, txt, speaker"),
    (without("txt"), "no column with the text; the columns are key, wav, speaker"),
    (table(txt=[1, 2, 3]), "the column 'txt' holds int64, not text"),
    (table(wav=[b"a", b"b", b"c"]), "the column 'wav' holds binary, not text"),
    (table(duration=["1", "2", "3"]), "the column 'duration' holds string, not times in seconds"),
    (table(duration=pa.array([1, 2, 3], pa.duration("s"))), "holds duration[s], not times in seconds"),
    (table().slice(0, 0), "there are no utterances in this"),
]


@pytest.mark.parametrize("write", [parquet, ipc])
@pytest.mark.parametrize(("value", "message"), WHOLE)
def test_a_table_that_cannot_be_meant_is_refused_as_a_whole(tmp_path: Path, write: Any, value: Any, message: str):
    path = write(value, sounds(tmp_path) / ("t.parquet" if write is parquet else "t.arrow"))
    with pytest.raises(DataError) as caught:
        read_manifest(path)
    assert message in str(caught.value)
    assert caught.value.where == str(path)


CELLS = [
    ({"key": ["a", None, "c"]}, "the cell 'key' is null"),
    ({"wav": ["a.wav", None, "c.wav"]}, "the cell 'wav' is null"),
    ({"wav": ["a.wav", "", "c.wav"]}, "the cell 'wav' is empty"),
    ({"wav": ["a.wav", "s3://b/x.wav", "c.wav"]}, "audio behind a network address is not read: 's3://b/x.wav'"),
    ({"wav": ["a.wav", "b\0.wav", "c.wav"]}, "no path can hold a NUL byte: 'b\\x00.wav'"),
    ({"key": ["a", "", "c"]}, "the cell 'key' is empty"),
    ({"txt": ["one", None, "three"]}, "the cell 'txt' is null"),
    ({"duration": [1.0, float("nan"), 1.0]}, "duration is not a time in seconds: nan"),
    ({"duration": [1.0, -2.0, 1.0]}, "duration is not a time in seconds: -2.0"),
    ({"start": [0.0, -0.5, 0.0]}, "start is not a time in seconds: -0.5"),
    ({"end": [9.0, float("inf"), 9.0]}, "end is not a time in seconds: inf"),
    ({"start": [0.0, 2.0, 0.0]}, "the stretch ends at 1.5 s, before it starts at 2 s"),
    ({"key": ["a", "a", "c"]}, "the key 'a' is there twice; first at row 1"),
    ({"key": ["caf\u00e9", "cafe\u0301", "c"]}, "the key 'caf\u00e9' is there twice; first at row 1"),
]


@pytest.mark.parametrize("write", [parquet, ipc])
@pytest.mark.parametrize(("columns", "message"), CELLS)
def test_a_bad_cell_names_its_row_and_costs_one_sample_where_that_is_asked(
    tmp_path: Path, write: Any, columns: dict[str, Any], message: str
):
    path = write(table(**columns), sounds(tmp_path) / ("t.parquet" if write is parquet else "t.arrow"))
    with pytest.raises(DataError) as caught:
        read_manifest(path)
    assert caught.value.where == f"{path}: row 2"
    assert message in str(caught.value)
    reported: list[DataError] = []
    manifest = read_manifest(path, report=reported.append)
    assert [e.where for e in reported] == [f"{path}: row 2"]
    assert [r.txt for r in manifest] == ["one", "three"]
    assert manifest[1].txt == "three"


def test_text_may_be_absent_where_it_is_optional(tmp_path: Path):
    sounds(tmp_path)
    assert [r.txt for r in read_manifest(ipc(without("txt"), tmp_path / "t.arrow"), text="optional")] == ["", "", ""]
    some = ipc(table(txt=["one", None, "three"]), tmp_path / "u.arrow")
    assert [r.txt for r in read_manifest(some, text="optional")] == ["one", "", "three"]


@pytest.mark.parametrize("write", [parquet, ipc, stream])
@pytest.mark.parametrize("keep", [0, 6, 40, 0.3, 0.6, 0.95])
def test_a_table_cut_short_is_refused_at_every_length(tmp_path: Path, write: Any, keep: float):
    path = write(table(), sounds(tmp_path) / ("t.parquet" if write is parquet else "t.arrow"))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep if keep > 1 else keep * len(whole))])
    with pytest.raises(DataError, match=r"damaged or cut short|is empty|neither Arrow nor Parquet"):
        read_manifest(path)


@pytest.mark.parametrize(("write", "stride"), [(ipc, 3), (stream, 11), (parquet, 17)])
def test_a_flipped_byte_is_refused_or_gives_rows_and_never_ends_the_process(tmp_path: Path, write: Any, stride: int):
    path = write(table(), sounds(tmp_path) / ("t.parquet" if write is parquet else "t.arrow"))
    program = f"""
        from pathlib import Path
        from thawline.data.manifest import read_manifest
        from thawline.errors import DataError
        path = Path({str(path)!r})
        whole = path.read_bytes()
        refused = 0
        for at in range(0, len(whole), {stride}):
            for mask in (0x01, 0x80, 0xFF):
                body = bytearray(whole)
                body[at] ^= mask
                path.write_bytes(body)
                try:
                    rows = list(read_manifest(path, report=lambda error: None))
                except DataError:
                    refused += 1
        print(refused)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 50


def test_a_table_that_changes_while_it_is_in_use_is_noticed_here_and_in_workers(tmp_path: Path):
    path = ipc(table(), sounds(tmp_path) / "t.arrow")
    manifest = read_manifest(path)
    elsewhere = pickle.dumps(manifest)
    assert list(pickle.loads(elsewhere)) == list(manifest)
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match="the table changed while it was in use"):
        [manifest[0] for _ in range(100)]
    with pytest.raises(DataError, match="the table changed while it was in use"):
        pickle.loads(elsewhere)


# --- copies of what cannot be mapped ----------------------------------------------------------------------------------


def test_a_parquet_table_is_copied_once_and_again_when_it_or_the_copy_changes(tmp_path: Path, cache: Path):
    path = parquet(table(), sounds(tmp_path) / "t.parquet")
    read_manifest(path)
    (copy,) = (cache / "tables").iterdir()
    before = copy.stat().st_mtime_ns
    assert list(read_manifest(path)) == wanted(tmp_path)
    assert copy.stat().st_mtime_ns == before
    body = copy.read_bytes()
    copy.write_bytes(body.replace(b"three", b"THREE"))
    assert list(read_manifest(path)) == wanted(tmp_path)
    assert copy.read_bytes() == body
    parquet(table(txt=["1", "2", "3"]), path)
    assert [r.txt for r in read_manifest(path)] == ["1", "2", "3"]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path):
    path = parquet(table(), sounds(tmp_path) / "t.parquet")
    (tmp_path / "file").write_text("")
    manifest = read_manifest(path, cache=tmp_path / "file")
    assert list(manifest) == wanted(tmp_path)
    assert not list(tmp_path.glob("**/*.making"))


def test_no_room_for_a_copy_anywhere_is_said_of_the_disk_and_not_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = parquet(table(), sounds(tmp_path) / "t.parquet")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(arrow_copy, "_made", full)
    with pytest.raises(ThawlineError, match="there is no room for a copy of this table") as caught:
        read_manifest(path)
    assert caught.value.exit_code == 1
    assert caught.value.where == str(path)
    assert "TMPDIR" in caught.value.fix


# --- the same corpus as a list and as a table -------------------------------------------------------------------------


def corpus(folder: Path, n: int = 40, *, durations: bool = False) -> Path:
    rows = []
    for i in range(n):
        seconds = 0.3 + 0.05 * ((7 * i) % 11)
        noise = np.random.default_rng(i).uniform(-0.3, 0.3, round(seconds * 8000)).astype(np.float32)
        soundfile.write(folder / f"{i}.wav", noise, 8000, subtype="FLOAT")
        row = {"key": f"u{i}", "wav": f"{i}.wav", "txt": "one two three"[: 3 + i % 8]}
        rows.append(row | ({"duration": seconds} if durations else {}))
    (folder / "data.list").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder / "data.list"


FRONTEND = SpeechFrontend.model_validate({"speed_perturb": True, "filter_conf": {"min_length": 35}})


def bits(path: Path, batching: Batching, workers: int = 0) -> tuple[str, list[Any]]:
    tokenizer = CharTokenizer(build_units(["one two three"]))
    samples = SpeechSamples(read_manifest(path), FRONTEND, tokenizer, training=True)
    plan = BatchPlan(len(samples), seed=3, batching=batching, length=samples.length)
    asked = (BatchRequest(epoch=1, cursor=c, ids=ids) for c, ids in plan.batches(Cursor(1)))
    with Loader(samples, seed=5, workers=workers) as loader:
        loaded = [b.batch for b in loader.iterate(asked)]
    return samples.fingerprint, [
        (b.keys, b.feats.numpy().tobytes(), b.target.tolist(), b.feats_lengths.tolist(), b.texts)
        for b in loaded
        if b is not None
    ]


@pytest.mark.parametrize("batching", [Batching(size=4), Batching(frames=400)])
def test_a_table_gives_the_batches_of_its_list_bit_for_bit_and_the_same_fingerprint(tmp_path: Path, batching: Batching):
    listed = corpus(tmp_path)
    assert run(["data", "table", str(listed), str(tmp_path / "t.arrow")]) == 0
    assert run(["data", "table", str(listed), str(tmp_path / "t.parquet")]) == 0
    want = bits(listed, batching)
    assert len(want[1]) > 4
    assert bits(tmp_path / "t.arrow", batching) == want
    assert bits(tmp_path / "t.parquet", batching) == want


def test_workers_map_the_table_themselves(tmp_path: Path):
    listed = corpus(tmp_path)
    assert run(["data", "table", str(listed), str(tmp_path / "t.arrow")]) == 0
    assert bits(tmp_path / "t.arrow", Batching(size=4), workers=2) == bits(listed, Batching(size=4))


def test_a_real_list_and_its_tables_are_the_same_data(shared: Path, tmp_path: Path):
    for name in ("fsdd/new.dev.list", "cmn-words/dev.list"):
        listed = read_manifest(shared / "data" / name)
        for suffix in ("arrow", "parquet"):
            out = tmp_path / f"t.{suffix}"
            assert run(["data", "table", str(shared / "data" / name), str(out), "--force"]) == 0
            assert list(read_manifest(out)) == list(listed)


# --- thawline data table ----------------------------------------------------------------------------------------------


def test_a_table_has_measured_durations_and_keeps_the_rows_of_files_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    listed = corpus(tmp_path, 3)
    (tmp_path / "1.wav").write_bytes(b"RIFF")
    assert run(["data", "table", str(listed), str(tmp_path / "t.arrow"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["utterances"], [row["key"] for row in said["unmeasured"]]) == (3, ["u1"])
    manifest = read_manifest(tmp_path / "t.arrow")
    assert [r.duration_s for r in manifest] == [0.3, None, 0.45]
    samples = SpeechSamples(manifest, SpeechFrontend(), None, training=True)
    assert [(left.key, left.unreadable) for left in samples.left_out] == [("u1", True)]
    assert samples.length(1) == pytest.approx(45)
    assert run(["data", "table", str(listed), str(tmp_path / "t.arrow")]) != 0
    assert "exists" in capsys.readouterr().err
    assert run(["data", "table", str(listed), str(tmp_path / "t.arrow"), "--force"]) == 0


def test_shards_can_be_put_into_a_table(tmp_path: Path):
    listed = corpus(tmp_path, 6)
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for i in range(6):
            archive.add(tmp_path / f"{i}.wav", f"./{i}.wav")
            (tmp_path / "t.txt").write_text("one two")
            archive.add(tmp_path / "t.txt", f"./{i}.txt")
    (tmp_path / "shards.list").write_text("s.tar\n")
    assert run(["data", "table", str(tmp_path / "shards.list"), str(tmp_path / "t.arrow")]) == 0
    want = read_manifest(tmp_path / "shards.list")
    table = read_manifest(tmp_path / "t.arrow")
    assert [r.wav for r in table] == [r.wav for r in want]
    assert table.fingerprint == want.fingerprint
    samples = SpeechSamples(table, SpeechFrontend(), None, training=True)
    alone = SpeechSamples(read_manifest(listed), SpeechFrontend(), None, training=False)
    evaluated = SpeechSamples(table, SpeechFrontend(), None, training=False)
    assert len(samples) == 6
    assert all(np.array_equal(evaluated.read(i, 0).feats, alone.read(i, 0).feats) for i in range(6))


def test_a_table_moves_with_its_audio(tmp_path: Path):
    (tmp_path / "one").mkdir()
    corpus(tmp_path / "one", 3)
    assert run(["data", "table", str(tmp_path / "one/data.list"), str(tmp_path / "one/t.arrow")]) == 0
    before = read_manifest(tmp_path / "one/t.arrow").fingerprint
    (tmp_path / "one").rename(tmp_path / "two")
    moved = read_manifest(tmp_path / "two/t.arrow")
    assert moved[0].wav == str(tmp_path / "two/0.wav")
    assert moved.fingerprint == before


def test_a_suffix_that_says_nothing_and_a_shell_command_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    listed = corpus(tmp_path, 1)
    assert run(["data", "table", str(listed), str(tmp_path / "t.csv")]) == 3
    assert "the suffix '.csv' does not say which kind of table is meant" in capsys.readouterr().err
    rows = [Utterance(key="a", wav="pipe:cat a.wav")]
    with (tmp_path / "x").open("wb") as file, pytest.raises(DataError, match="is made by a shell command"):
        write_table(Manifest(rows, path=listed, format="kaldi"), file, folder=tmp_path)
    rows = [Utterance(key="a", wav="/x/\udcff.wav")]
    with (tmp_path / "x").open("wb") as file, pytest.raises(DataError, match="holds Unicode only"):
        write_table(Manifest(rows, path=listed, format="folder"), file, folder=tmp_path)


def test_a_table_is_checked_like_a_list(tmp_path: Path):
    listed = corpus(tmp_path, 6)
    assert run(["data", "table", str(listed), str(tmp_path / "t.arrow")]) == 0
    (tmp_path / "2.wav").write_bytes(b"")
    of_list, of_table = check_data(listed).to_json(), check_data(tmp_path / "t.arrow").to_json()
    for report in (of_list, of_table):
        report.pop("path")
        report.pop("format")
    assert of_table == of_list
    assert [f["kind"] for f in of_table["findings"]] == ["file"]


def test_a_folder_that_holds_tables_names_them(tmp_path: Path):
    ipc(table(), tmp_path / "train.arrow")
    with pytest.raises(DataError, match=r"it holds train\.arrow: give one of them"):
        read_manifest(tmp_path)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path):
    path = ipc(table(), sounds(tmp_path) / "t.arrow")
    program = f"""
        import sys
        sys.modules["pyarrow"] = None
        from pathlib import Path
        from thawline.data.manifest import read_manifest
        from thawline.errors import MissingExtra
        try:
            read_manifest(Path({str(path)!r}))
        except MissingExtra as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert "'thawline[tables]'" in done.stdout, done.stderr


# --- size -------------------------------------------------------------------------------------------------------------

_BIG = """
    import sys
    from pathlib import Path

    def memory():
        rows = (line.split(":") for line in open("/proc/self/status") if line.startswith(("VmHWM", "VmRSS", "RssAnon")))
        return {name: int(value.split()[0]) // 1024 for name, value in rows}

    import json, numpy, pyarrow.compute
    from thawline.data.manifest import read_manifest
    from thawline.data.sampler import Batching, BatchPlan, Cursor
    before = memory()
    manifest = read_manifest(Path(sys.argv[1]))
    fingerprint = manifest.fingerprint
    plan = BatchPlan(len(manifest), seed=1, batching=Batching(size=100), length=None)
    batches = plan.batches(Cursor(7, 3, 0))
    keys = [manifest[i].key for _ in range(20) for i in next(batches)[1]]
    after = memory()
    print(json.dumps({"n": len(manifest), "grown": after["RssAnon"] - before["RssAnon"],
                      "most": after["VmHWM"] - before["VmRSS"], "keys": len(set(keys))}))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_million_rows_are_read_in_the_memory_of_a_few(tmp_path: Path):
    n = 2_000_000
    (tmp_path / "0.wav").write_bytes(b"audio")
    path = tmp_path / "big.arrow"
    schema = pa.schema([("key", pa.string()), ("wav", pa.string()), ("txt", pa.string()), ("duration", pa.float64())])
    with pa.ipc.new_file(str(path), schema) as writer:
        for begin in range(0, n, 500_000):
            rows = range(begin, begin + 500_000)
            words = [f"the transcript of utterance number {i}, in so many words" for i in rows]
            columns = [[f"u{i}" for i in rows], [f"{i}.wav" for i in rows], words, [1.0] * len(rows)]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    assert path.stat().st_size > 180e6
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_BIG), str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert (found["n"], found["keys"]) == (n, 2000)
    # Sixteen bytes a row while keys are compared (two arrays of hashes), and the texts of one piece of 65536 rows.
    assert found["grown"] < 60
    assert found["most"] < 180  # mapped pages among them, which the system may take back: not the whole file even so
