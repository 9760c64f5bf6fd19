"""A run with `init: random` that was killed before its first checkpoint, taken up by the same and by another recipe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.speech_fixture import RECIPE, TRAIN_YAML, write_all

DIES = (
    "import os, sys\n"
    "from thawline.train import loop\n"
    "loop._step = lambda *a: os._exit(9)\n"  # as kill -9 would, in the first step
    "from thawline.cli.app import run\n"
    "run(sys.argv[1:])\n"
)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = write_all(tmp_path)
    path.write_text(RECIPE + "init: random\n")
    return path


def program(*argv: str | Path, dying: bool = False) -> tuple[int, str]:
    how = ["-c", DIES] if dying else ["-m", "thawline"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *how, *map(str, argv)], capture_output=True, text=True, env=environment)
    return done.returncode, done.stderr


def bytes_of(run: Path) -> dict[str, bytes]:
    parts = (run / "model" / "final.pt", run / "metrics.jsonl", run / "base" / "final.pt", run / "base.json")
    return {str(p.relative_to(run)): p.read_bytes().replace(str(run).encode(), b"RUN") for p in parts}


@pytest.fixture
def killed(recipe: Path, tmp_path: Path) -> Path:
    run = tmp_path / "killed"
    assert program("train", recipe, "run.seed=7", "--run", run, dying=True)[0] == 9
    assert (run / "base" / "final.pt").is_file()
    assert not list((run / "checkpoints").glob("step-*"))
    return run


@pytest.mark.parametrize("verb", ["train", "resume"])
def test_the_same_recipe_ends_in_the_bytes_of_the_run_that_was_never_killed(
    recipe: Path, killed: Path, tmp_path: Path, verb: str
) -> None:
    assert program("train", recipe, "--run", tmp_path / "whole")[0] == 0
    argv = ("train", recipe, "--run", killed) if verb == "train" else ("resume", killed)
    code, err = program(*argv)
    assert code == 0, err
    assert bytes_of(killed) == bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("verb", ["train", "resume"])
def test_another_seed_is_refused_and_the_first_still_ends_in_its_own_bytes(
    recipe: Path, killed: Path, tmp_path: Path, verb: str
) -> None:
    argv = ("train", recipe, "run.seed=8", "--run", killed) if verb == "train" else ("resume", killed, "run.seed=8")
    code, err = program(*argv)
    assert code in (2, 4), err
    assert "seed" in err
    assert "Traceback" not in err
    assert program("train", recipe, "run.seed=7", "--run", killed)[0] == 0
    assert program("train", recipe, "run.seed=7", "--run", tmp_path / "whole")[0] == 0
    assert bytes_of(killed) == bytes_of(tmp_path / "whole")


def test_another_shape_is_refused(recipe: Path, killed: Path) -> None:
    (recipe.parent / "base" / "train.yaml").write_text(TRAIN_YAML.replace("linear_units: 16", "linear_units: 24"))
    code, err = program("train", recipe, "--run", killed)
    assert code in (2, 4), err
