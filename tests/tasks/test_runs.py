"""Forking a run, and repeating its last steps to see whether this machine still gives the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.train.runs import AtStep
from tests.train.toy import RECIPE, write_recipe

from thawline.ckpt.load import read_checkpoint
from thawline.ckpt.save import save_checkpoint
from thawline.errors import CheckpointError, LawBroken, Stopped
from thawline.tasks import runs


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(runs.TASKS, "toy", "tests.train.toy:ToyTask")
    write_recipe(tmp_path, RECIPE.replace("keep: 2", "keep: 100"))
    runs.train(tmp_path / "toy.yaml", run=tmp_path / "run")
    return tmp_path


def model_bytes(folder: Path) -> bytes:
    return (folder / "model" / "weights.safetensors").read_bytes()


def test_a_fork_goes_on_elsewhere_and_leaves_the_run_as_it_is(toy: Path) -> None:
    before = sorted(p.name for p in (toy / "run" / "checkpoints").iterdir())
    forked = runs.resume(toy / "run", step=9, fork=toy / "fork")
    assert forked.dir == toy / "fork"
    assert model_bytes(toy / "fork") == model_bytes(toy / "run")
    assert sorted(p.name for p in (toy / "run" / "checkpoints").iterdir()) == before


def test_repeating_the_last_steps_gives_the_recorded_bits(toy: Path) -> None:
    assert runs.repeat_steps(toy / "run", 5) == 6  # from the checkpoint of step 15 to the last, 21


def test_a_recorded_step_that_comes_out_otherwise_is_named(toy: Path) -> None:
    log = toy / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    spoiled = next(row for row in rows if row["step"] == 19)
    spoiled["loss"] += 1e-9
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(LawBroken, match="step 19 does not come out the same"):
        runs.repeat_steps(toy / "run", 5)


def test_steps_before_a_stop_are_repeated_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(runs.TASKS, "toy", "tests.train.toy:ToyTask")
    write_recipe(tmp_path, RECIPE.replace("keep: 2", "keep: 100"))
    with pytest.raises(Stopped):
        runs.train(tmp_path / "toy.yaml", {"run.ema": {}}, run=tmp_path / "run", monitor=AtStep(11))
    assert runs.repeat_steps(tmp_path / "run", 2) == 2  # from the checkpoint of step 9 to that of the stop
    spoil(tmp_path / "run" / "checkpoints" / "step-00000011")
    with pytest.raises(LawBroken, match=r"1 tensors come out otherwise: ema/head\.bias"):
        runs.repeat_steps(tmp_path / "run", 2)


def spoil(checkpoint: Path) -> None:
    """Change one average of a checkpoint, and write it as whole."""
    found = read_checkpoint(checkpoint)
    ema = {name: t + (name == "head.bias") for name, t in found.ema.items()}
    save_checkpoint(
        checkpoint.parent,
        step=found.step,
        delta=found.difference,
        optimizer=found.optimizer,
        state=found.state,
        base=found.base,
        ema=ema,
    )


def test_nothing_to_repeat_from_is_said(toy: Path, tmp_path: Path) -> None:
    forked = tmp_path / "fork"
    runs.branch(runs._begun(toy / "run"), runs.RunDirectory(forked), step=21)
    with pytest.raises(CheckpointError, match="no earlier checkpoint is kept"):
        runs.repeat_steps(forked, 3)
