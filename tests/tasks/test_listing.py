from __future__ import annotations

from pathlib import Path

import pytest
from tests.train.toy import ToyTask, write_recipe

from thawline.errors import RecipeError
from thawline.tasks.listing import list_runs, table
from thawline.train.loop import train
from thawline.train.recipe import read_recipe
from thawline.train.rundir import RunDirectory


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, and one that was left off in the middle."""
    folder = tmp_path_factory.mktemp("listing")
    write_recipe(folder)
    recipe = read_recipe(folder / "toy.yaml")
    train(recipe, ToyTask(), folder / "runs" / "whole")
    train(recipe, ToyTask(), folder / "runs" / "half", until=3)
    (folder / "runs" / "not a run").mkdir()
    return folder / "runs"


def test_each_run_of_a_folder_is_listed_with_how_it_stands(runs: Path):
    half, whole = list_runs(runs)
    assert (Path(half.dir).name, half.status, half.step) == ("half", "interrupted", 3)
    assert (Path(whole.dir).name, whole.status) == ("whole", "finished")
    assert whole.step > 3
    assert whole.metrics["valid/loss"] >= (whole.best or 0)
    assert whole.bytes > half.bytes > 0


def test_a_run_may_be_given_itself(runs: Path):
    (row,) = list_runs(runs / "whole")
    assert Path(row.dir).name == "whole"
    assert table([row]).splitlines()[0].split() == [
        "run",
        "task",
        "status",
        "step",
        "epoch",
        "last",
        "evaluation",
        "best",
        "size",
    ]


def test_a_run_that_a_process_trains_in_is_running(runs: Path):
    with RunDirectory(runs / "half").locked():
        assert list_runs(runs / "half")[0].status == "running"
    assert list_runs(runs / "half")[0].status == "interrupted"


def test_a_run_whose_recipe_cannot_be_read_is_listed_as_such(runs: Path, tmp_path: Path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "recipe.yaml").write_text("task: [")
    (tmp_path / "broken" / "base.json").write_text("{}")
    assert list_runs(tmp_path)[0].status == "unreadable"


def test_a_folder_without_runs_is_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match="there is no run in"):
        list_runs(tmp_path)
    with pytest.raises(RecipeError, match="there is no folder"):
        list_runs(tmp_path / "nowhere")
