"""Normalisation policies on every layer that keeps statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from thawline.errors import RecipeError
from thawline.freeze.norm import convert_to_groupnorm_, groups_for
from thawline.freeze.plan import FreezePlan

NORMS = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(8), (4, 8, 5)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(8), (4, 8, 3, 3)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(8), (4, 8, 2, 2, 2)),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(8), (4, 8, 3, 3)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True), (4, 8, 3, 3)),
}


class Net(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"norm": norm})
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body["norm"](x).flatten(2).mean(2))


@pytest.mark.parametrize("name", NORMS)
def test_pinned_keeps_the_statistics_and_tracking_adapts_them(name: str):
    make, shape = NORMS[name]
    for policy, moves in (("pinned", False), ("tracking", True)):
        model = Net(make())
        frozen = FreezePlan(train="head", norms=policy).apply(model)
        model.train()
        weight = model.body["norm"].weight.clone()
        if name != "SyncBatchNorm" or policy == "pinned":  # in train mode it needs a process group
            model(torch.randn(shape) + 3).sum().backward()
            assert bool(model.body["norm"].running_mean.any()) is moves
        assert model.body["norm"].training is moves
        assert torch.equal(weight, model.body["norm"].weight)
        assert not frozen.audit().broken


@pytest.mark.parametrize("name", NORMS)
def test_groupnorm_takes_over_scale_and_shift_and_states_its_cost(name: str):
    make, shape = NORMS[name]
    model = Net(make())
    with torch.no_grad():
        model.body["norm"].weight.uniform_(0.5, 2)
    weight = model.body["norm"].weight.detach().clone()
    frozen = FreezePlan(train="head", norms="groupnorm").apply(model)
    new = model.body["norm"]
    assert isinstance(new, nn.GroupNorm)
    assert torch.equal(new.weight, weight)
    assert not new.weight.requires_grad
    assert new(torch.randn(shape)).shape == shape
    assert f"{name}(8) -> GroupNorm" in frozen.norm_changes[0].cost
    assert "statistics are dropped" in frozen.table()


def test_an_instance_norm_becomes_the_same_function_without_statistics():
    old = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
    model = nn.Sequential(old)
    x = torch.randn(2, 6, 4, 4)
    expected = nn.functional.instance_norm(x, weight=old.weight, bias=old.bias)
    convert_to_groupnorm_(model, ["0"])
    # The two sum in another order; a few units in the last place of fp32.
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_policies_can_be_given_by_selector():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    frozen = FreezePlan(train="[3]", norms={"**": "tracking", "[0]": "pinned", "[2]": "groupnorm"}).apply(model)
    model.train()
    assert [model[0].training, model[1].training] == [False, True]
    assert isinstance(model[2], nn.GroupNorm)
    assert frozen.resolution.norms == {"0": "pinned", "1": "tracking"}


def test_a_policy_may_change_with_the_phase():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    frozen = FreezePlan(train="[1]", thaw=[{"after": "1 epoch", "norms": "tracking"}]).apply(model)
    model.train()
    assert not model[0].training
    assert frozen.advance(epoch=1)
    assert model[0].training
    model(torch.randn(2, 4, 2, 2))
    assert not frozen.audit().broken


def test_groupnorm_cannot_begin_in_the_middle_of_a_run():
    plan = FreezePlan(train="[1]", thaw=[{"after": "1 epoch", "norms": "groupnorm"}])
    with pytest.raises(RecipeError, match="cannot begin in the middle of a run"):
        plan.apply(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's and timm's: everything is a buffer."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for key, value in (("weight", torch.full((n,), 2.0)), ("bias", torch.ones(n))):
            self.register_buffer(key, value)
        self.register_buffer("running_mean", torch.zeros(n))
        self.register_buffer("running_var", torch.ones(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


def test_a_frozen_batch_norm_of_buffers_is_known_as_a_norm():
    model = nn.Sequential(FrozenBatchNorm2d(4), nn.Conv2d(4, 2, 1))
    frozen = FreezePlan(train=["**", "!@norm"]).apply(model)
    assert frozen.resolution.norms == {"0": "pinned"}
    assert frozen.resolution.trainable_names == ("1.weight", "1.bias")
    changed = nn.Sequential(FrozenBatchNorm2d(4), nn.Conv2d(4, 2, 1))
    FreezePlan(train="**", norms="groupnorm").apply(changed)
    assert isinstance(changed[0], nn.GroupNorm)
    assert torch.equal(changed[0].weight.detach(), torch.full((4,), 2.0))
    assert changed[0].weight.requires_grad


def test_a_layer_that_does_more_than_normalise_is_not_replaced():
    class BatchNormAct2d(nn.BatchNorm2d):
        def __init__(self, n: int) -> None:
            super().__init__(n)
            self.act = nn.ReLU()

    with pytest.raises(RecipeError, match="does more than normalise"):
        FreezePlan(train="**", norms="groupnorm").apply(nn.Sequential(BatchNormAct2d(4)))


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (48, 24), (8, 4), (3, 1), (7, 1), (1, 1), (256, 32)])
def test_groups_divide_the_channels_and_hold_two_at_least(channels: int, groups: int):
    assert groups_for(channels) == groups
