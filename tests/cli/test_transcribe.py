"""`thawline transcribe` and `thawline evaluate`: forms of output, options, refusals with their exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.cli.speech_fixture import write_all, write_chunk_model, write_wav

from thawline.cli.app import run

SAYS_SOMETHING = ("--blank-penalty", "20")  # of an untrained model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("transcribe")
    write_all(place)
    return place


def call(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    code = run([str(word) for word in argv])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize("mode", ["ctc_greedy_search", "ctc_prefix_beam_search", "attention", "attention_rescoring"])
def test_every_mode_prints_one_json_object_with_times(
    folder: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(
        capsys, "transcribe", folder / "base", folder / "dev0.wav", folder / "dev1.wav", "--json", "--times",
        "--mode", mode, "--beam", "4", "--ctc-weight", "0.3", *SAYS_SOMETHING,
    )  # fmt: skip
    assert (code, err) == (0, "")
    rows = json.loads(out)["transcripts"]
    assert [Path(row["file"]).name for row in rows] == ["dev0.wav", "dev1.wav"]
    for row in rows:
        assert " ".join(word["text"] for word in row["words"]).split() == row["text"].split()
        assert isinstance(row["score"], float)


@pytest.mark.parametrize("mode", ["ctc_greedy_search", "attention_rescoring"])
def test_streaming_with_caches_prints_what_the_chunk_mask_prints(
    folder: Path, tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_chunk_model(tmp_path / "chunked")
    argv = ("transcribe", model, folder / "dev3.wav", "--mode", mode, "--blank-penalty", "5", "--json", "--times")
    found = []
    for more in ((), ("--streaming",)):
        code, out, _ = call(capsys, *argv, "--chunk-size", "4", "--left-chunks", "2", *more)
        assert code == 0
        row = json.loads(out)["transcripts"][0]
        found.append((row["text"], row["tokens"], row["token_times"], pytest.approx(row["score"], abs=1e-4)))
    assert found[0] == found[1]
    assert found[0][0]
    code, _, err = call(capsys, *argv, "--streaming")
    assert code == 2
    assert "streaming needs a chunk size" in err


def test_subtitles_go_to_standard_output_or_into_a_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, "transcribe", folder / "base", folder / "dev0.wav", "--srt", *SAYS_SOMETHING)
    assert code == 0
    assert out.startswith("1\n00:00:0")
    code, out, _ = call(
        capsys,
        "transcribe",
        folder / "base",
        folder / "dev0.wav",
        folder / "dev1.wav",
        "--vtt",
        "--out",
        tmp_path / "v",
    )
    assert code == 0
    assert sorted(p.name for p in (tmp_path / "v").iterdir()) == ["dev0.vtt", "dev1.vtt"]
    assert (tmp_path / "v" / "dev0.vtt").read_text().startswith("WEBVTT\n\n")


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """A folder with recordings at two depths, among other things."""
    place = tmp_path / "album"
    (place / "b" / "c").mkdir(parents=True)
    for name in ("b/c/one.wav", "b/two.WAV", "three.wav"):
        write_wav(place / name, 0.6, 200)
    (place / "three.txt").write_text("a b")
    (place / "._three.wav").write_bytes(b"what macOS adds")
    return place


def test_a_folder_stands_for_all_recordings_below_it_sorted(
    album: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, "transcribe", folder / "base", album, folder / "dev0.wav", "--json")
    assert code == 0
    files = [row["file"] for row in json.loads(out)["transcripts"]]
    below = [str(album / name) for name in ("three.wav", "b/two.WAV", "b/c/one.wav")]
    assert files == [*below, str(folder / "dev0.wav")]
    code, out, _ = call(capsys, "transcribe", folder / "base", album / "b" / "c", *SAYS_SOMETHING)
    assert code == 0
    assert out.startswith(f"{album / 'b' / 'c' / 'one.wav'}\t")  # one file, but found and not named


def test_subtitles_keep_the_tree_of_the_folder_and_none_is_written_over_another(
    album: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, "transcribe", folder / "base", album, "--srt", "--out", tmp_path / "v")
    assert code == 0, err
    written = sorted(str(p.relative_to(tmp_path / "v")) for p in (tmp_path / "v").rglob("*.srt"))
    assert written == ["b/c/one.srt", "b/two.srt", "three.srt"]
    write_wav(album / "b" / "two.aiff", 0.6, 300)
    code, _, err = call(capsys, "transcribe", folder / "base", album, "--srt", "--out", tmp_path / "w")
    assert code == 2
    assert f"two.WAV and {album / 'b' / 'two.aiff'} would both be written to {tmp_path / 'w' / 'b' / 'two.srt'}" in err
    code, _, err = call(capsys, "transcribe", folder / "base", album, "--srt")
    assert code == 2
    assert "--out DIR" in err


def test_what_is_a_list_and_no_recording_is_sent_to_evaluate(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, "transcribe", folder / "base", folder / "dev.list")
    assert code == 3
    assert "this is a list of recordings and no recording: WeNet raw list\n" in err
    assert f"fix: `thawline evaluate MODEL {folder / 'dev.list'}` decodes what a list names" in err
    kaldi = tmp_path / "kaldi"
    kaldi.mkdir()
    (kaldi / "wav.scp").write_text(f"a {folder / 'dev0.wav'}\n")
    code, _, err = call(capsys, "transcribe", folder / "base", kaldi)
    assert code == 3
    assert "there is no audio file in this folder: it is a Kaldi directory" in err
    assert f"`thawline evaluate MODEL {kaldi}`" in err
    (tmp_path / "empty").mkdir()
    code, _, err = call(capsys, "transcribe", folder / "base", tmp_path / "empty")
    assert code == 3
    assert "there is no audio file in it\n  fix: audio is told by its name: .aac .aif" in err


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--mode", "ctc_gready"], 2, "'ctc_gready' is not one of"),
        (["--beem", "3"], 2, "'--beam'"),
        (["--beam", "0"], 2, "0 is not in the range x>=1"),
        (["--json", "--srt"], 2, "--json, --srt and --vtt exclude each other"),
        (["--out", "x"], 2, "--out is for --srt or --vtt"),
        (["--mode", "whisper"], 2, "mode whisper is for Whisper"),
        (["--chunk-size", "4"], 2, "this model knows full context only"),
        (["--mode", "attention_rescoring", "--reverse-weight", "0.3"], 2, "this model has no right-to-left decoder"),
        (["--fallback"], 2, "fallback is for Whisper alone"),
        (["--hotword", "xyz", "--mode", "attention_rescoring"], 2, "cannot be spelled with this model's units"),
        (["--max-minutes", "0.001"], 3, "hours are more than the limit"),
        (["--max-minutes", "-1"], 2, "-1.0 is not in the range x>0"),
        (["--batch", "0"], 2, "0 is not in the range x>=1"),
        (["--task", "translate"], 2, "this model cannot translate"),
    ],
)
def test_what_cannot_be_meant_is_an_error(
    folder: Path, argv: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, out, err = call(capsys, "transcribe", folder / "base", folder / "dev0.wav", *argv)
    assert found == code
    assert message in err
    assert "Traceback" not in out + err


def broken(folder: Path, tmp_path: Path) -> dict[str, Path]:
    """One of each kind of bad recording."""
    whole = (folder / "dev0.wav").read_bytes()
    files = {
        "missing": tmp_path / "missing.wav",
        "empty": tmp_path / "empty.wav",
        "header_only": tmp_path / "header_only.wav",
        "cut": tmp_path / "cut.wav",
        "rate": tmp_path / "rate.wav",
        "nan": tmp_path / "nan.wav",
        "flac": tmp_path / "cut.flac",
        "text": tmp_path / "text.wav",
    }
    soundfile = pytest.importorskip("soundfile")
    files["empty"].write_bytes(b"")
    soundfile.write(files["header_only"], np.zeros(0, np.float32), 8000)
    files["cut"].write_bytes(whole[: len(whole) // 2])
    files["rate"].write_bytes(whole[:24] + (3).to_bytes(4, "little") + whole[28:])
    soundfile.write(files["nan"], np.array([0.0, np.nan] * 4000, np.float32), 8000, subtype="FLOAT")
    soundfile.write(files["flac"], np.random.RandomState(0).uniform(-0.5, 0.5, 8000), 8000)
    files["flac"].write_bytes(files["flac"].read_bytes()[:6000])
    files["text"].write_text("this is no audio at all, whatever its name says" * 3)
    return files


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such audio file"),
        ("empty", "the file is empty (0 bytes)"),
        ("header_only", "there are no samples in it"),
        ("cut", "it is cut short: the header promises"),
        ("rate", "the header contradicts itself: 3 Hz"),
        ("nan", "sample 1 of 8000 is nan, not a number that can be heard"),
        ("flac", "cut short"),
        ("text", "not audio in a known format"),
    ],
)
def test_a_bad_recording_ends_in_three_and_is_named(
    folder: Path, tmp_path: Path, kind: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = broken(folder, tmp_path)[kind]
    code, out, err = call(capsys, "transcribe", folder / "base", file)
    assert code == 3
    assert message in err
    assert file.name in err
    assert "Traceback" not in out + err


# --- evaluate ---


def test_evaluate_counts_what_it_cannot_read_and_shows_the_errors(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = broken(folder, tmp_path)
    rows = [json.loads(line) for line in (folder / "dev.list").read_text().splitlines()]
    rows = [{**row, "wav": str(folder / row["wav"])} for row in rows]
    rows += [{"key": kind, "wav": str(path), "txt": "a b"} for kind, path in files.items()]
    data = tmp_path / "dev.list"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = call(
        capsys, "evaluate", folder / "base", data, "--json", "--html", tmp_path / "page.html", "--out",
        tmp_path / "rows.jsonl",
    )  # fmt: skip
    assert code == 0
    found = json.loads(out)
    assert found["utterances"] == len(rows)
    assert found["unreadable"] == len(files)
    assert {"wer", "cer", "words", "errors"} <= set(found)
    listed = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["key"] for row in listed] == [row["key"] for row in rows]
    assert all(row["errors"] == 2 and row["hyp"] == "" for row in listed if row.get("unreadable"))
    assert [word["op"] for word in listed[-1]["alignment"]] == ["delete", "delete"]
    deleted = {row["ref"]: row["count"] for row in found["errors"]["delete"]}
    assert deleted["a"] >= len(files)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<section>") == len(rows)
    assert page.count('<audio controls preload="none" src="data:audio/wav;base64,') >= 4
    assert "there is no such file" in page
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched from elsewhere


def test_evaluate_for_people_ends_with_the_commonest_errors(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "evaluate", folder / "base", folder / "dev.list", "--normalizer", "basic")
    assert code == 0
    assert out.startswith("WER ")
    assert "delete" in out or "substitute" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mode", "greedy"], "'greedy' is not one of"),
        (["--normalizer", "loud"], "'loud' is not one of"),
        (["--bean", "2"], "'--beam'"),
    ],
)
def test_evaluate_refuses_unknown_modes_and_options_with_two(
    folder: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, "evaluate", folder / "base", folder / "dev.list", *argv)
    assert code == 2
    assert message in err


def test_scores_of_a_mode_do_not_depend_on_the_batch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Any] = []
    for batch in ("1", "4"):
        out = folder / f"rows{batch}.jsonl"
        code, _, _ = call(
            capsys, "evaluate", folder / "base", folder / "dev.list", "--batch", batch, "--out", out, "--mode",
            "ctc_prefix_beam_search", "--beam", "3", *SAYS_SOMETHING,
        )  # fmt: skip
        assert code == 0
        rows.append([json.loads(line)["hyp"] for line in out.read_text().splitlines()])
    assert rows[0] == rows[1]


# --- data check ---


def test_data_check_reports_bad_files_windows_line_ends_and_both_forms_of_unicode(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wav(tmp_path / "a.wav", 0.5, 300)
    rows = [
        {"key": "composed", "wav": "a.wav", "txt": "caf\u00e9 \u6c49"},
        {"key": "decomposed", "wav": "a.wav", "txt": "cafe\u0301 \u6c49"},
        {"key": "empty", "wav": "a.wav", "txt": ""},
        {"key": "gone", "wav": "gone.wav", "txt": "a"},
    ]
    body = "\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    (tmp_path / "x.list").write_bytes(body.encode())
    code, out, _ = call(capsys, "data", "check", tmp_path / "x.list", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["utterances"] == 4
    assert found["empty_texts"] == 1
    assert found["characters"] == len(set("caf\u00e9 \u6c49a"))
    assert any("gone.wav" in f["where"] for f in found["findings"])
    (tmp_path / "twice.list").write_text("".join(json.dumps(rows[0]) + "\n" for _ in range(2)))
    code, out, err = call(capsys, "data", "check", tmp_path / "twice.list")
    assert code == 0
    assert "the key 'composed' is there twice" in out
    code, _, err = call(capsys, "data", "check", tmp_path / "y.list")
    assert code == 3
    assert "x.list" in err or "twice.list" in err


@pytest.mark.parametrize("name", ["an4/dev.list", "fsdd/new.dev.list", "cmn-words/dev.list"])
def test_data_check_of_the_real_sets_finds_nothing_bad(
    shared: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, "data", "check", shared / "data" / name, "--json")
    assert code == 0
    found = json.loads(out)
    assert [f for f in found["findings"] if f["kind"] in ("row", "file")] == []
    assert found["utterances"] == len((shared / "data" / name).read_text(encoding="utf-8").splitlines())
    assert sum(found["histogram"].values()) == found["utterances"]


def test_help_of_the_verbs_imports_no_torch() -> None:
    program = (
        "import sys; from thawline.cli.app import run\n"
        "for verb in ('transcribe', 'evaluate', 'serve'): run([verb, '--help'])\n"
        "assert 'torch' not in sys.modules and 'fastapi' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_link_that_leads_nowhere_is_called_that(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone.wav").symlink_to("elsewhere.wav")
    code, _, err = call(capsys, "transcribe", folder / "base", tmp_path)
    assert code == 3
    assert f"{tmp_path / 'gone.wav'}: is a link to elsewhere.wav, which is not there" in err
