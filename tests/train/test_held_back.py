"""Rows of held-back samples: written with each evaluation, kept for the last and the best, and in nobody's way."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.runs import AtStep, bits, events, run
from tests.train.toy import ToyBatch, ToyTask, write_recipe
from torch import nn

from thawline.ckpt import store
from thawline.ckpt.store import Buffer
from thawline.errors import Stopped
from thawline.train.held_back import kept_rows
from thawline.train.rundir import RunDirectory, read_rows
from thawline.train.task import Evaluation


class WithRows(ToyTask):
    """The toy with a row a point, and in it a value that JSON does not know and a name that is not UTF-8."""

    def evaluate(self, model: nn.Module, samples: Any, batches: Iterator[ToyBatch]) -> Evaluation:
        rows = [
            {"key": key, "off": float(off), "raw": torch.tensor(1), "file": "caf\udce9.png"}
            for batch in batches
            for key, off in zip(batch.keys, model(batch.x).squeeze(-1) - batch.y, strict=True)
        ]
        return Evaluation({"loss": sum(row["off"] ** 2 for row in rows) / len(rows)}, rows)


def best_and_last(run_dir: Path) -> set[str]:
    scores = [row for row in read_rows(run_dir / "metrics.jsonl") if "valid/loss" in row]
    best = min(scores, key=lambda row: (row["valid/loss"], -row["step"]))
    return {f"step-{row['step']:08d}.jsonl" for row in (best, scores[-1])}


def kept(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run_dir / "evaluations").iterdir()}


def test_the_rows_of_the_last_and_the_best_evaluation_are_kept_and_no_others(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    # A rate at which the loss rises again, so that the best evaluation is not the last.
    made = run(tmp_path, "run", ["optim={name: sgd, lr: 0.9}", "plan.thaw=[]"], task=WithRows())
    assert len(best_and_last(made.dir)) == 2
    assert set(kept(made.dir)) == best_and_last(made.dir)
    rows = kept_rows(RunDirectory(made.dir), made.step)
    assert {row["file"] for row in rows} == {"caf\udce9.png"}
    assert sorted(row["key"] for row in rows) == sorted(f"p{i}" for i in range(10))
    assert sum(row["off"] ** 2 for row in rows) / 10 == made.metrics["valid/loss"]


def test_without_a_best_only_the_last_are_kept(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    made = run(tmp_path, "run", ["run.checkpoint.best=null"], task=WithRows())
    assert set(kept(made.dir)) == {f"step-{made.step:08d}.jsonl"}


def test_rows_change_no_bit_of_the_run_and_a_stopped_run_leaves_the_same(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    plain = run(tmp_path, "plain")
    whole = run(tmp_path, "whole", task=WithRows())
    with pytest.raises(Stopped):
        run(tmp_path, "cut", task=WithRows(), monitor=AtStep(9))
    made = run(tmp_path, "cut", task=WithRows())
    assert bits(made.dir) == bits(whole.dir)
    assert kept(made.dir) == kept(whole.dir)
    assert {name: d for name, d in bits(plain.dir).items() if name.endswith(".safetensors")} == {
        name: d for name, d in bits(whole.dir).items() if name.endswith(".safetensors")
    }


def test_rows_that_the_storage_refuses_are_told_of_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoRows(store.FileSystem):
        """Full, for the rows of evaluations alone."""

        def write(self, descriptor: int, data: Buffer) -> int:
            if "/evaluations/" in os.readlink(f"/proc/self/fd/{descriptor}"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(descriptor, data)

    write_recipe(tmp_path)
    whole = run(tmp_path, "whole", task=WithRows())
    stale = tmp_path / "run" / "evaluations" / whole.dir.joinpath("evaluations", f"step-{whole.step:08d}.jsonl").name
    stale.parent.mkdir(parents=True)
    stale.write_text(json.dumps({"key": "of another future"}) + "\n")
    monkeypatch.setattr(store, "SYSTEM", NoRows())
    made = run(tmp_path, "run", ["run.checkpoint.on_error=stop"], task=WithRows())
    refused = events(made.dir, "rows not kept")
    assert len(refused) == 3
    assert os.strerror(errno.ENOSPC) in refused[0]["reason"]
    assert kept(made.dir) == {}  # nor those of another future
    assert bits(made.dir)["metrics"] == bits(whole.dir)["metrics"]
