"""Every kind of bad recording and bad list, each with its message: before training, in training, and in recognition."""

from __future__ import annotations

import io
import json
import tarfile
import unicodedata
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.cli.speech_fixture import write_all, write_wav

from thawline.cli.app import run

soundfile = pytest.importorskip("soundfile")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe whose training list has twelve good utterances."""
    return write_all(tmp_path)


def call(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    code = run([str(word) for word in argv])
    out = capsys.readouterr()
    assert "Traceback" not in out.out + out.err
    return code, out.out, out.err


def add(recipe: Path, **row: Any) -> None:
    with (recipe.parent / "train.list").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["event"] == kind]


# --- recordings ---


def nothing(path: Path) -> None:
    """The file that a list names and nobody brought."""


def zero_bytes(path: Path) -> None:
    path.write_bytes(b"")


def zero_samples(path: Path) -> None:
    soundfile.write(path, np.zeros(0, np.float32), 8000)


def truncated_flac(path: Path) -> None:
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 8000), 8000, format="FLAC")
    path.write_bytes(path.read_bytes()[:6000])


def wrong_rate(path: Path) -> None:
    write_wav(path, 0.7, 300)
    whole = path.read_bytes()
    path.write_bytes(whole[:24] + (44100).to_bytes(4, "little") + whole[28:])


def not_a_number(path: Path) -> None:
    soundfile.write(path, np.array([0.0, np.nan] * 4000, np.float32), 8000, subtype="FLOAT")


RECORDINGS = [
    (nothing, "there is no such file"),
    (zero_bytes, "the file is empty (0 bytes)"),
    (zero_samples, "there are no samples in it"),
    (truncated_flac, "it is damaged or cut short"),
    (wrong_rate, "the header contradicts itself: 44100 Hz of 2 bytes is not 16000 bytes per second"),
    (not_a_number, "sample 1 of 8000 is nan, not a number that can be heard"),
]


@pytest.mark.parametrize(("make", "message"), RECORDINGS)
def test_a_bad_recording_is_found_by_data_check(
    recipe: Path, make: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make(recipe.parent / "bad.wav")
    add(recipe, key="bad", wav="bad.wav", txt="a b")
    code, out, _ = call(capsys, "data", "check", recipe.parent / "train.list", "--json")
    assert code == 0
    findings = json.loads(out)["findings"]
    assert [f["kind"] for f in findings] == ["file"]
    assert message in findings[0]["what"]
    assert findings[0]["where"].endswith("bad.wav")


@pytest.mark.parametrize(("make", "message"), RECORDINGS)
def test_a_bad_recording_costs_training_one_sample_which_is_listed(
    recipe: Path, make: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make(recipe.parent / "bad.wav")
    add(recipe, key="bad", wav="bad.wav", txt="a b")
    place = recipe.parent / "run"
    code, _, err = call(capsys, "train", recipe, "run.epochs=1", "data.max_bad=0.2", "--run", place)
    assert code == 0, err
    listed = events(place, "bad sample")
    assert [row["key"] for row in listed] == ["bad"]
    assert message in listed[0]["reason"]
    assert "left out sample bad" in err


@pytest.mark.parametrize(("make", "message"), RECORDINGS[1:])
def test_a_bad_recording_ends_transcribe_with_three(
    recipe: Path, make: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make(recipe.parent / "bad.wav")
    code, _, err = call(capsys, "transcribe", recipe.parent / "base", recipe.parent / "bad.wav")
    assert code == 3
    assert message in err
    assert "bad.wav" in err


def five_frames(path: Path) -> None:
    soundfile.write(path, np.zeros(200 + 4 * 80, np.float32) + 0.01, 8000)


@pytest.mark.parametrize("mode", [(), ("--mode", "attention")])
def test_a_recording_too_short_for_the_encoder_is_named_whatever_is_decoded_beside_it(
    recipe: Path, mode: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    five_frames(recipe.parent / "short.wav")
    write_wav(recipe.parent / "whole.wav", 0.7, 300)
    for beside in ((), (recipe.parent / "whole.wav",)):
        code, _, err = call(capsys, "transcribe", recipe.parent / "base", recipe.parent / "short.wav", *beside, *mode)
        assert code == 3
        assert "short.wav: 520 samples at 8000 Hz are less than one frame of the encoder" in err


def test_an_utterance_too_short_for_the_encoder_costs_an_evaluation_one_sample(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    five_frames(recipe.parent / "short.wav")
    write_wav(recipe.parent / "whole.wav", 0.7, 300)
    rows = [{"key": name, "wav": f"{name}.wav", "txt": "a b"} for name in ("short", "whole")]
    (recipe.parent / "two.list").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # One a batch: alone it would have ended the evaluation.
    code, out, _ = call(
        capsys, "evaluate", recipe.parent / "base", recipe.parent / "two.list", "--batch", "1", "--json"
    )
    assert code == 0
    found = json.loads(out)
    assert (found["utterances"], found["unreadable"]) == (2, 1)


def three_hours(path: Path) -> None:
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(1)
        out.setframerate(1000)
        out.writeframes(bytes([128]) * (3 * 3600 * 1000))


def test_a_three_hour_file_is_never_held_in_memory_whole(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    three_hours(recipe.parent / "long.wav")
    add(recipe, key="long", wav="long.wav", txt="a b")
    train = recipe.parent / "train.list"
    _, out, _ = call(capsys, "data", "check", train, "--json")
    finding = json.loads(out)["findings"][0]
    assert (finding["kind"], finding["what"]) == ("long", "3.00 hours in one utterance; not decoded here")
    code, _, err = call(capsys, "train", recipe, "run.epochs=1", "--run", recipe.parent / "run")
    assert code == 0, err
    assert (
        "1.08e+06 frames of 10 ms are more than max_length 2000"
        in events(recipe.parent / "run", "filtered")[0]["first"]
    )
    code, out, _ = call(capsys, "evaluate", recipe.parent / "base", train, "--json", "--out", recipe.parent / "rows")
    assert (code, json.loads(out)["unreadable"]) == (0, 1)
    last = json.loads((recipe.parent / "rows").read_text().splitlines()[-1])
    assert "3.00 hours are too much for one utterance" in last["unreadable"]
    code, _, err = call(capsys, "transcribe", recipe.parent / "base", recipe.parent / "long.wav")
    assert code == 3
    assert "3.00 hours are more than the limit of 2.00" in err


# --- texts ---


def test_what_the_units_cannot_spell_is_counted_before_training(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wav(recipe.parent / "odd.wav", 0.7, 300)
    add(recipe, key="odd", wav="odd.wav", txt="xa xb")
    for option in (("--units", recipe.parent / "base" / "units.txt"), ("--model", recipe.parent / "base")):
        _, out, _ = call(capsys, "data", "check", recipe.parent / "train.list", *option)
        assert "2 of 41 tokens (4.88%) are outside it\n    'x' 2" in out
    _, _, err = call(capsys, "train", recipe, "run.epochs=1", "--run", recipe.parent / "run")
    assert "2 of 41 tokens are outside the vocabulary and become <unk>: 'x' 2" in err


def test_a_target_longer_than_its_encoder_frames_is_told_before_training(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wav(recipe.parent / "fast.wav", 0.5, 300)
    add(recipe, key="fast", wav="fast.wav", txt="abcdefghabcdefgg")
    _, out, _ = call(capsys, "data", "check", recipe.parent / "train.list", "--model", recipe.parent / "base")
    assert "fast: 16 tokens need 17 encoder frames, it has 11" in out
    _, _, err = call(capsys, "train", recipe, "run.epochs=1", "--run", recipe.parent / "run")
    assert "1 of 13 targets are longer than CTC can align, and teach CTC nothing; the first, fast: 16 tokens" in err


def test_an_empty_text_is_counted_and_left_out_of_training(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(recipe, key="empty", wav="train0.wav", txt="  ")
    _, out, _ = call(capsys, "data", "check", recipe.parent / "train.list", "--json")
    assert json.loads(out)["empty_texts"] == 1
    code, _, err = call(capsys, "train", recipe, "run.epochs=1", "--run", recipe.parent / "run")
    assert code == 0, err
    assert "0 tokens are fewer than token_min_length 1" in err
    code, out, _ = call(capsys, "evaluate", recipe.parent / "base", recipe.parent / "train.list", "--json")
    assert (code, json.loads(out)["utterances"]) == (0, 13)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_chinese_and_accents_are_the_same_text_in_either_form(
    recipe: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = unicodedata.normalize(form, "が 金 é")  # U+F90A is 金 in NFC
    (recipe.parent / "base" / "units.txt").write_text(
        "".join(f"{unit} {i}\n" for i, unit in enumerate(["<blank>", "<unk>", "<sos/eos>", "▁", *"がé金abcde"])),
        encoding="utf-8",
    )
    (recipe.parent / "train.list").write_text("", encoding="utf-8")
    add(recipe, key="one", wav="train0.wav", txt=text)
    add(recipe, key="two", wav="train1.wav", txt="\uf90a")
    _, out, _ = call(capsys, "data", "check", recipe.parent / "train.list", "--model", recipe.parent / "base", "--json")
    found = json.loads(out)
    assert (found["tokens"], found["unknown"], found["characters"]) == (6, {}, 4)


# --- lists ---


def test_windows_line_ends_and_a_byte_order_mark_train_the_same_run(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(capsys, "train", recipe, "run.epochs=1", "--run", recipe.parent / "unix")
    body = (recipe.parent / "train.list").read_bytes()
    (recipe.parent / "train.list").write_bytes(b"\xef\xbb\xbf" + body.replace(b"\n", b"\r\n"))
    code, _, err = call(capsys, "train", recipe, "run.epochs=1", "--run", recipe.parent / "windows")
    assert code == 0, err
    unix, windows = (recipe.parent / name / "model" / "final.pt" for name in ("unix", "windows"))
    assert unix.read_bytes() == windows.read_bytes()


def test_a_key_that_is_there_twice_ends_in_three_with_both_places(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(recipe, key="train3", wav="train0.wav", txt="a")
    train = recipe.parent / "train.list"
    message = f"the key 'train3' is there twice; first at {train}:4"
    _, out, _ = call(capsys, "data", "check", train, "--json")
    assert json.loads(out)["findings"] == [{"kind": "row", "where": f"{train}:13", "what": message}]
    code, _, err = call(capsys, "train", recipe, "--run", recipe.parent / "run")
    assert code == 3
    assert message in err
    assert f"{train}:13" in err


def test_commands_of_a_kaldi_directory_run_only_where_that_is_allowed(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kaldi = recipe.parent / "kaldi"
    kaldi.mkdir()
    ran = recipe.parent / "ran"
    command = f"touch {ran}; cat {recipe.parent / 'train0.wav'} |"
    (kaldi / "wav.scp").write_text(f"one {command}\n")
    (kaldi / "text").write_text("one a d\n")
    refusal = "wav.scp names a shell command, which is not run"
    looking = [("data", "check", kaldi), ("evaluate", recipe.parent / "base", kaldi)]
    training = ("train", recipe, f"data.train={kaldi}", "run.epochs=1")
    for argv in [*looking, (*training, "--run", recipe.parent / "run")]:
        code, _, err = call(capsys, *argv)
        assert (code, refusal in err, ran.exists()) == (3, True, False)
    for argv in looking:
        code, _, err = call(capsys, *argv, "--allow-pipes")
        assert (code, ran.exists()) == (0, True), err
        ran.unlink()
    code, _, err = call(capsys, *training, "options.allow_pipes=true", "--run", recipe.parent / "piped")
    assert code == 0, err
    ran.unlink()
    code, _, _ = call(capsys, "evaluate", recipe.parent / "piped", kaldi)  # what a run was allowed is not inherited
    assert (code, ran.exists()) == (3, False)


def shard(folder: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(folder / "one.tar", "w") as tar:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    (folder / "train.list").write_text("one.tar\n")


@pytest.mark.parametrize(
    ("leave", "more", "message"),
    [
        ("train0.wav", {}, "the text train0.txt has no audio of the same name in the tar"),
        ("train0.txt", {}, "no text: there is no train0.txt in the tar"),
        ("", {"../../etc/passwd.wav": b"x"}, "this member names a path outside the tar"),
        ("", {"/etc/passwd.txt": b"x"}, "this member names a path outside the tar"),
    ],
)
def test_a_bad_shard_ends_in_three_and_is_found_by_data_check(
    recipe: Path, leave: str, more: dict[str, bytes], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    members = {f"train{i}.{kind}": body for i in range(2) for kind, body in (
        ("wav", (recipe.parent / f"train{i}.wav").read_bytes()), ("txt", b"a b"))}  # fmt: skip
    shard(recipe.parent, {name: body for name, body in (members | more).items() if name != leave})
    code, _, err = call(capsys, "train", recipe, "--run", recipe.parent / "run")
    assert code == 3
    assert message in err
    code, out, _ = call(capsys, "data", "check", recipe.parent / "train.list", "--json")
    assert message in out
    assert code == (3 if more else 0)  # with such a member nothing of the shard is read, and nothing is left


# --- options and places that cannot be meant ---


@pytest.mark.parametrize(
    "option", [("--limit", "0"), ("--limit", "-1"), ("--batch", "0"), ("--workers", "-1")], ids=lambda o: " ".join(o)
)
def test_numbers_that_cannot_be_meant_are_refused_by_evaluate(
    recipe: Path, option: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, "evaluate", recipe.parent / "base", recipe.parent / "dev.list", *option, "--json")
    assert code == 2
    assert f"Invalid value for '{option[0]}'" in json.loads(out)["error"]["what"]


@pytest.mark.parametrize("option", ["--out", "--html"])
def test_a_place_where_evaluate_cannot_write_is_named(
    recipe: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipe.parent / "file").write_text("not a folder")
    place = recipe.parent / "file" / "result"
    code, out, _ = call(capsys, "evaluate", recipe.parent / "base", recipe.parent / "dev.list", option, place, "--json")
    assert code == 4
    assert json.loads(out)["error"]["where"] == str(place)


def test_a_place_where_transcribe_and_init_cannot_write_is_named(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipe.parent / "file").write_text("not a folder")
    write_wav(recipe.parent / "whole.wav", 0.7, 300)
    code, _, err = call(
        capsys,
        "transcribe",
        recipe.parent / "base",
        recipe.parent / "whole.wav",
        "--srt",
        "--out",
        recipe.parent / "file",
    )
    assert code == 4
    assert f"{recipe.parent / 'file'}: cannot write: Not a directory" in err
    code, _, err = call(capsys, "init", recipe.parent / "base", "-o", recipe.parent / "file" / "r.yaml")
    assert code == 4
    assert str(recipe.parent / "file" / "r.yaml") in err
