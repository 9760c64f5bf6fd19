"""The proof: digests before and after, held against the plan."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from thawline.core.digest import digest_tensor
from thawline.errors import LawBroken
from thawline.freeze.audit import Snapshot, audit, audit_average, digests, snapshot
from thawline.freeze.inspect import index_of
from thawline.freeze.plan import FreezePlan
from thawline.freeze.resolve import resolve


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def train(net: nn.Module, *names: str) -> None:
    with torch.no_grad():
        for name in names:
            owner, _, key = name.rpartition(".")
            getattr(net.get_submodule(owner), key).add_(1)


def run(*moved: str, train_plan: str = "head"):
    net = Net()
    resolution = resolve(FreezePlan(train=train_plan), index_of(net))
    before = snapshot(net)
    train(net, *moved)
    return audit(before, snapshot(net), resolution)


def test_a_clean_run_is_not_broken():
    report = run("head.weight", "head.bias")
    report.raise_if_broken()
    assert "the plan law holds" in report.table()
    assert (report.frozen, report.trained, report.buffers) == (2, 2, 2)


@pytest.mark.parametrize(
    ("moved", "field", "name"),
    [
        ("body.weight", "moved_frozen", "body.weight"),
        ("count", "moved_buffers", "count"),
        ("scratch", "moved_buffers", "scratch"),
    ],
)
def test_what_changed_against_the_plan_is_named(moved: str, field: str, name: str):
    report = run("head.weight", "head.bias", moved)
    assert getattr(report, field) == (name,)
    with pytest.raises(LawBroken, match=name) as caught:
        report.raise_if_broken()
    assert caught.value.exit_code == 5
    assert json.loads(report.to_json())["broken"] is True


def test_a_trainable_that_did_not_move_breaks_the_law_once_others_did():
    report = run("head.weight")
    assert report.unmoved == ("head.bias",)
    with pytest.raises(LawBroken, match=r"1 trainables did not move: head.bias"):
        report.raise_if_broken()


def test_before_the_first_update_nothing_is_held_against_anybody():
    report = run()
    assert not report.stepped
    report.raise_if_broken()


def test_a_change_of_one_bit_or_of_a_sign_of_zero_is_seen():
    net = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        net.weight.zero_()
    before = snapshot(net)
    with torch.no_grad():
        net.weight.neg_()
    assert torch.equal(net.weight, torch.zeros(2, 2))
    assert snapshot(net) != before


def test_tensors_that_come_or_go_are_named():
    net = Net()
    resolution = resolve(FreezePlan(train="head"), index_of(net))
    before = snapshot(net)
    net.extra = nn.Parameter(torch.zeros(1))
    del net.count
    report = audit(before, snapshot(net), resolution)
    assert (report.appeared, report.vanished) == (("extra",), ("count",))
    assert report.broken


def test_a_snapshot_survives_json():
    taken = snapshot(Net())
    assert Snapshot.from_dict(json.loads(json.dumps(taken.to_dict()))) == taken


def test_digests_in_parallel_are_those_of_one_at_a_time_in_every_type():
    tensors = {f"s{i}": torch.full((3, i), i, dtype=torch.float32) for i in range(80)}
    tensors |= {"large": torch.randn(700, 700), "bf16": torch.ones(3, dtype=torch.bfloat16), "b": torch.tensor(True)}
    tensors |= {"strided": torch.randn(8, 6).t(), "empty": torch.empty(0, 4), "whole": torch.arange(5)}
    assert digests(tensors) == {name: digest_tensor(t) for name, t in tensors.items()}


def test_an_average_by_lerp_keeps_frozen_tensors_and_one_by_hand_is_found_out():
    net = Net()
    frozen = FreezePlan(train="head").apply(net)
    lerp = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    by_hand = Net()
    by_hand.load_state_dict(net.state_dict())
    for _ in range(100):
        train(net, "head.weight")
        lerp.update_parameters(net)
        with torch.no_grad():
            for a, p in zip(by_hand.parameters(), net.parameters(), strict=True):
                a.copy_(0.99 * a + (1 - 0.99) * p)
    assert audit_average(net, lerp, frozen.resolution) == ()
    assert "body.weight" in audit_average(net, by_hand, frozen.resolution)
