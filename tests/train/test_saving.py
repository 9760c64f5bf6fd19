"""When checkpoints are written, which stay, and that nothing that happens beside the training changes it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.train.runs import AtStep, bits, checkpoints, run
from tests.train.toy import ToyTask, write_recipe

from thawline.errors import RecipeError, Stopped
from thawline.train.recipe import read_recipe
from thawline.train.saving import Keeper

ALL = ["run.checkpoint.keep=100", "run.checkpoint.best=null", "run.evaluate=1000 steps", "plan.thaw=[]"]


def saved(run_dir: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoints(run_dir)]


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        ("5 steps", [5, 10, 15, 20, 21]),
        ("1 epochs", [7, 14, 21]),
        ("0.5 epochs", [4, 7, 11, 14, 18, 21]),  # 13 batches an epoch, 2 a step: the half is passed within step 4
        ("25%", [5, 10, 15, 20, 21]),
    ],
)
def test_checkpoints_come_as_often_as_the_recipe_says(tmp_path: Path, every: str, steps: list[int]) -> None:
    write_recipe(tmp_path)
    made = run(tmp_path, "run", [*ALL, f"run.checkpoint.every={every}"])
    assert saved(made.dir) == steps


def test_milestones_stay_beside_the_newest(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    made = run(tmp_path, "run", [*ALL, "run.checkpoint={every: 2 steps, keep: 1, keep_every: 6}"])
    assert saved(made.dir) == [6, 12, 18, 21]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("run.checkpoint.every=0 epochs", "must be more than nothing"),
        ("run.evaluate=0%", "must be more than nothing"),
        ("run.time_limit=10 steps", "in minutes or hours"),
        ("run.time_limit=30", "in minutes or hours"),
        ("run.checkpoint.every=5 parsecs", "'5 parsecs' is not a stretch of training: write a number and steps"),
    ],
)
def test_a_stretch_that_cannot_be_meant_is_refused_at_its_place(tmp_path: Path, override: str, words: str) -> None:
    write_recipe(tmp_path)
    with pytest.raises(RecipeError, match=words) as caught:
        read_recipe(tmp_path / "toy.yaml", [override])
    assert caught.value.where == f"override '{override}'"


class Hands(AtStep):
    """A clock that is put forward by 40 seconds a step."""

    def __init__(self) -> None:
        super().__init__(-1)
        self.now = 0.0

    def step(self, row: Any, speed: Any) -> None:
        self.now += 40.0


def test_minutes_are_counted_from_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(tmp_path)
    hands = Hands()
    monkeypatch.setattr("thawline.train.saving.monotonic", lambda: hands.now)
    made = run(tmp_path, "run", [*ALL, "run.checkpoint.every=3 minutes"], monitor=hands)
    assert saved(made.dir) == [5, 10, 15, 20, 21]  # 180 s are over with the fifth step after each


def test_when_a_checkpoint_is_written_changes_nothing(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    often = run(tmp_path, "often", [*ALL, "run.checkpoint.every=1 steps"])
    seldom = run(tmp_path, "seldom", [*ALL, "run.checkpoint.every=10 minutes"])
    kinds = (".safetensors", "metrics")
    one, other = ({k: v for k, v in bits(r.dir).items() if k.endswith(kinds)} for r in (often, seldom))
    assert one == other


def test_evaluations_by_the_clock_are_refused(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    with pytest.raises(RecipeError, match="depend on evaluations: give steps, epochs or %"):
        read_recipe(tmp_path / "toy.yaml", ["run.evaluate=5 minutes"])


def test_going_back_to_a_checkpoint_by_the_clock_is_refused(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    overrides = ["run.nonfinite.then=rewind", "run.checkpoint.every=5 minutes"]
    with pytest.raises(RecipeError, match=r"needs checkpoint\.every in steps, epochs or %"):
        read_recipe(tmp_path / "toy.yaml", overrides)


# --- spoilers ---------------------------------------------------------------------------------------------------------


def draw() -> None:
    """Draw from every global generator, a different number of times each time."""
    for _ in range(random.randrange(1, 5)):
        torch.rand(3)
        np.random.rand(3)
    torch.randperm(5)


class Spoiler(AtStep):
    """A monitor that draws whenever it is told something."""

    def __init__(self) -> None: ...
    def begin(self, **_: Any) -> None:
        draw()

    def note(self, text: str) -> None:
        draw()

    def evaluation(self, row: Any) -> None:
        draw()

    def step(self, row: Any, speed: Any) -> None:
        draw()


class SpoilerTask(ToyTask):
    """Draws in evaluation, and in every hook that is no part of the mathematics."""

    def evaluate(self, model: Any, samples: Any, batches: Any) -> Any:
        draw()
        return super().evaluate(model, samples, batches)

    def weights(self, model: Any, batch: Any) -> Any:
        draw()
        return super().weights(model, batch)

    def export(self, model: Any, folder: Path) -> None:
        draw()
        super().export(model, folder)


def test_what_draws_in_saves_evaluations_and_callbacks_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(tmp_path)
    options = ["run.ema={}", "run.checkpoint.every=2 steps"]
    quiet = run(tmp_path, "quiet", options)
    usual = Keeper.save

    def save(self: Keeper, **parts: Any) -> None:
        draw()
        usual(self, **parts)
        draw()

    monkeypatch.setattr(Keeper, "save", save)
    assert bits(run(tmp_path, "loud", options, task=SpoilerTask(), monitor=Spoiler()).dir) == bits(quiet.dir)
    with pytest.raises(Stopped):
        run(tmp_path, "cut", options, task=SpoilerTask(), monitor=AtStep(9))
    assert bits(run(tmp_path, "cut", options, task=SpoilerTask(), monitor=Spoiler()).dir) == bits(quiet.dir)


def test_the_negative_control_with_generators_that_are_not_keyed_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(tmp_path)
    monkeypatch.setattr("thawline.train.step.seed_all", lambda key: None)
    torch.manual_seed(1)
    quiet = run(tmp_path, "quiet")
    torch.manual_seed(1)
    assert bits(run(tmp_path, "loud", task=SpoilerTask(), monitor=Spoiler()).dir) != bits(quiet.dir)
