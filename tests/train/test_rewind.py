"""Steps that are not finite: too many in a row stop the run, or send it back and past the batches that led there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.train.runs import AtStep, bits, checkpoints, events, run
from tests.train.toy import Points, ToyTask, write_recipe

from thawline.data.sampler import Batching, BatchPlan, Cursor
from thawline.errors import Stopped, ThawlineError
from thawline.train.rundir import read_rows

BACK = ["run.nonfinite={limit: 2, then: rewind}", "run.checkpoint.every=4 steps", "run.checkpoint.best=null"]
FIRST, AFTER = Cursor(1, 0, 2), Cursor(1, 0, 8)
"""Steps 9 (good), 10 and 11 (not finite) of two batches each: from the checkpoint of step 8 on."""


class Cursed(Points):
    """Some samples are not finite, in the second epoch only."""

    def read(self, id: int, epoch: int) -> tuple[str, torch.Tensor, torch.Tensor]:
        key, x, y = super().read(id, epoch)
        return key, x, y * float("nan") if epoch == 1 and id in CURSED else y


class CursedTask(ToyTask):
    def samples(self, recipe: Any, model: Any, split: str) -> Points:
        return Points(10, noisy=False) if split == "valid" else Cursed(50, noisy=True)


PLAN = BatchPlan(50, seed=3, batching=Batching(size=4), length=Points(50, noisy=True).length)
CURSED = frozenset(id for batch in range(4, 8) for id in PLAN.batch(Cursor(1, 0, batch)))


class Shorter(BatchPlan):
    """A plan that never had the batches from FIRST up to AFTER."""

    def batches(self, cursor: Cursor) -> Iterator[tuple[Cursor, tuple[int, ...]]]:
        return ((c, ids) for c, ids in super().batches(cursor) if not FIRST <= c < AFTER)

    def next_cursor(self, cursor: Cursor) -> Cursor:
        following = super().next_cursor(cursor)
        return AFTER if following == FIRST else following


def figures(run_dir: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "epoch"} for row in read_rows(run_dir / "metrics.jsonl")]


def tensors(run_dir: Path) -> list[bytes]:
    files = (checkpoints(run_dir)[-1] / "delta.safetensors", checkpoints(run_dir)[-1] / "optimizer.safetensors")
    return [file.read_bytes() for file in (*files, run_dir / "model" / "weights.safetensors")]


def test_a_run_goes_back_to_the_last_whole_checkpoint_and_past_the_batches_since(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    made = run(tmp_path, "run", BACK, task=CursedTask())
    (back,) = events(made.dir, "rewound")
    assert (back["step"], back["reached"], back["passed_over"]) == (8, 11, [[1, 0, 2], [1, 0, 8]])
    skipped = events(made.dir, "skipped step")
    assert [e["step"] for e in skipped] == [10, 11]
    assert {int(key[1:]) for e in skipped for key in e["keys"]} == CURSED
    assert made.step == 18  # of 21: the three steps are gone
    assert [row["step"] for row in read_rows(made.dir / "metrics.jsonl") if "loss" in row] == list(range(1, 19))


def test_it_ends_as_a_run_that_never_had_those_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(tmp_path)
    back = run(tmp_path, "back", BACK, task=CursedTask())
    monkeypatch.setattr("thawline.train.opening.BatchPlan", Shorter)
    monkeypatch.setattr("thawline.train.session.Session.total_steps", 21)  # the horizon of the schedule stays
    never = run(tmp_path, "never", BACK, task=CursedTask())
    assert not events(never.dir, "skipped step")
    assert figures(back.dir) == figures(never.dir)
    assert tensors(back.dir) == tensors(never.dir)


@pytest.mark.parametrize("stop_after", [9, 10, 11, 12])
def test_where_it_goes_back_to_does_not_depend_on_stops(tmp_path: Path, stop_after: int) -> None:
    write_recipe(tmp_path)
    whole = run(tmp_path, "whole", [*BACK, "run.checkpoint.keep=1"], task=CursedTask())
    with pytest.raises(Stopped):
        run(tmp_path, "cut", [*BACK, "run.checkpoint.keep=1"], task=CursedTask(), monitor=AtStep(stop_after))
    again = run(tmp_path, "cut", [*BACK, "run.checkpoint.keep=1"], task=CursedTask())
    assert bits(again.dir) == bits(whole.dir)


@pytest.mark.parametrize("at", ["rewind.give_up_after", "rewind.save_checkpoint", "loop.open_session"])
def test_killed_while_it_goes_back_it_goes_back_all_the_same(tmp_path: Path, at: str) -> None:
    write_recipe(tmp_path)
    whole = run(tmp_path, "whole", BACK, task=CursedTask())
    died = subprocess.run([sys.executable, "-c", _DYING, str(tmp_path), at, *BACK], env=_ENVIRONMENT, check=False)
    assert died.returncode == -9
    assert events(tmp_path / "cut", "rewound")
    assert not (tmp_path / "cut" / "model").exists()
    assert bits(run(tmp_path, "cut", BACK, task=CursedTask()).dir) == bits(whole.dir)


_ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
_DYING = """
import os, signal, sys
from pathlib import Path
from unittest import mock
from tests.train.runs import events, run
from tests.train.test_rewind import CursedTask
folder, at = Path(sys.argv[1]), "thawline.train." + sys.argv[2]
module, _, name = at.rpartition(".")
from pkgutil import resolve_name
usual = getattr(resolve_name(module), name)
def dying(*args, **kwargs):
    if events(folder / "cut", "rewound"):
        os.kill(os.getpid(), signal.SIGKILL)
    return usual(*args, **kwargs)
(folder / "cut").mkdir()
with mock.patch(at, dying):
    run(folder, "cut", sys.argv[3:], task=CursedTask())
"""


class Diverged(ToyTask):
    """Once the weights have moved far every loss is not a number, whatever the batch."""

    def loss(self, model: Any, batch: Any) -> Any:
        sums = super().loss(model, batch)
        if (model.head.bias - 0.1941).abs().max() > 0.025:  # from where it starts: reached with step 5
            sums.terms["square"].sum.mul_(float("nan"))
        return sums


def test_where_going_back_did_not_help_the_run_stops(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    with pytest.raises(ThawlineError, match=r"2 steps in a row .* again after the run went back to step 4"):
        run(tmp_path, "run", BACK, task=Diverged())
    assert [(e["step"], e["reached"]) for e in events(tmp_path / "run", "rewound")] == [(4, 8)]


def test_without_a_checkpoint_before_them_the_run_stops(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    with pytest.raises(ThawlineError, match=r"2 steps in a row .* and no checkpoint to go back to"):
        run(tmp_path, "run", [*BACK, f"options={{poison: {list(range(50))}}}"])


def test_without_that_word_the_run_stops_and_keeps_the_weights_before_them(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    with pytest.raises(ThawlineError, match=r"2 steps in a row had a loss or a gradient that is not finite"):
        run(tmp_path, "run", ["run.nonfinite.limit=2"], task=CursedTask())
    newest = checkpoints(tmp_path / "run")[-1]
    assert newest.name == "step-00000011"
    before = load_file(checkpoints(tmp_path / "run")[-2] / "delta.safetensors")
    assert all(torch.isfinite(t).all() for t in before.values())
