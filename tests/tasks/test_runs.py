"""Forking a run, and repeating its last steps to see whether this machine still gives the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.train.runs import AtStep, events
from tests.train.toy import RECIPE, ToyTask, write_recipe

from thawline.ckpt.load import read_checkpoint
from thawline.ckpt.save import save_checkpoint
from thawline.errors import CheckpointError, LawBroken, RecipeError, Stopped
from thawline.tasks import runs
from thawline.tasks.listing import list_runs


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


def test_a_run_in_the_folder_of_its_own_base_is_refused_and_leaves_the_base_as_it_is(toy: Path) -> None:
    before = sorted(p.name for p in (toy / "run" / "model").iterdir())
    with pytest.raises(RecipeError, match="the run would lie in the folder of its own base"):
        runs.train(toy / "toy.yaml", {"model": str(toy / "run" / "model")}, run=toy / "run" / "model")
    assert sorted(p.name for p in (toy / "run" / "model").iterdir()) == before


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


def test_a_torn_newest_checkpoint_is_passed_over_by_the_repetition_too(toy: Path) -> None:
    (toy / "run" / "checkpoints" / "step-00000021" / "delta.safetensors").write_bytes(b"")
    assert runs.repeat_steps(toy / "run", 5) == 6  # up to step 18, from that of step 12


def test_a_repetition_is_not_sent_to_the_mirror_and_has_no_time_limit(toy: Path) -> None:
    recipe = toy / "run" / "recipe.yaml"
    mirror = f"mirror: {(toy / 'mirror').as_uri()}"
    recipe.write_text(
        recipe.read_text().replace("mirror: null", mirror).replace("time_limit: null", "time_limit: 0 minutes")
    )
    assert mirror in recipe.read_text()
    assert runs.repeat_steps(toy / "run", 5) == 6
    assert not (toy / "mirror").exists()


def test_a_repetition_that_is_stopped_says_so_of_the_run_and_not_of_its_copy(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hurried(ToyTask):
        def loss(self, model: Any, batch: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().loss(model, batch)

    monkeypatch.setattr(runs, "task_of", lambda recipe: Hurried())
    with pytest.raises(Stopped, match="the run is as it was; while its last steps were repeated: stopped by") as caught:
        runs.repeat_steps(toy / "run", 5)
    assert caught.value.fix == f"thawline resume {toy / 'run'}"


def test_a_fork_is_resumed_without_the_mirror_of_the_run(toy: Path) -> None:
    recipe = toy / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("mirror: null", f"mirror: {(toy / 'mirror').as_uri()}"))
    runs.resume(toy / "run", step=9, fork=toy / "fork")
    runs.resume(toy / "fork", step=12)
    assert not (toy / "mirror").exists()


@pytest.mark.parametrize(("step", "fork"), [(4, "fork"), (4, None)])
def test_a_step_that_is_not_kept_is_refused_with_those_that_are(toy: Path, step: int, fork: str | None) -> None:
    (toy / "run" / "checkpoints" / "step-00000003").rename(toy / "run" / "checkpoints" / "step-00000003.bak")
    with pytest.raises(CheckpointError, match="no checkpoint of step 4") as caught:
        runs.resume(toy / "run", step=step, fork=fork and toy / fork)
    assert caught.value.fix == "kept are the steps [6, 7, 9, 12, 14, 15, 18, 21]"
    assert not (toy / "fork").exists()


def test_a_fork_into_a_folder_that_is_there_is_refused(toy: Path) -> None:
    with pytest.raises(RecipeError, match="exists already") as caught:
        runs.resume(toy / "run", fork=toy / "base")
    assert "--force" not in caught.value.fix


@pytest.mark.parametrize("override", ["optim.lr=0.5", "optim.lrr=0.5"])
def test_a_fork_that_is_refused_leaves_nothing_in_the_way_of_the_next(toy: Path, override: str) -> None:
    with pytest.raises(RecipeError):
        runs.resume(toy / "run", [override], fork=toy / "fork")
    assert not (toy / "fork").exists()


def test_what_was_allowed_once_is_what_the_run_is_from_then_on(toy: Path) -> None:
    with pytest.raises(Stopped):
        runs.resume(toy / "run", ["optim.lr=0.5"], step=9, allow=["optim.lr"], monitor=AtStep(10))
    shutil.rmtree(toy / "run" / "checkpoints" / "step-00000010")  # as if it had been killed before any other save
    runs.resume(toy / "run")
    assert [e["grade"] for e in events(toy / "run", "resumed")] == ["CONTINUES", "EXACT"]
    assert runs.repeat_steps(toy / "run", 20) == 12  # from step 9 on, and not from before the change
    whole = runs.resume(toy / "run", step=9, fork=toy / "whole")
    assert model_bytes(toy / "run") == model_bytes(whole.dir)


def test_a_finished_run_without_checkpoints_is_not_trained_again(toy: Path) -> None:
    before = model_bytes(toy / "run")
    shutil.rmtree(toy / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match="finished, and none of its checkpoints is left"):
        runs.resume(toy / "run")
    assert model_bytes(toy / "run") == before


def test_a_damaged_log_is_named_with_its_line(toy: Path) -> None:
    log = toy / "run" / "metrics.jsonl"
    log.write_bytes(log.read_bytes().replace(b'{"step": 2,', b"\0" * 11))
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl:2: the line is damaged"):
        runs.resume(toy / "run")
    (row,) = list_runs(toy / "run")
    assert row.status == "unreadable"
