"""What somebody meets who types the wrong thing: each verb with nothing, with what is not there, in a narrow window."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.guidance import options
from tests.cli.speech_fixture import write_all

from thawline.cli.app import VERBS, run

WITHOUT_ARGUMENTS = {"demo", "env", "runs"}


def call(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    capsys.readouterr()
    code = run([str(word) for word in argv])
    out = capsys.readouterr()
    assert "Traceback" not in out.out + out.err
    return code, out.out, out.err


def test_the_program_alone_shows_its_verbs_once_and_ends_in_two(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys)
    assert (code, out) == (2, "")
    assert err.startswith("Usage: thawline [OPTIONS] COMMAND [ARGS]...\n")
    assert err.count("Usage") == 1
    code, out, _ = call(capsys, "data")
    assert code == 2
    code, out, _ = call(capsys, "data", "--json")
    assert json.loads(out)["error"]["exit_code"] == 2


@pytest.mark.parametrize("verb", sorted(set(VERBS) - WITHOUT_ARGUMENTS - {"data"}))
def test_a_verb_without_arguments_says_what_is_missing(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, verb)
    assert code == 2
    assert err.startswith(f"error: Usage: thawline {verb} [OPTIONS] ")
    assert "Missing argument '" in err


@pytest.mark.parametrize("verb", list(VERBS))
def test_an_unknown_option_is_refused_as_json_too(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, verb, "--sevreal", "--json")
    assert code == 2
    assert "--sevreal" in err
    if "--json" in options(verb):
        assert json.loads(out)["error"]["exit_code"] == 2


ONE_PLACE = {
    "audit": (), "convert": ("x.pt", "--to", "torch"), "diff": ("b",), "evaluate": ("data.list",), "export": ("x",),
    "average": ("x", "--last", "2"), "init": (), "plan": (), "report": (), "resume": (), "runs": (), "train": (),
    "verify": (), "predict": ("x.png",),
}  # fmt: skip


@pytest.mark.parametrize("verb", ONE_PLACE)
def test_a_place_that_is_not_there_is_named(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = call(capsys, verb, "nowhere", *ONE_PLACE[verb])
    assert code in (2, 3, 4)
    assert "nowhere" in err
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_for_a_run_and_a_run_for_a_recipe_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_all(tmp_path)
    made = tmp_path / "run"
    assert call(capsys, "train", recipe, "run.steps=1", "--run", made)[0] == 0
    for argv, code, words in (
        (("train", made), 2, f"this is a run, and not a recipe\n  fix: `thawline resume {made}` goes on with it"),
        (
            ("train", tmp_path / "base"),
            2,
            f"this is a folder, and not a recipe\n  fix: `thawline init {tmp_path}/base`",
        ),
        (("resume", recipe), 2, f"`thawline train {recipe}`"),
        (("plan", made), 2, f"this is a run\n  fix: its plan: `thawline plan {made}/recipe.yaml`"),
        (("transcribe", recipe, tmp_path / "dev0.wav"), 4, "this describes a run or a model, and is none"),
        (("init", tmp_path / "bass", "-o", tmp_path / "n.yaml"), 4, "no such file or directory\n  fix: did you mean"),
        (("plan", tmp_path / "bass"), 4, "no such file or directory\n  fix: did you mean"),
    ):
        found, _, err = call(capsys, *argv)
        assert found == code, err
        assert words in err


@pytest.mark.parametrize("verb", list(VERBS))
def test_help_fits_a_terminal_of_forty_columns(verb: str) -> None:
    environment = {**os.environ, "COLUMNS": "40", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "thawline", verb, "--help"], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 0
    assert "\x1b" not in done.stdout
    # A word that is longer than the window stands over; nothing else does by more than an option's name.
    assert [line for line in done.stdout.splitlines() if len(line) > 60] == []


def test_a_folder_that_may_not_be_written_is_named_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_all(tmp_path)
    closed = tmp_path / "closed"
    closed.mkdir()
    monkeypatch.setattr(
        os, "access", lambda path, mode: not mode & os.W_OK or Path(path) != closed
    )  # root writes anywhere
    base, wav = tmp_path / "nowhere", tmp_path / "dev0.wav"
    for argv in (
        ("evaluate", base, tmp_path / "dev.list", "--out", closed / "deep" / "rows.jsonl"),
        ("evaluate", base, tmp_path / "dev.list", "--html", closed / "page.html"),
        ("transcribe", base, wav, "--srt", "--out", closed),
    ):
        code, _, err = call(capsys, *argv)
        assert code == 4
        assert f"error: {argv[-1]}: cannot write: Permission denied" in err
