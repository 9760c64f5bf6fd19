"""Runs whose bits do not depend on how many ranks share them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.train.elastic_case import ALL_BUT_NORM, EVERYTHING, alone, digests, rank_steps, simulated
from tests.train.runs import AtStep, checkpoint_sums, run, sums
from tests.train.test_loop import REPOSITORY
from tests.train.toy import write_recipe

from thawline.errors import RecipeError, Stopped
from thawline.train.recipe import read_recipe


@pytest.mark.parametrize(("count", "worlds"), [(4, (2, 4)), (8, (2, 4, 8)), (12, (2, 3, 4, 6, 12))])
@pytest.mark.parametrize("train", [EVERYTHING, ALL_BUT_NORM])
@pytest.mark.parametrize("split", [1, 2])
def test_steps_with_dropout_and_moving_statistics_are_bitwise_the_same_for_every_world(
    count: int, worlds: tuple[int, ...], train: tuple[str, ...], split: int
) -> None:
    one = digests(rank_steps(0, 1, count, alone, train=train, split=split))
    for world in worlds:
        ranks = simulated(world, count, train=train, split=split)
        assert [digests(rank) for rank in ranks] == [one] * world


def test_the_number_of_micro_batches_does_matter_to_the_bits() -> None:
    assert digests(rank_steps(0, 1, 4, alone)) != digests(rank_steps(0, 1, 8, alone))


def test_the_negative_control_a_sum_in_the_order_of_ranks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    one = digests(rank_steps(0, 1, 8, alone))
    monkeypatch.setattr("thawline.train.step.combine", lambda count, parts, add: reduce(add, parts.values()))
    assert digests(simulated(4, 8)[0]) != one


@pytest.mark.parametrize("world", [2, 4])
def test_without_fixed_micro_batches_another_world_gives_the_same_update_up_to_rounding(world: int) -> None:
    plain = {"train": ALL_BUT_NORM, "elastic": False, "dropout": False}
    one = rank_steps(0, 1, 1, alone, **plain)
    ranks = simulated(world, world, **plain)
    assert [digests(rank) for rank in ranks] == [digests(ranks[0])] * world
    assert digests(ranks[0]) != digests(one)
    # Sums of 60 float32 terms in another order, through three updates of Adam.
    assert all(torch.allclose(ranks[0][name], one[name], rtol=1e-4, atol=1e-5) for name in one)


@pytest.mark.long
def test_two_processes_under_gloo_are_bitwise_one(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.train.elastic_case", str(rank), "2", "4", str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        for rank in range(2)
    ]
    printed = [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
    assert printed == [digests(rank_steps(0, 1, 4, alone))] * 2


ELASTIC = [
    *("run.accumulate=2", "run.micro_batches=4", "data.batch.size=8", "options={n: 48}"),
    *('plan={train: ["**"]}', "run.checkpoint.best=null"),
]


def test_an_elastic_run_stopped_and_resumed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    whole = run(tmp_path, "whole", ELASTIC)
    with pytest.raises(Stopped):
        run(tmp_path, "cut", ELASTIC, monitor=AtStep(5))
    going_on = run(tmp_path, "cut", ELASTIC)
    assert sums(going_on.dir / "model") == sums(whole.dir / "model")
    assert checkpoint_sums(going_on.dir) == checkpoint_sums(whole.dir)
    statistics = load_file(whole.dir / "model" / "weights.safetensors")
    assert int(statistics["body.1.num_batches_tracked"]) == whole.step  # once a step, by the mean


def test_micro_batches_that_do_not_fit_the_batches_of_a_step_are_refused(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    with pytest.raises(RecipeError, match=r"micro_batches must be a multiple of accumulate \(2\)"):
        read_recipe(tmp_path / "toy.yaml", ["run.micro_batches=3"])
