"""Runs whose data are tables: the bits of a run on the list, whichever of them it was begun on and goes on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.speech_fixture import write_all

from thawline.cli.app import run

pytest.importorskip("pyarrow", reason="the extra `tables` is not installed")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe, and its lists as tables beside them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_all(tmp_path)
    assert run(["data", "table", str(tmp_path / "train.list"), str(tmp_path / "train.arrow")]) == 0
    assert run(["data", "table", str(tmp_path / "train.list"), str(tmp_path / "train.parquet")]) == 0
    assert run(["data", "table", str(tmp_path / "dev.list"), str(tmp_path / "dev.arrow")]) == 0
    return path


def train(recipe: Path, name: str, *overrides: str, code: int = 0) -> dict[str, bytes]:
    """What a run leaves that must not depend on where its rows came from."""
    place = recipe.parent / name
    assert run(["train", str(recipe), *overrides, "data.batch={frames: 260}", "--run", str(place)]) == code
    files = [*sorted((place / "model").glob("*.pt")), place / "metrics.jsonl"]
    return {file.name: file.read_bytes() for file in files if file.exists()}


def test_a_run_on_a_table_is_the_run_on_its_list(recipe: Path, capsys: pytest.CaptureFixture[str]):
    at = recipe.parent
    want = train(recipe, "list")
    assert set(want) == {"final.pt", "metrics.jsonl"}
    assert train(recipe, "arrow", f"data.train={at}/train.arrow", f"data.valid={at}/dev.arrow", "run.workers=2") == want
    assert train(recipe, "parquet", f"data.train={at}/train.parquet") == want
    scores = []
    for data in ("dev.list", "dev.arrow"):
        capsys.readouterr()
        assert run(["evaluate", str(at / "arrow"), str(at / data), "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[0] == scores[1]


def test_a_run_begun_on_a_list_goes_on_with_its_table_bit_for_bit(recipe: Path):
    at = recipe.parent
    want = train(recipe, "whole")
    train(recipe, "begun", "run.time_limit=0 minutes", code=75)
    assert train(recipe, "begun", f"data.train={at}/train.arrow", f"data.valid={at}/dev.arrow") == want


def test_a_table_of_other_texts_is_other_data(recipe: Path, capsys: pytest.CaptureFixture[str]):
    at = recipe.parent
    train(recipe, "begun", "run.time_limit=0 minutes", code=75)
    changed = at / "other.list"
    changed.write_text((at / "train.list").read_text().replace('"txt": "a', '"txt": "b'))
    assert run(["data", "table", str(changed), str(at / "other.arrow")]) == 0
    train(recipe, "begun", f"data.train={at}/other.arrow", code=2)
    assert "data.train.content" in capsys.readouterr().err
