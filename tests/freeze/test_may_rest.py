"""`may_rest`: what trains and no loss depends on may stay as it is, and nothing else may."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from thawline.errors import LawBroken, SelectorError
from thawline.freeze.plan import FreezePlan
from thawline.freeze.resolve import Resolution


class Dead(nn.Module):
    """Nothing reads the second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(2, 2)
        self.dead = nn.Linear(2, 2)
        self.frozen = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.used(x))  # type: ignore[no-any-return]


def trained(plan: FreezePlan) -> tuple[Dead, object]:
    torch.manual_seed(0)
    model = Dead()
    frozen = plan.apply(model)
    optimizer = torch.optim.SGD(frozen.param_groups(lr=0.1, weight_decay=0.0))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return model, frozen


def test_what_may_rest_and_rests_is_listed_and_breaks_no_law() -> None:
    _, frozen = trained(FreezePlan(train=["used", "dead"], may_rest=["dead"]))
    report = frozen.audit()  # type: ignore[attr-defined]
    report.raise_if_broken()
    assert report.rested == ("dead.weight", "dead.bias")
    assert report.to_dict()["rested"] == ["dead.weight", "dead.bias"]
    assert "did not move, as the plan lets them" in report.table()


def test_what_may_not_rest_breaks_the_law_as_before() -> None:
    _, frozen = trained(FreezePlan(train=["used", "dead"]))
    with pytest.raises(LawBroken, match=r"trainables did not move: dead\.weight"):
        frozen.audit().raise_if_broken()  # type: ignore[attr-defined]


def test_what_is_frozen_does_not_count_as_resting_and_may_not_move() -> None:
    model, frozen = trained(FreezePlan(train=["used", "dead"], may_rest=["dead", "frozen"]))
    assert frozen.resolution.resting == ("dead.weight", "dead.bias")  # type: ignore[attr-defined]
    with torch.no_grad():
        model.frozen.bias.add_(1)
    with pytest.raises(LawBroken, match=r"frozen tensors changed: frozen\.bias"):
        frozen.audit().raise_if_broken()  # type: ignore[attr-defined]


def test_it_is_said_survives_json_and_must_match() -> None:
    frozen = FreezePlan(train=["used", "dead"], may_rest=["dead"]).apply(Dead())
    assert "2 of the tensors that train may stay as they are (dead.weight ...)" in frozen.resolution.notes
    assert Resolution.from_dict(frozen.resolution.to_dict()).resting == frozen.resolution.resting
    with pytest.raises(SelectorError, match="ded"):
        FreezePlan(train=["used"], may_rest=["ded"]).apply(Dead())
