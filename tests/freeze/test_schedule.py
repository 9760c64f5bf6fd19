"""Phases as a pure function of progress and recorded evaluations."""

from __future__ import annotations

import math

import pytest

from thawline.core.index import ModelIndex, ParamInfo
from thawline.errors import RecipeError
from thawline.freeze.plan import FreezePlan
from thawline.freeze.schedule import Progress, phase_at, phase_entries, warmup_factor


def plan(*thaw: dict) -> FreezePlan:
    return FreezePlan(train="a", thaw=[{"train": "b", **t} for t in thaw])


def at(step: int = 0, epoch: float | None = None, total: int = 100, per_epoch: int = 10) -> Progress:
    return Progress(
        step=step, epoch=step / per_epoch if epoch is None else epoch, total_steps=total, steps_per_epoch=per_epoch
    )


@pytest.mark.parametrize(
    ("after", "step", "phase"),
    [
        ("2 epochs", 19, 0),
        ("2 epochs", 20, 1),
        ("25 steps", 24, 0),
        ("25 steps", 25, 1),
        ("30%", 29, 0),
        ("30%", 30, 1),
        ("0.5 epochs", 5, 1),
    ],
)
def test_a_phase_begins_after_steps_epochs_or_a_share(after: str, step: int, phase: int):
    assert phase_at(plan({"after": after}), at(step)) == phase


def test_epochs_can_be_told_alone():
    p = plan({"after": "2 epochs"}, {"after": "4 epochs"})
    assert [phase_at(p, Progress(epoch=e)) for e in range(6)] == [0, 0, 1, 1, 2, 2]


def test_a_share_of_an_unknown_length_is_refused():
    with pytest.raises(RecipeError, match="length is not known"):
        phase_at(plan({"after": "10%"}), Progress(step=5))


def history(*losses: float, every: int = 10) -> list[dict[str, float]]:
    return [{"step": (i + 1) * every, "epoch": i + 1.0, "valid/loss": x} for i, x in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "phase"),
    [
        ((3, 2, 1), 0),
        ((3, 2, 2), 0),
        ((3, 2, 2, 2), 1),
        ((3, 2, 2, 1, 1), 0),
        ((3, math.nan, math.nan), 1),
        ((), 0),
    ],
)
def test_a_plateau_is_so_many_evaluations_without_a_new_best(losses: tuple[float, ...], phase: int):
    p = plan({"when": "plateau(valid/loss, patience=2)"})
    assert phase_at(p, at(1000, total=2000), history(*losses)) == phase


def test_evaluations_after_the_present_do_not_count_so_a_rewound_run_is_in_its_old_phase():
    p = plan({"when": "plateau(valid/loss, patience=1)"})
    rows = history(3, 3, 1)
    assert [phase_at(p, at(step), rows) for step in (10, 19, 20, 30)] == [0, 0, 1, 1]


def test_each_plateau_counts_from_the_beginning_of_its_phase():
    p = plan({"when": "plateau(valid/loss, patience=1)"}, {"when": "plateau(valid/loss, patience=2)"})
    rows = history(3, 3, 9, 9, 9)
    assert [phase_at(p, at(10 * k), rows[:k]) for k in range(6)] == [0, 0, 1, 1, 1, 2]


def test_a_condition_may_be_held_back_and_forced():
    p = plan({"when": "plateau(valid/loss)", "after": "30 steps"})
    assert [phase_at(p, at(s), history(3, 3, 3, 3)) for s in (20, 30)] == [0, 1]
    q = plan({"when": "plateau(valid/loss)", "by": "40 steps"})
    assert [phase_at(q, at(s), history(5, 4, 3, 2)) for s in (39, 40)] == [0, 1]


def test_phases_keep_their_order_even_if_a_later_one_is_overdue():
    p = plan({"when": "plateau(valid/loss)"}, {"after": "1 epoch"})
    assert phase_at(p, at(50), history(3, 2, 1)) == 0
    assert phase_at(p, at(50), history(3, 2, 2)) == 2
    assert [e.step for e in phase_entries(p, at(50), history(3, 2, 2))] == [0, 30, 30]


def test_a_metric_that_nobody_measures_is_named_with_its_neighbour():
    p = plan({"when": "plateau(valid/los, patience=2)"})
    with pytest.raises(RecipeError, match=r"no evaluation has measured 'valid/los'(?s:.*)did you mean valid/loss"):
        phase_at(p, at(20), history(3, 2))


def test_accuracy_gets_better_upwards():
    p = plan({"when": "plateau(valid/accuracy, patience=1)"})
    rows = [{"step": 10.0 * i, "valid/accuracy": x} for i, x in enumerate((0.5, 0.6, 0.6), start=1)]
    assert [phase_at(p, at(s), rows) for s in (20, 30)] == [0, 1]


def test_thawing_over_a_list_needs_the_model():
    p = FreezePlan(train="head", thaw=[{"over": "layers", "every": "1 epoch"}])
    with pytest.raises(RecipeError, match="needs the model"):
        phase_at(p, at(0))
    names = ("layers.0.weight", "layers.1.weight", "head.weight")
    index = ModelIndex.from_header(ParamInfo(name=n, shape=(2, 2), dtype="F32") for n in names)
    assert [phase_at(p.expanded(index), at(s)) for s in (9, 10, 20, 90)] == [0, 1, 2, 2]


def test_a_warm_up_rises_linearly_from_the_step_of_the_thaw():
    p = plan({"after": "2 epochs", "warmup": "4 steps"})
    assert [warmup_factor(p, 1, at(s)) for s in (19, 20, 21, 23, 24, 50)] == [0.0, 0.25, 0.5, 1.0, 1.0, 1.0]
    assert warmup_factor(p, 0, at(20)) == 1.0


def test_a_warm_up_in_steps_needs_the_length_of_an_epoch():
    p = plan({"after": "2 epochs", "warmup": "4 steps"})
    with pytest.raises(RecipeError, match="cannot be placed"):
        warmup_factor(p, 1, Progress(step=7, epoch=2.0))
