"""File names that are not UTF-8: people see their bytes, JSON and pages hold each such byte as \\udcXX."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.speech_fixture import RECIPE, write_all, write_wav

from thawline.cli.output import json_text

LATIN1 = os.fsdecode(b"caf\xe9")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_all(tmp_path)
    (tmp_path / "set").mkdir()
    for name in (LATIN1, "plain"):
        write_wav(tmp_path / "set" / f"{name}.wav", 0.6, 200)
        (tmp_path / "set" / f"{name}.txt").write_text("a b")
    return tmp_path


def program(*argv: str | Path) -> tuple[int, bytes, bytes]:
    done = subprocess.run([sys.executable, "-m", "thawline", *map(str, argv)], capture_output=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_json_names_every_byte_and_reads_back_as_the_name() -> None:
    text = json_text({"file": LATIN1, "text": "é 漢 \\udce9"})
    text.encode("ascii", "ignore")
    assert text == '{"file": "caf\\udce9", "text": "é 漢 \\\\udce9"}'
    assert os.fsencode(json.loads(text)["file"]) == b"caf\xe9"


def test_transcripts_name_the_file_by_its_own_bytes(folder: Path) -> None:
    code, out, _ = program("transcribe", folder / "base", folder / "set", "--blank-penalty", "20")
    assert code == 0
    names = [line.split(b"\t")[0] for line in out.splitlines()]
    assert names == [os.fsencode(folder / "set" / f"{name}.wav") for name in (LATIN1, "plain")]
    code, out, _ = program("transcribe", folder / "base", folder / "set", "--json")
    assert Path(json.loads(out.decode("utf-8"))["transcripts"][0]["file"]).is_file()
    code, out, err = program("transcribe", folder / "base", folder / f"x{LATIN1}.wav", "--json")
    assert code == 3
    assert b"xcaf\\udce9.wav: no such audio file" in err
    assert json.loads(out)["error"]["where"] == str(folder / f"x{LATIN1}.wav")


def test_subtitles_and_evaluations_are_written(folder: Path) -> None:
    base, data = folder / "base", folder / "set"
    assert program("transcribe", base, data, "--srt", "--out", folder / "sub")[0] == 0
    assert (folder / "sub" / f"{LATIN1}.srt").is_file()
    rows, page = folder / "rows.jsonl", folder / "page.html"
    assert program("evaluate", base, data, "--out", rows, "--html", page)[0] == 0
    keys = [json.loads(line)["key"] for line in rows.read_text(encoding="utf-8").splitlines()]
    assert keys == [LATIN1, "plain"]
    assert "<b>caf\\udce9</b>" in page.read_text(encoding="utf-8")


def test_a_run_of_such_a_name_on_such_data_trains_resumes_and_reports(folder: Path) -> None:
    recipe = folder / f"{LATIN1}.yaml"
    recipe.write_text(RECIPE.replace("train.list", "set").replace("dev.list", "set").replace("size: 4", "size: 1"))
    made = folder / f"run-{LATIN1}"
    for argv in (["train", recipe, "run.epochs=1", "--run", made], ["resume", made], ["audit", made]):
        code, _, err = program(*argv)
        assert code == 0, err
    assert (made / "report.html").is_file()
    assert b"run-caf\\udce9" in program("runs", folder, "--json")[1]


def test_an_output_of_few_characters_takes_any_text(folder: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    program = (
        "import sys; from thawline.cli import app, env; env.give = lambda *a, **k: print('é 漢'); app.run(['env'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"\\xe9 \\u6f22\n")
