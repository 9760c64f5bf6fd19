"""How large a piece fits: found by trying, without a trace."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.train.runs import AtStep, run, sums
from tests.train.test_memory import ready_engine
from tests.train.toy import ToyBatch, ToyTask, write_recipe

from thawline.data.sampler import Batching, BatchPlan, Cursor
from thawline.errors import RecipeError, Stopped
from thawline.freeze.doctor import SavedActivations
from thawline.train import probe
from thawline.train.engine import Engine, Rate
from thawline.train.microbatch import planned_steps
from thawline.train.recipe import read_recipe
from thawline.train.rundir import read_rows

OPEN = ['plan={train: ["**"]}', "run.checkpoint.best=null", "options={n: 48}", "data.batch.size=12"]


def points(count: int) -> ToyBatch:
    torch.manual_seed(count)
    return ToyBatch(tuple(f"p{i}" for i in range(count)), torch.randn(count, 6), torch.randn(count))


def kept_bytes(rows: int) -> int:
    """What autograd keeps of the toy net for so many of 12 points."""
    engine = ready_engine("adamw")
    with SavedActivations(engine.model) as saved:
        ToyTask().loss(engine.model, points(12).rows(0, rows))
    return saved.bytes


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_rows(folder / "events.jsonl") if e["event"] == kind]


@pytest.mark.parametrize("fitting", range(1, 14))
def test_the_largest_that_fits_is_found(fitting: int) -> None:
    tried: list[int] = []

    def fits(rows: int) -> bool:
        tried.append(rows)
        return rows <= fitting

    assert probe.largest(13, fits) == fitting
    assert len(tried) <= 5


def test_one_sample_is_taken_where_nothing_fits_and_the_step_says_so() -> None:
    assert probe.largest(8, lambda rows: False) == 1


class Bursting(ToyTask):
    """Has no room in the loss, when the statistics have moved and every generator was drawn from."""

    def loss(self, model: Any, batch: Any) -> Any:
        super().loss(model, batch)
        random.random(), np.random.rand(), torch.rand(1)
        raise torch.OutOfMemoryError("no room")


def everything_of(engine: Engine) -> list[Any]:
    tensors = {**engine.model.state_dict(), **engine.optimizer_state()}
    states = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    return [{name: tensor.tolist() for name, tensor in tensors.items()}, states, engine.model.training]


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    ("task", "limit", "fits"),
    [(ToyTask(), None, True), (ToyTask(), 10**9, True), (ToyTask(), 100, False), (Bursting(), None, False)],
)
def test_a_try_leaves_no_trace(task: ToyTask, limit: int | None, fits: bool, begun: bool) -> None:
    engine = ready_engine("adamw")
    if begun:  # as where another program's training is gone on with
        engine.update_(Rate(1.0), engine.prepare_())
    engine.zero_grad()
    piece, before = points(6), everything_of(engine)
    assert probe.fits(engine, task, piece, limit_bytes=limit) is fits
    assert everything_of(engine) == before
    assert all(p.grad is None for p in engine.model.parameters())


def test_what_is_no_lack_of_memory_is_not_taken_for_one() -> None:
    class Broken(ToyTask):
        def loss(self, model: Any, batch: Any) -> Any:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        probe.fits(ready_engine("adamw"), Broken(), points(6))


def test_auto_takes_what_fits_and_a_resumed_run_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(tmp_path)
    auto = [*OPEN, "run.micro_batch=auto"]
    limit = (kept_bytes(5) + kept_bytes(6)) / 2 / probe._SHARE
    monkeypatch.setattr(probe, "available_bytes", lambda: limit)
    whole = run(tmp_path, "whole", auto)
    assert [(e["samples"], e["split"]) for e in events(whole.dir, "micro-batch")] == [(5, 3)]
    assert not events(whole.dir, "out of memory")
    with pytest.raises(Stopped):
        run(tmp_path, "cut", auto, monitor=AtStep(3))
    monkeypatch.setattr(probe, "available_bytes", lambda: 10**12)
    resumed = run(tmp_path, "cut", auto)
    assert len(events(resumed.dir, "micro-batch")) == 1
    chosen = run(tmp_path, "chosen", [*OPEN, "run.micro_batch=5"])
    assert sums(resumed.dir / "model") == sums(whole.dir / "model") == sums(chosen.dir / "model")


def test_where_everything_fits_auto_changes_nothing(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    auto, plain = run(tmp_path, "auto", [*OPEN, "run.micro_batch=auto"]), run(tmp_path, "plain", OPEN)
    assert [(e["samples"], e["split"]) for e in events(auto.dir, "micro-batch")] == [(12, 1)]
    assert sums(auto.dir / "model") == sums(plain.dir / "model")
    assert (auto.dir / "metrics.jsonl").read_bytes() == (plain.dir / "metrics.jsonl").read_bytes()


def test_pieces_never_hold_more_samples_than_asked_for() -> None:
    plan = BatchPlan(200, seed=1, batching=Batching(frames=24), length=[float(i % 7 + 1) for i in range(200)])
    steps = list(planned_steps(plan, Cursor(), 1, 1, 0, 1))
    fit = probe.choose(4, None, ToyTask(), None, iter(steps), seed=1)  # type: ignore[arg-type]  # nothing is tried
    most = max(len(request.ids) for step in steps for request in step.requests.values())
    assert most > 4
    assert -(-most // fit.split) <= 4 < -(-most // (fit.split - 1))


def test_a_container_may_give_less_than_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe.available_bytes() > 10**6
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    monkeypatch.setattr(probe, "_CGROUPS", ((tmp_path / "memory.max", tmp_path / "memory.current"),))
    assert probe.available_bytes() == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert probe.available_bytes() > 10**6


def test_no_samples_at_a_time_are_refused(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    with pytest.raises(RecipeError, match=r"run\.micro_batch"):
        read_recipe(tmp_path / "toy.yaml", ["run.micro_batch=0"])
