"""What the system throws at a verb ends in one sentence and an exit code, and never in a traceback."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from thawline.cli.app import VERBS, app, run
from thawline.cli.mishap import error_of, reader_left


def raising(exc: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """`thawline env` raises `exc`."""

    @click.command()
    @click.option("--json", "as_json", is_flag=True)
    def verb(as_json: bool) -> None:
        raise exc

    monkeypatch.setattr(type(app), "get_command", lambda self, ctx, name: verb)


SYSTEM: dict[str, tuple[BaseException, str]] = {
    "full disk": (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "/data/x: the system refuses: No space"),
    "permission": (
        PermissionError(errno.EACCES, "Permission denied", b"/data/x"),
        "fix: give this user the permission",
    ),
    "device": (OSError(errno.EIO, "Input/output error"), "fix: the device reports a fault"),
    "two names": (OSError(errno.EXDEV, "Invalid cross-device link", "a", None, "b"), "a -> b: the system refuses"),
    "a library's own words": (OSError("tiny does not appear to have a file named config.json"), "error: tiny does not"),
    "a pipe to a process of ours": (BrokenPipeError(errno.EPIPE, "Broken pipe"), "the system refuses: Broken pipe"),
    "memory": (MemoryError(), "error: memory ran out"),
    "memory, as torch says it": (RuntimeError("[enforce fail] can't allocate memory: 12 bytes"), "memory ran out"),
}


@pytest.mark.parametrize("case", SYSTEM)
def test_what_the_system_refuses_is_one_sentence_and_exit_code_one(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch  # noqa: F401  # its sentence about memory is known where it is imported

    exc, sentence = SYSTEM[case]
    raising(exc, monkeypatch)
    assert run(["env"]) == 1
    out, err = capsys.readouterr()
    assert sentence in err
    assert "Traceback" not in out + err
    assert run(["env", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["error"]
    assert found["exit_code"] == 1
    assert found["what"] in err
    assert found["fix"]


def test_a_mistake_in_the_program_is_raised_and_traceback_shows_where_anything_arose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for mistake in (RuntimeError("wrong shape"), EOFError("ran out of input"), KeyError("x")):
        raising(mistake, monkeypatch)
        with pytest.raises(type(mistake)):
            run(["env"])
    raising(OSError(errno.EIO, "Input/output error"), monkeypatch)
    with pytest.raises(OSError, match="Input/output error"):
        run(["--traceback", "env"])
    assert error_of(ValueError("x")) is None


def test_an_interruption_is_one_word_and_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(KeyboardInterrupt(), monkeypatch)
    assert run(["env", "--json"]) == 130
    out, err = capsys.readouterr()
    assert err == "error: interrupted\n"
    assert json.loads(out)["error"] == {"what": "interrupted", "where": "", "fix": "", "exit_code": 130}


def program(*argv: str) -> list[str]:
    return [sys.executable, "-m", "thawline", *argv]


def test_a_reader_that_leaves_is_no_error_and_says_nothing(tmp_path: Path) -> None:
    script = tmp_path / "much.py"
    script.write_text(
        "import sys\nfrom thawline.cli.app import run\nfrom thawline.cli import env\n"
        "env.give = lambda value, text, as_json: [print('x' * 1000) for _ in range(1000)]\n"
        "sys.exit(run(['env']))\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == b"x" * 1000 + b"\n"
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait(timeout=60) == 141


def test_a_closed_pipe_is_told_from_one_that_is_read(tmp_path: Path) -> None:
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        assert not reader_left([stream])
        os.close(read)
        assert reader_left([stream])
    with (tmp_path / "file").open("w") as file:
        assert not reader_left([file])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("argv", [["explain", "4"], ["explain", "4", "--json"]])
def test_an_output_that_cannot_be_written_is_named(argv: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(program(*argv), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: standard output: the system refuses: No space left on device\n  fix: free")
    assert done.stderr.count("\n") == 2


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_standard_stream_that_is_closed_changes_neither_the_exit_code_nor_what_the_others_hold(
    closed: tuple[int, ...], tmp_path: Path
) -> None:
    def ended(*argv: str) -> tuple[int, str, str]:
        closing = " ".join(f"{number}{'<' if number == 0 else '>'}&-" for number in closed)
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {closing}', "sh", *program(*argv)], capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout, done.stderr

    code, out, err = ended("explain", "4", "--json")
    assert (code, err) == (0, "")
    assert out == "" if 1 in closed else json.loads(out)
    code, out, err = ended("runs", str(tmp_path / "none"), "--json")
    assert code == 2
    assert out == "" if 1 in closed else json.loads(out)["error"]["exit_code"] == 2
    assert err == "" if 2 in closed else err.startswith("error: there is no folder")
    assert "Traceback" not in err


def test_control_c_outside_of_training_leaves_no_traceback(tmp_path: Path) -> None:
    fifo = tmp_path / "recipe.yaml"
    os.mkfifo(fifo)  # a recipe that never comes
    child = subprocess.Popen(program("plan", str(fifo)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with open(fifo, "w"):  # returns once the program has opened its end
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (130, "", "error: interrupted\n")


def test_the_shell_still_completes_verbs() -> None:
    environment: dict[str, Any] = {
        **os.environ, "_THAWLINE_COMPLETE": "bash_complete", "COMP_WORDS": "thawline tra", "COMP_CWORD": "1",
    }  # fmt: skip
    done = subprocess.run(program(), env=environment, capture_output=True, text=True, timeout=60)
    assert {"plain,train", "plain,transcribe"} == set(done.stdout.split())
    assert set(VERBS) >= {"train", "transcribe"}
