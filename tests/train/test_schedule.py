"""Learning rate and momentum as functions of the step, against torch's own schedulers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.runs import AtStep, bits, run
from tests.train.toy import write_recipe
from torch.optim import lr_scheduler

from thawline.core.span import Span
from thawline.errors import Stopped
from thawline.train.recipe import ScheduleSettings
from thawline.train.rundir import read_rows
from thawline.train.schedule import lr_factor, momentum

TOTAL = 120
FORMS: dict[str, dict[str, Any]] = {
    "constant": {},
    "linear": {"floor": 0.1},
    "cosine": {"floor": 0.1},
    "wsd": {"decay": Span(0.25, "fraction")},
    "noam": {"d_model": 64},
    "warmuplr": {},
    "onecycle": {"floor": 4e-6},
}


def form(name: str, warmup: int) -> ScheduleSettings:
    return ScheduleSettings(**{"name": name, "warmup": Span(warmup, "steps"), **FORMS[name]})


def at(settings: ScheduleSettings, step: int) -> tuple[float, float | None]:
    """Rate and momentum of the update after `step` finished ones."""
    length = {"total_steps": TOTAL, "steps_per_epoch": 12}
    return lr_factor(settings, step, **length), momentum(settings, step, **length)


def of_torch(optimizer: torch.optim.Optimizer, scheduler: lr_scheduler.LRScheduler) -> tuple[list[float], list[float]]:
    """Rate and momentum (or first beta) of each update."""
    rates, momenta = [], []
    for step in range(TOTAL):
        if step:
            scheduler.step()
        group = optimizer.param_groups[0]
        rates.append(group["lr"])
        momenta.append(group["betas"][0] if "betas" in group else group["momentum"])
        optimizer.step()
    return rates, momenta


def optimizer(name: str, lr: float = 1.0) -> torch.optim.Optimizer:
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    return torch.optim.AdamW(parameters, lr=lr) if name == "adamw" else torch.optim.SGD(parameters, lr=lr, momentum=0.9)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("warmup", [0, 20, 60])
def test_one_cycle_has_torchs_rates_and_momenta(name: str, warmup: int) -> None:
    theirs = optimizer(name)
    share = warmup / TOTAL or 0.3
    rates, momenta = of_torch(theirs, lr_scheduler.OneCycleLR(theirs, max_lr=1.0, total_steps=TOTAL, pct_start=share))
    ours = [at(form("onecycle", warmup), step) for step in range(TOTAL)]
    # the same formula, its factors multiplied in another order
    assert [rate for rate, _ in ours] == pytest.approx(rates, rel=1e-12, abs=1e-15)
    assert [m for _, m in ours] == pytest.approx(momenta, rel=1e-12)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_plain_forms_have_torchs_rates(name: str) -> None:
    theirs = optimizer("sgd")
    scheduler: lr_scheduler.LRScheduler = (
        lr_scheduler.CosineAnnealingLR(theirs, T_max=TOTAL, eta_min=0.1)
        if name == "cosine"
        else lr_scheduler.LinearLR(theirs, start_factor=1.0, end_factor=0.1, total_iters=TOTAL)
    )
    rates, _ = of_torch(theirs, scheduler)
    # torch goes from each rate to the next, and gathers rounding on the way
    assert [at(form(name, 0), step)[0] for step in range(TOTAL)] == pytest.approx(rates, rel=1e-10)


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_the_same_in_whatever_order_steps_are_asked_for(name: str) -> None:
    settings = form(name, 20)
    ascending = [at(settings, step) for step in range(TOTAL)]
    asked = {step: at(settings, step) for step in random.Random(0).sample(range(TOTAL), TOTAL)}
    assert [asked[step] for step in range(TOTAL)] == ascending


@pytest.mark.parametrize("name", FORMS)
def test_a_warm_up_ends_at_the_highest_rate(name: str) -> None:
    rates = [at(form(name, 20), step)[0] for step in range(TOTAL)]
    assert max(range(TOTAL), key=rates.__getitem__) in (19, 20)
    assert rates[:19] == sorted(rates[:19])


def test_momentum_is_left_alone_where_the_recipe_says_so() -> None:
    settings = form("onecycle", 20).model_copy(update={"momentum": None})
    assert at(settings, 5)[1] is None
    assert at(form("cosine", 20), 5)[1] is None


ONE_CYCLE = ["optim.schedule={name: onecycle}", "run.checkpoint.best=null"]


@pytest.mark.parametrize("optim", ["adamw", "adam", "sgd"])
def test_the_optimizer_gets_the_momentum_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optim: str
) -> None:
    write_recipe(tmp_path)
    cls: Any = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optim]
    usual, seen = cls.step, []

    def step(self: Any, *args: Any) -> Any:
        seen.append([g["betas"][0] if "betas" in g else g["momentum"] for g in self.param_groups])
        return usual(self, *args)

    monkeypatch.setattr(cls, "step", step)
    run(tmp_path, "run", [*ONE_CYCLE, f"optim.name={optim}"])
    settings = ScheduleSettings(name="onecycle")
    wanted = [momentum(settings, step, total_steps=21, steps_per_epoch=7) for step in range(21)]
    assert [set(momenta) for momenta in seen] == [{m} for m in wanted]


def test_a_run_with_a_cycle_goes_on_bit_for_bit(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    whole = run(tmp_path, "whole", ONE_CYCLE)
    with pytest.raises(Stopped):
        run(tmp_path, "cut", ONE_CYCLE, monitor=AtStep(10))
    assert bits(run(tmp_path, "cut", ONE_CYCLE).dir) == bits(whole.dir)
    rates = [row["lr"] for row in read_rows(whole.dir / "metrics.jsonl") if "lr" in row]
    assert max(rates) < 1e-2 + 1e-12
