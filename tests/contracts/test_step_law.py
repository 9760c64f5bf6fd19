"""The step law's own checks are tried on planted bugs: each of them must make a resumed run end otherwise.

The runs are those of the toy task, stopped and taken up in one process. Before each life the global generators are put
at a random place, as a new process would find them.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.contracts.storm import bits
from tests.train.runs import AtStep
from tests.train.toy import RECIPE, ToyTask, write_recipe

from thawline.ckpt.save import step_name
from thawline.errors import Stopped
from thawline.train import schedule
from thawline.train.ema import Ema
from thawline.train.engine import Engine
from thawline.train.loop import train
from thawline.train.recipe import read_recipe
from thawline.train.rundir import RunDirectory
from thawline.train.seeding import seed_all
from thawline.train.state import RunState

Bug = Callable[[pytest.MonkeyPatch], None]


def life(folder: Path, name: str, bug: Bug | None = None, *, stop_after: int = 0) -> dict[str, str]:
    """One life of a run, with a bug or without; what it leaves, if it comes to the end."""
    seed_all(int.from_bytes(os.urandom(7)))
    with pytest.MonkeyPatch.context() as patch:
        if bug is not None:
            bug(patch)
        recipe = read_recipe(folder / "recipe.yaml")
        if stop_after:
            with pytest.raises(Stopped):
                train(recipe, ToyTask(), folder / name, monitor=AtStep(stop_after))
            return {}
        train(recipe, ToyTask(), folder / name)
    return bits(folder / name)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    write_recipe(tmp_path, RECIPE.replace("run: {", "run: {ema: {decay: 0.9}, ")).rename(tmp_path / "recipe.yaml")
    return tmp_path


def differing(folder: Path, bug: Bug | None) -> set[str]:
    """What a run that is resumed leaves otherwise than one that is not stopped. The checkpoint of its stop is taken
    away, so that it goes on from the one before, as after a kill."""
    whole = life(folder, "whole", bug)
    life(folder, "cut", bug, stop_after=10)
    shutil.rmtree(folder / "cut" / "checkpoints" / step_name(10))
    cut = life(folder, "cut", bug)
    return {name for name in whole | cut if whole.get(name) != cut.get(name)}


def dropout_without_a_key(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("thawline.train.step.seed_all", lambda key: None)


def augmentation_without_a_key(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("thawline.data.sample_reading.seed_sample", lambda seed, epoch, id: None)


def a_batch_too_far(patch: pytest.MonkeyPatch) -> None:
    inner = RunState.from_json

    def off_by_one(data: Any) -> RunState:
        state = inner(data)
        return replace(state, cursor=replace(state.cursor, batch=state.cursor.batch + 1), index=state.index + 1)

    patch.setattr(RunState, "from_json", staticmethod(off_by_one))


def a_schedule_that_counts_its_own_calls(patch: pytest.MonkeyPatch) -> None:
    """WeNet's, PyTorch's and everybody's scheduler object, when nobody saves it."""
    inner, calls = schedule.lr_factor, itertools.count()
    patch.setattr(schedule, "lr_factor", lambda settings, step, **horizon: inner(settings, next(calls), **horizon))


def an_optimizer_without_its_moments(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Engine, "restore_optimizer_", lambda engine, state: None)


def averages_that_begin_anew(patch: pytest.MonkeyPatch) -> None:
    inner = Ema.__init__
    patch.setattr(Ema, "__init__", lambda ema, settings, model, kept: inner(ema, settings, model, {}))


def rows_that_stay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunDirectory, "rewind_metrics", lambda files, step: None)


AVERAGED = frozenset({"metrics.jsonl", "ema.safetensors", "model/weights.safetensors"})
EVERYTHING = AVERAGED | {"delta.safetensors", "optimizer.safetensors"}
BUGS = {
    dropout_without_a_key: EVERYTHING,
    augmentation_without_a_key: EVERYTHING,
    a_batch_too_far: EVERYTHING,
    a_schedule_that_counts_its_own_calls: EVERYTHING,
    an_optimizer_without_its_moments: EVERYTHING,
    averages_that_begin_anew: AVERAGED,
    rows_that_stay: frozenset({"metrics.jsonl"}),
}


def test_without_a_bug_nothing_differs(toy: Path) -> None:
    assert differing(toy, None) == set()


@pytest.mark.parametrize(("bug", "seen"), BUGS.items(), ids=[bug.__name__ for bug in BUGS])
def test_a_planted_bug_is_seen_in_all_that_it_touches(bug: Bug, seen: frozenset[str], toy: Path) -> None:
    assert differing(toy, bug) - {"counters"} == seen
