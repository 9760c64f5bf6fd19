"""Lists and folders of every kind become the same plain rows; bad ones stop with place, cause and fix."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from thawline.data.manifest import FORMATS, fill_durations, read_manifest
from thawline.data.manifests import tar_index as tar_index_module
from thawline.data.manifests.tar_index import tar_index
from thawline.data.utterance import TarRef, Utterance, pipe_command
from thawline.errors import DataError


def write(path: Path, text: str | bytes = b"audio") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def raw_list(folder: Path, *rows: dict[str, object]) -> Path:
    for row in rows:
        if "wav" in row and not str(row["wav"]).startswith("/"):
            write(folder / str(row["wav"]))
    return write(folder / "data.list", "".join(json.dumps(row) + "\n" for row in rows))


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return path


def brief(rows: object) -> list[tuple[str, str, str]]:
    return [(r.key, Path(r.wav).name, r.txt) for r in rows]  # type: ignore[attr-defined]


EXPECTED = [("a", "a.wav", "hello"), ("b", "b.wav", "good day")]


def make_raw(d: Path) -> Path:
    return raw_list(d, {"key": "a", "wav": "a.wav", "txt": "hello"}, {"key": "b", "wav": "b.wav", "txt": "good day"})


def make_kaldi(d: Path) -> Path:
    write(d / "a.wav")
    write(d / "wav.scp", f"a a.wav\nb {d}/b.wav\n")
    write(d / "text", "a hello\nb good day\n")
    return d


def make_audiofolder_csv(d: Path) -> Path:
    write(d / "a.wav")
    write(d / "metadata.csv", 'file_name,transcription\na.wav,hello\nb.wav,"good day"\n')
    return d


def make_audiofolder_jsonl(d: Path) -> Path:
    write(d / "a.wav")
    write(d / "metadata.jsonl", '{"file_name":"a.wav","text":"hello"}\n{"file_name":"b.wav","text":"good day"}\n')
    return d


def make_commonvoice(d: Path) -> Path:
    write(d / "clips/a.wav")
    return write(d / "train.tsv", "client_id\tpath\tsentence\nX\ta.wav\thello\nX\tb.wav\tgood day\n")


def make_folder(d: Path) -> Path:
    for key, text in (("a", "hello"), ("b", "good day\n")):
        write(d / f"{key}.wav")
        write(d / f"{key}.txt", text)
    return d


def make_jsonl(d: Path) -> Path:
    write(d / "a.wav")
    return write(d / "x.jsonl", '{"audio_filepath":"a.wav","text":"hello"}\n{"audio":"b.wav","sentence":"good day"}\n')


@pytest.mark.parametrize(
    ("make", "format"),
    [
        (make_raw, "raw"),
        (make_kaldi, "kaldi"),
        (make_audiofolder_csv, "audiofolder"),
        (make_audiofolder_jsonl, "audiofolder"),
        (make_commonvoice, "commonvoice"),
        (make_folder, "folder"),
        (make_jsonl, "jsonl"),
    ],
)
def test_every_format_is_recognised_and_gives_the_same_rows(tmp_path: Path, make: object, format: str):
    path = make(tmp_path / "d")  # type: ignore[operator]
    manifest = read_manifest(path)
    assert manifest.format == format
    assert brief(manifest) == EXPECTED
    assert all(os.path.isabs(r.wav) for r in manifest)
    assert brief(read_manifest(path, format=format)) == EXPECTED  # type: ignore[arg-type]


def test_a_raw_list_keeps_every_field(tmp_path: Path):
    write(tmp_path / "elsewhere.wav")
    path = raw_list(
        tmp_path / "lists",
        {
            "key": "a",
            "wav": str(tmp_path / "elsewhere.wav"),
            "txt": "x",
            "start": 1.5,
            "end": 4,
            "speaker": "s",
            "lang": "zh",
        },
        {"key": "b", "wav": "sub/../b.wav", "txt": "y", "duration": 2.5},
    )
    assert list(read_manifest(path)) == [
        Utterance(
            key="a", wav=str(tmp_path / "elsewhere.wav"), txt="x", speaker="s", lang="zh",
            start_s=1.5, end_s=4.0, duration_s=2.5,
        ),
        Utterance(key="b", wav=str(tmp_path / "lists/b.wav"), txt="y", duration_s=2.5),
    ]  # fmt: skip


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path: Path):
    body = make_raw(tmp_path).read_text()
    other = write(tmp_path / "w.list", b"\xef\xbb\xbf" + body.replace("\n", "\r\n").encode())
    assert brief(read_manifest(other)) == EXPECTED


def test_decomposed_and_composed_text_are_the_same_text_but_paths_stay_as_written(tmp_path: Path):
    composed, decomposed = "café", unicodedata.normalize("NFD", "café")
    path = raw_list(
        tmp_path,
        {"key": "a", "wav": f"{decomposed}.wav", "txt": decomposed},
        {"key": "b", "wav": f"{composed}.wav", "txt": composed},
    )
    a, b = read_manifest(path)
    assert a.txt == b.txt == composed
    assert a.wav.endswith(f"{decomposed}.wav")
    assert Path(a.wav).exists()


def test_a_unicode_line_separator_inside_a_text_does_not_end_the_line(tmp_path: Path):
    write(tmp_path / "a.wav")
    path = write(tmp_path / "x.list", '{"key":"a","wav":"a.wav","txt":"one\u2028two"}\n')
    assert read_manifest(path)[0].txt == "one\u2028two"


def test_a_missing_list_names_its_near_siblings(tmp_path: Path):
    make_raw(tmp_path)
    with pytest.raises(DataError) as caught:
        read_manifest(tmp_path / "dota.list")
    assert str(caught.value) == (
        f"{tmp_path}/dota.list: there is no 'dota.list' in {tmp_path}\n  fix: near it is: data.list"
    )
    assert caught.value.exit_code == 3


def test_a_missing_folder_is_named_where_it_breaks(tmp_path: Path):
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"there is no 'trian' in .*\n  fix: near it is: train"):
        read_manifest(tmp_path / "trian" / "data.list")


def test_an_unknown_file_lists_every_format_that_was_looked_for(tmp_path: Path):
    with pytest.raises(DataError) as caught:
        read_manifest(write(tmp_path / "x.list", "hello there\n"))
    assert "its first line is 'hello there'" in str(caught.value)
    assert all(name in str(caught.value) for name in FORMATS)


def test_a_folder_without_audio_names_the_lists_in_it(tmp_path: Path):
    make_raw(tmp_path).rename(tmp_path / "train.list")
    for wav in tmp_path.glob("*.wav"):
        wav.unlink()
    with pytest.raises(DataError, match=r"it holds train\.list: give one of them"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("body", [b"", b"\n\r\n", b"\xef\xbb\xbf\n"])
def test_an_empty_list_is_an_error(tmp_path: Path, body: bytes):
    with pytest.raises(DataError, match=r"x\.list: the list is empty"):
        read_manifest(write(tmp_path / "x.list", body))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"key": "c", "wav": "a.wav"}', "no text; the fields are key, wav\n  fix: name it 'txt'"),
        ('{"key": "c", "txt": "x"}', "no audio path; the fields are key, txt"),
        ('{"key": "c", "wav": "a.wav", "txt": "x"', "not JSON: Expecting ',' delimiter at column"),
        ("[1, 2]", "not a JSON object"),
        ('{"key": "a", "wav": "c.wav", "txt": "x"}', "the key 'a' is there twice; first at"),
        ('{"key": "c", "wav": "a.wav", "txt": "x", "start": 2, "end": 1}', "the stretch ends at 1 s, before it starts"),
        ('{"key": "c", "wav": "a.wav", "txt": "x", "start": "soon"}', "start is not a time in seconds: 'soon'"),
        ('{"key": "c", "wav": "a.wav", "txt": "x", "duration": -1}', "duration is not a time in seconds: -1"),
        ('{"key": "c", "wav": "s3://b/a.wav", "txt": "x"}', "audio behind a network address is not read"),
        ('{"key": "c", "wav": 7, "txt": "x"}', "the audio path is not a text: 7"),
        ('{"key": "c", "wav": "a.wav", "txt": ["x"]}', "the text is no string but list: ['x']"),
        ('{"key": "c", "wav": "a.wav", "txt": NaN}', "the text is no string but float: nan"),
        ('{"key": true, "wav": "a.wav", "txt": "x"}', "the key is no string but bool: True"),
        ('{"key": " ", "wav": "a.wav", "txt": "x"}', "the key is empty"),
        ('{"key": "c", "key": "d", "wav": "a.wav", "txt": "x"}', "not JSON: the field 'key' is there twice"),
        ('{"key": "c", "wav": "a\\u0000.wav", "txt": "x"}', "no path can hold a NUL byte"),
        ('{"key": "c", "wav": "a.wav", "txt": "\\ud800"}', "the text holds half of a surrogate pair: '\\ud800'"),
        ('{"key": "c", "wav": "a.wav", "txt": "x", "start": true}', "start is not a time in seconds: True"),
        ('{"key": "c", "wav": "a.wav", "txt": "x", "duration": NaN}', "duration is not a time in seconds: nan"),
        ('{"key": "c", "wav": "a.wav", "txt": "x", "start": -0.1}', "start is not a time in seconds: -0.1"),
        ('{"key": "c", "start": ' + "9" * 5000 + "}", "not JSON: Exceeds the limit"),
        ('{"key": ' + "[" * 100_000, "not JSON: maximum recursion depth exceeded"),
    ],
)
def test_a_bad_line_is_named_and_costs_one_sample_where_that_is_asked(tmp_path: Path, line: str, message: str):
    path = make_raw(tmp_path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError) as caught:
        read_manifest(path)
    assert caught.value.where == f"{path}:3"
    assert message in str(caught.value)
    reported: list[DataError] = []
    assert brief(read_manifest(path, report=reported.append)) == EXPECTED
    assert [e.where for e in reported] == [f"{path}:3"]


def test_text_may_be_absent_where_it_is_optional_and_empty_where_it_is_not(tmp_path: Path):
    path = raw_list(tmp_path, {"key": "a", "wav": "a.wav"}, {"key": "b", "wav": "b.wav", "txt": " "})
    assert [r.txt for r in read_manifest(path, text="optional")] == ["", ""]
    path = raw_list(tmp_path, {"key": "b", "wav": "b.wav", "txt": " "})
    assert read_manifest(path)[0].txt == ""


def test_a_list_that_is_not_utf8_names_line_and_byte(tmp_path: Path):
    path = make_raw(tmp_path)
    path.write_bytes(path.read_bytes() + '{"key":"c","wav":"a.wav","txt":"你好"}'.encode("gb18030"))
    with pytest.raises(DataError, match=r"data\.list:3: not UTF-8: byte 0x.. at column \d+\n  fix: convert the file"):
        read_manifest(path)


def test_a_list_in_utf16_says_so(tmp_path: Path):
    path = make_raw(tmp_path)
    path.write_bytes(path.read_text().encode("utf-16"))
    with pytest.raises(DataError, match=r"\(UTF-16\)\n  fix: convert the file, e\.g\. iconv -f UTF-16 -t UTF-8"):
        read_manifest(path)


@pytest.mark.parametrize(
    ("body", "where", "message"),
    [
        ('a.wav,"x\nb.wav,y\n', 2, r"a quoted cell does not end\n  fix: close the quote"),
        ('a.wav,"x" y\n', 2, "not a table from here: ',' expected after '\"'"),
        ("a.wav," + "x" * 200_000, 2, "not a table from here: field larger than field limit"),
    ],
)
def test_a_csv_with_an_open_quote_does_not_swallow_its_other_rows(tmp_path: Path, body: str, where: int, message: str):
    write(tmp_path / "a.wav")
    path = write(tmp_path / "metadata.csv", "file_name,text\n" + body)
    with pytest.raises(DataError, match=message) as caught:
        read_manifest(path)
    assert caught.value.where == f"{path}:{where}"


def test_two_columns_of_one_name_are_refused(tmp_path: Path):
    write(tmp_path / "a.wav")
    path = write(tmp_path / "metadata.csv", "file_name,text,text\na.wav,x,y\n")
    with pytest.raises(DataError, match=r"metadata\.csv:1: two columns are called 'text'"):
        read_manifest(path)


def test_a_list_moved_away_from_its_audio_is_refused_at_once(tmp_path: Path):
    path = make_raw(tmp_path / "here")
    there = tmp_path / "there"
    there.mkdir()
    path = path.rename(there / "data.list")
    with pytest.raises(
        DataError, match=r"none of the first 2 audio files exists; of '.*/there/a.wav' there is '.*/there'"
    ):
        read_manifest(path)


def test_the_fingerprint_follows_content_and_not_place(tmp_path: Path):
    one = read_manifest(make_raw(tmp_path / "one"))
    two = read_manifest(make_raw(tmp_path / "two"))
    other = read_manifest(
        raw_list(
            tmp_path / "three",
            {"key": "a", "wav": "a.wav", "txt": "hello"},
            {"key": "b", "wav": "b.wav", "txt": "good days"},
        )
    )
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert one.keep([1, 0]).fingerprint != one.fingerprint == one.keep([0, 1]).fingerprint


def test_durations_are_measured_only_where_the_list_is_silent(tmp_path: Path):
    path = raw_list(
        tmp_path, {"key": "a", "wav": "a.wav", "txt": "x", "duration": 1.0}, {"key": "b", "wav": "b.wav", "txt": "y"}
    )
    asked: list[str] = []

    def measure(row: Utterance) -> float:
        asked.append(row.key)
        return 9.0

    filled = fill_durations(read_manifest(path), measure)
    assert [r.duration_s for r in filled] == [1.0, 9.0]
    assert asked == ["b"]
    assert filled.fingerprint == read_manifest(path).fingerprint


# --- Kaldi ------------------------------------------------------------------------------------------------------------


def test_kaldi_segments_cut_recordings_and_carry_speakers(tmp_path: Path):
    write(tmp_path / "rec.wav")
    write(tmp_path / "wav.scp", "rec rec.wav\n")
    write(tmp_path / "text", "u1 hello\nu2 你好 世界\n")
    write(tmp_path / "segments", "u1 rec 0.5 1.75\nu2 rec 2 -1\n")
    write(tmp_path / "utt2spk", "u1 s1\nu2 s2\n")
    assert [(r.key, r.txt, r.start_s, r.end_s, r.duration_s, r.speaker) for r in read_manifest(tmp_path)] == [
        ("u1", "hello", 0.5, 1.75, 1.25, "s1"),
        ("u2", "你好 世界", 2.0, None, None, "s2"),
    ]


def test_a_pipe_in_wav_scp_is_refused_unless_allowed(tmp_path: Path):
    write(tmp_path / "wav.scp", "a sph2pipe -f wav a.sph |\n")
    write(tmp_path / "text", "a hello\n")
    with pytest.raises(DataError) as caught:
        read_manifest(tmp_path)
    assert "names a shell command, which is not run: 'sph2pipe -f wav a.sph |'" in str(caught.value)
    assert caught.value.where == f"{tmp_path}/wav.scp:1"
    row = read_manifest(tmp_path, allow_pipes=True)[0]
    assert pipe_command(row.wav) == "sph2pipe -f wav a.sph"


def test_no_other_list_can_smuggle_in_a_command(tmp_path: Path):
    path = raw_list(tmp_path, {"key": "a", "wav": "pipe:touch x", "txt": "x"})
    assert pipe_command(read_manifest(path)[0].wav) is None


@pytest.mark.parametrize(
    ("file", "body", "message"),
    [
        ("text", "a hello\n", r"the utterance 'b' has no line in"),
        ("wav.scp", "a a.wav\na b.wav\n", r"the key 'a' is there twice"),
        ("segments", "u1 nothing 0 1\n", r"the recording 'nothing' is not in wav.scp"),
        ("segments", "u1 a 2 1\n", r"the segment ends at 1 s, before it starts at 2 s"),
        ("segments", "u1 a 2\n", r"not a segment: 'u1 a 2'"),
        ("wav.scp", "a raw.ark:123\n", r"audio inside a Kaldi archive is not read"),
    ],
)
def test_a_broken_kaldi_directory_says_what_is_wrong(tmp_path: Path, file: str, body: str, message: str):
    make_kaldi(tmp_path)
    write(tmp_path / file, body)
    with pytest.raises(DataError, match=message):
        read_manifest(tmp_path)


def test_a_kaldi_directory_without_text_is_an_error_where_text_is_needed(tmp_path: Path):
    make_kaldi(tmp_path)
    (tmp_path / "text").unlink()
    with pytest.raises(DataError, match="needs 'text'"):
        read_manifest(tmp_path)
    assert [r.txt for r in read_manifest(tmp_path, text="optional")] == ["", ""]


# --- tables and folders -----------------------------------------------------------------------------------------------


def test_common_voice_keeps_speaker_language_and_measured_durations(tmp_path: Path):
    write(tmp_path / "clips/a.mp3")
    write(tmp_path / "clip_durations.tsv", "clip\tduration[ms]\na.mp3\t4536\n")
    path = write(
        tmp_path / "train.tsv",
        'client_id\tpath\tsentence_id\tsentence\tlocale\nC1\ta.mp3\t\t"Quoted", he said.\tde\n',
    )
    row = read_manifest(path)[0]
    assert (row.speaker, row.lang, row.duration_s, row.txt) == ("C1", "de", 4.536, '"Quoted", he said.')
    with pytest.raises(DataError, match=r"several tables\n  fix: give one of: clip_durations.tsv, train.tsv"):
        read_manifest(tmp_path)


def test_a_table_without_a_text_column_says_which_columns_it_has(tmp_path: Path):
    write(tmp_path / "a.wav")
    path = write(tmp_path / "metadata.csv", "file_name,label\na.wav,1\n")
    with pytest.raises(DataError, match="no column with the text; the columns are file_name, label"):
        read_manifest(path)


def test_a_quoted_line_break_in_a_csv_is_part_of_the_text(tmp_path: Path):
    write(tmp_path / "a.wav")
    path = write(tmp_path / "metadata.csv", 'file_name,text\r\na.wav,"one\r\ntwo"\r\n')
    assert read_manifest(path)[0].txt == "one\ntwo"


def test_a_folder_is_read_to_its_depth_in_a_fixed_order(tmp_path: Path):
    for name in ("b/x", "a/y", "c"):
        write(tmp_path / f"{name}.flac")
        write(tmp_path / f"{name}.txt", name)
    assert [r.key for r in read_manifest(tmp_path)] == ["c", "a/y", "b/x"]


def test_audio_without_a_text_beside_it_is_named(tmp_path: Path):
    make_folder(tmp_path)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(DataError, match=r"b\.wav: no text: there is no 'b\.txt' beside it"):
        read_manifest(tmp_path)
    assert len(read_manifest(tmp_path, text="optional")) == 2


def test_an_audio_file_is_not_a_list(tmp_path: Path):
    with pytest.raises(DataError, match="an audio file, not a list"):
        read_manifest(write(tmp_path / "a.wav"))


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ("u1 rec -1 2", "not times in seconds: -1 and 2"),
        ("u1 rec nan 2", "not times in seconds: nan and 2"),
        ("u1 rec 0 inf", "not times in seconds: 0 and inf"),
        ("u1 rec 0 2 1", "a segment of one channel ('1') is not read"),
    ],
)
def test_a_segment_that_cannot_be_meant_is_named(tmp_path: Path, segment: str, message: str):
    write(tmp_path / "rec.wav")
    write(tmp_path / "wav.scp", "rec rec.wav\n")
    write(tmp_path / "text", "u1 hello\nu2 you\n")
    write(tmp_path / "segments", f"{segment}\nu2 rec 0 1\n")
    reported: list[DataError] = []
    assert [r.key for r in read_manifest(tmp_path, report=reported.append)] == ["u2"]
    assert [e.where for e in reported] == [f"{tmp_path}/segments:1"]
    assert message in str(reported[0])


def test_a_bad_duration_and_a_key_without_a_path_cost_a_kaldi_directory_one_utterance_each(tmp_path: Path):
    write(tmp_path / "a.wav")
    write(tmp_path / "wav.scp", "a a.wav\nb\nc a.wav\n")
    write(tmp_path / "text", "a x\nb y\nc z\n")
    write(tmp_path / "utt2dur", "a long\nc 1.5\n")
    reported: list[DataError] = []
    assert [(r.key, r.duration_s) for r in read_manifest(tmp_path, report=reported.append)] == [("c", 1.5)]
    assert [str(e).splitlines()[0] for e in reported] == [
        f"{tmp_path}/utt2dur:1: utt2dur is not a time in seconds: 'long'",
        f"{tmp_path}/wav.scp:2: no audio path after the key",
    ]


# --- shards -----------------------------------------------------------------------------------------------------------


def make_shards(folder: Path) -> Path:
    shard(folder / "s0.tar", {"a.wav": b"AAAA", "a.txt": b"hello", "b.wav": b"BBBBBB", "b.txt": "你好\n".encode()})
    shard(folder / "s1.tar", {"sub/c.flac": b"C" * 1000, "sub/c.txt": b"bye"})
    return write(folder / "shards.list", "s0.tar\ns1.tar\n")


def test_a_shard_list_gives_references_that_are_read_by_offset(tmp_path: Path):
    manifest = read_manifest(make_shards(tmp_path))
    assert manifest.format == "shard"
    assert [(r.key, r.txt) for r in manifest] == [("a", "hello"), ("b", "你好"), ("sub/c", "bye")]
    bodies = []
    for row in manifest:
        ref = TarRef.parse(row.wav)
        assert ref is not None
        assert str(ref) == row.wav
        with open(ref.tar, "rb") as file:
            file.seek(ref.offset)
            bodies.append(file.read(ref.size))
    assert bodies == [b"AAAA", b"BBBBBB", b"C" * 1000]


def test_a_shard_is_scanned_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = make_shards(tmp_path)
    scanned: list[str] = []
    scan = tar_index_module._scan
    monkeypatch.setattr(tar_index_module, "_scan", lambda tar: scanned.append(tar.name) or scan(tar))
    first = list(read_manifest(path))
    assert scanned == ["s0.tar", "s1.tar"]
    assert list(read_manifest(path)) == first
    assert scanned == ["s0.tar", "s1.tar"]
    os.utime(tmp_path / "s0.tar", ns=(1, 1))
    assert list(read_manifest(path)) == first
    assert scanned == ["s0.tar", "s1.tar", "s0.tar"]


@pytest.mark.parametrize("damage", [lambda b: b[:20], lambda b: b"", lambda b: b.replace(b"hello", b"hallo")])
def test_a_damaged_index_is_noticed_and_replaced(tmp_path: Path, damage: Callable[[bytes], bytes]):
    path = make_shards(tmp_path)
    first = list(read_manifest(path))
    index = tmp_path / "s0.tar.index.json"
    whole = index.read_bytes()
    index.write_bytes(damage(whole))
    assert list(read_manifest(path)) == first
    assert index.read_bytes() == whole


def test_an_index_goes_to_the_given_folder_and_a_place_that_cannot_be_written_is_no_error(tmp_path: Path):
    path = make_shards(tmp_path / "data")
    read_manifest(path, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert not list((tmp_path / "data").glob("*.json"))
    blocked = write(tmp_path / "a_file")
    assert len(read_manifest(path, cache=blocked / "cache")) == 3


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.wav": b"A"}, "no text: there is no a.txt in the tar\n  fix: write the shard again with both members"),
        ({"a.txt": b"A"}, "the text a.txt has no audio of the same name in the tar"),
        ({"../a.wav": b"A", "../a.txt": b"x"}, "this member names a path outside the tar"),
        ({"/etc/a.wav": b"A"}, "this member names a path outside the tar"),
        ({"a.wav": b"A", "a.flac": b"A"}, "the key 'a' has two audio members"),
        ({"a.wav": b"A", "a.txt": b"\xff\xfe"}, "not UTF-8: byte 0xff"),
    ],
)
def test_a_bad_shard_says_which_member_is_wrong(tmp_path: Path, members: dict[str, bytes], message: str):
    path = shard(tmp_path / "s.tar", members)
    with pytest.raises(DataError) as caught:
        read_manifest(path)
    assert message in str(caught.value)
    assert caught.value.where.startswith(f"{path}!/")


def test_a_link_inside_a_shard_is_refused(tmp_path: Path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.wav")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match="a link or a special file"):
        read_manifest(path)


@pytest.mark.parametrize("keep", [700, 1024 + 300])
def test_a_shard_cut_short_is_detected(tmp_path: Path, keep: int):
    path = shard(tmp_path / "s.tar", {"a.txt": b"x", "a.wav": b"A" * 5000})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"s\.tar: this tar is damaged|cut short|no audio of the same name"):
        read_manifest(path)


def test_a_compressed_shard_says_what_to_do(tmp_path: Path):
    with tarfile.open(tmp_path / "s.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.wav"))
    with pytest.raises(DataError, match=r"compressed and cannot be read by offset\n  fix: unpack it"):
        tar_index(tmp_path / "s.tar")


def test_a_shard_that_is_missing_is_named_at_its_line(tmp_path: Path):
    path = make_shards(tmp_path)
    path.write_text("s0.tar\ns7.tar\n")
    with pytest.raises(DataError, match=r"shards\.list:2: there is no 's7\.tar' in .*\n  fix: near it are: s1.tar"):
        read_manifest(path)


# --- real lists -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rows", "first"),
    [
        ("fsdd/base.train.list", 1350, "zero"),
        ("an4/train.list", 824, "c z d z w eight"),
        ("cmn-words/dev.list", 281, "军备"),
    ],
)
def test_real_lists_are_read_with_durations(shared: Path, name: str, rows: int, first: str):
    manifest = read_manifest(shared / "data" / name)
    assert len(manifest) == rows
    assert manifest[0].txt == first
    assert all(r.duration_s and os.path.exists(r.wav) for r in manifest)


def test_the_module_does_not_import_torch_or_numpy():
    code = "import sys, thawline.data.manifest\nassert not {'torch', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_list_is_not_answered_with_hidden_files(tmp_path: Path):
    (tmp_path / ".cache").mkdir()
    (tmp_path / "train.list").write_text("{}")
    with pytest.raises(DataError) as caught:
        read_manifest(tmp_path / "zzz")
    assert caught.value.fix == "there is: train.list"
