"""fp16: the loss scale is GradScaler's, and a run in it goes on bit for bit."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from tests.train.runs import AtStep, checkpoint_sums, run, sums
from tests.train.toy import write_recipe
from torch import nn

from thawline.errors import Stopped, ThawlineError
from thawline.train import scaling
from thawline.train.rundir import read_rows
from thawline.train.scaling import LossScale

FP16 = ["run.precision=fp16", 'plan={train: ["**"]}', "run.checkpoint.best=null", "options={n: 48}"]


def test_the_scale_moves_as_gradscaler_moves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "_STEADY", 3)
    theirs = torch.amp.GradScaler("cpu", growth_interval=3)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    ours, chance = LossScale(), random.Random(1)
    for _ in range(60):
        overflowed = chance.random() < 0.2
        theirs.scale(weight.sum()).backward()
        if overflowed:
            weight.grad.fill_(torch.inf)  # type: ignore[union-attr]
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours = ours.after(overflowed=overflowed)
        assert ours.factor == theirs.get_scale()


def skipped(folder: Path) -> list[int]:
    return [e["step"] for e in read_rows(folder / "events.jsonl") if e["event"] == "skipped step"]


def test_a_run_in_fp16_learns_skips_what_overflows_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    whole = run(tmp_path, "whole", FP16)
    rows = [r for r in read_rows(whole.dir / "metrics.jsonl") if "loss" in r]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert skipped(whole.dir)[0] == 1  # GradScaler's first scale is too large for most losses
    with pytest.raises(Stopped):
        run(tmp_path, "cut", FP16, monitor=AtStep(5))
    scale = LossScale()
    for step in range(1, 6):
        scale = scale.after(overflowed=step in skipped(tmp_path / "cut"))
    state = json.loads((sorted((tmp_path / "cut" / "checkpoints").iterdir())[-1] / "state.json").read_text())
    assert state["run"]["scale"] == [scale.factor, scale.steady]
    going_on = run(tmp_path, "cut", FP16)
    assert sums(going_on.dir / "model") == sums(whole.dir / "model")
    assert checkpoint_sums(going_on.dir) == checkpoint_sums(whole.dir)
    assert (going_on.dir / "metrics.jsonl").read_bytes() == (whole.dir / "metrics.jsonl").read_bytes()


def test_a_scale_that_is_too_large_is_no_divergence_and_a_bad_sample_is(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    strict = [*FP16, "run.nonfinite.limit=1", "run.epochs=1"]
    assert skipped(run(tmp_path, "run", strict).dir)
    with pytest.raises(ThawlineError, match="1 steps in a row"):
        run(tmp_path, "poisoned", [*strict, "options={n: 48, poison: [9]}"])
