"""Optimizer groups and optimizer state by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from thawline.errors import CheckpointError, RecipeError
from thawline.freeze.groups import optimizer_state_by_name, param_groups, restore_optimizer_
from thawline.freeze.inspect import index_of
from thawline.freeze.plan import FreezePlan
from thawline.freeze.resolve import resolve


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 2))


def groups(model: nn.Module, **settings) -> list[dict]:
    return param_groups(model, resolve(FreezePlan(**settings), index_of(model)), lr=0.1, weight_decay=0.01)


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    optimizer.zero_grad()
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    return optimizer


def test_groups_hold_exactly_what_trains_with_its_rate_and_decay():
    model = net()
    made = groups(model, train=["[2:]"], lr={"[2]": 0.1}, no_decay=["@bias"])
    assert [(g["names"], g["lr_factor"], g["weight_decay"]) for g in made] == [
        (["2.weight"], 0.1, 0.01),
        (["2.bias"], 0.1, 0.0),
        (["3.weight"], 1.0, 0.01),
        (["3.bias"], 1.0, 0.0),
    ]
    assert made[0]["lr"] == pytest.approx(0.01)
    assert made[0]["params"][0] is model[2].weight


def test_a_rate_of_zero_is_no_freeze():
    model = net()
    resolution = resolve(FreezePlan(train="**"), index_of(model))
    with pytest.raises(RecipeError, match="is no freeze"):
        param_groups(model, resolution, lr=0.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda g: torch.optim.AdamW(g, lr=0.1),
        lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9),
        lambda g: torch.optim.Adagrad(g, lr=0.1),
        lambda g: torch.optim.NAdam(g, lr=0.1),
        lambda g: torch.optim.Adafactor(g, lr=0.1),
    ],
    ids=["AdamW", "SGD", "Adagrad", "NAdam", "Adafactor"],
)
def test_state_by_name_goes_back_to_its_parameter_in_another_order(make):
    a, b = net(), net()
    first = stepped(a, make(groups(a, train="**")))
    b.load_state_dict(a.state_dict())
    reordered = list(reversed(groups(b, train="**", lr={"[0]": 0.5, "[1]": 0.7, "[2]": 1})))
    second = make([{**g, "params": g["params"][::-1], "names": g["names"][::-1]} for g in reordered])
    for group in second.param_groups:
        group["lr"] = 0.1
    assert restore_optimizer_(second, optimizer_state_by_name(first), strict=True) == {}
    torch.manual_seed(5)
    stepped(a, first)
    torch.manual_seed(5)
    stepped(b, second)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_restored_state_is_a_copy():
    a = net()
    first = stepped(a, torch.optim.AdamW(groups(a, train="**")))
    state = optimizer_state_by_name(first)
    restore_optimizer_(first, state)
    assert first.state[a[0].weight]["exp_avg"] is not state["0.weight/exp_avg"]
    assert torch.equal(first.state[a[0].weight]["exp_avg"], state["0.weight/exp_avg"])


def test_moments_of_another_shape_are_refused_and_nothing_is_attached():
    a = net()
    optimizer = torch.optim.AdamW(groups(a, train="**"))
    state = {"0.weight/exp_avg": torch.zeros(8, 4), "0.bias/exp_avg": torch.zeros(8, 8)}
    with pytest.raises(CheckpointError, match=r"0.bias: .*shape \(8, 8\), its parameter \(8,\)"):
        restore_optimizer_(optimizer, state)
    assert not optimizer.state


def test_what_fits_no_parameter_is_handed_back_or_refused():
    a = net()
    state = optimizer_state_by_name(stepped(a, torch.optim.AdamW(groups(a, train="**"))))
    smaller = torch.optim.AdamW(groups(a, train="[3]"))
    parked = restore_optimizer_(smaller, state)
    assert {k.rpartition("/")[0] for k in parked} == {f"{i}.{k}" for i in range(3) for k in ("weight", "bias")}
    with pytest.raises(CheckpointError, match=r"state of 0.weight and 5 more fits no parameter"):
        restore_optimizer_(smaller, state, strict=True)
    larger = torch.optim.AdamW(groups(a, train="**"))
    with pytest.raises(CheckpointError, match=r"0.weight and 6 more have no state"):
        restore_optimizer_(larger, {"3.bias/step": torch.tensor(1.0)}, strict=True)


def test_a_plain_optimizer_is_read_by_identity_and_a_ghost_is_refused():
    a = net()
    plain = stepped(a, torch.optim.AdamW(a.parameters(), lr=0.1))
    assert "0.weight/exp_avg" in optimizer_state_by_name(plain, a)
    a[3] = nn.Linear(8, 2)
    with pytest.raises(RecipeError, match="has no name in the model"):
        optimizer_state_by_name(plain, a)
