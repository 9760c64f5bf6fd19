"""The public surface: the names that outside users rely on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import thawline as tl

NAMES = [
    "AuditReport",
    "BaseMismatch",
    "CheckpointError",
    "ConversionReport",
    "DataError",
    "FreezePlan",
    "LawBroken",
    "RecipeError",
    "Run",
    "SelectorError",
    "Stopped",
    "ThawlineError",
    "average",
    "convert",
    "export",
    "load",
    "resume",
    "train",
    "verify",
]


def test_the_exported_names_are_these() -> None:
    assert tl.__all__ == NAMES
    assert all(getattr(tl, name) is not None for name in NAMES)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'fit'"):
        _ = tl.fit  # type: ignore[attr-defined]


def test_train_can_be_called_whatever_was_imported_before() -> None:
    program = (
        "import thawline.train.recipe, thawline as tl\n"
        "assert callable(tl.train) and tl.train.recipe\n"
        "try:\n    tl.train('absent.yaml')\n"
        "except tl.RecipeError as exc:\n    print('refused', exc.exit_code)\n"
    )
    for first in ("", "import thawline as tl; tl.train\n"):
        done = subprocess.run([sys.executable, "-c", first + program], capture_output=True, text=True)
        assert done.stdout.strip() == "refused 2", done.stderr


def test_importing_the_package_imports_no_torch() -> None:
    program = "import sys, thawline; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_run_gives_its_folder_its_metrics_and_a_page(tmp_path: Path) -> None:
    from tests.cli.speech_fixture import write_all

    recipe = write_all(tmp_path)
    done = tl.train(recipe, {"run.epochs": 1}, run=tmp_path / "run")
    assert done.dir == tmp_path / "run"
    assert done.metrics["valid/wer"] >= 0
    page = done.report()
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
