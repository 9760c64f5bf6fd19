"""The doctor: what will go wrong, said before it does, and what only looks wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thawline.freeze import doctor
from thawline.freeze.plan import FreezePlan


class Net(nn.Module):
    """front -> block -> head; `route` says how the block is run."""

    def __init__(self, route: Callable[[nn.Module, Tensor], Tensor] = lambda block, x: block(x)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.front = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)
        self.spare = nn.Linear(4, 4)
        self.route = route

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.route(self.block, self.front(x)))


def reentrant(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=True)


def under_no_grad(block: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return block(x)


def under_inference(block: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = block(x)
    return y.clone()


def detached(block: nn.Module, x: Tensor) -> Tensor:
    return block(x).detach()


def probe(route, train):
    model = Net(route)
    frozen = FreezePlan(train=train).apply(model)
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with doctor.watch(model, frozen.resolution) as seen:
            model(torch.randn(6, 4)).square().sum().backward()
    found = doctor.after_first_step(model, frozen.resolution, seen)
    return {f.code: f for f in found}


@pytest.mark.parametrize(
    ("route", "code"),
    [
        (reentrant, "no-gradient-checkpoint"),
        (under_no_grad, "no-gradient-no_grad"),
        (under_inference, "no-gradient-inference"),
        (detached, "no-gradient-detached"),
    ],
)
def test_a_trainable_without_gradient_is_named_with_the_reason(route, code: str):
    found = probe(route, ["block", "head"])
    assert found[code].names == ("block.0.weight", "block.0.bias", "block.1.weight", "block.1.bias")
    assert found[code].severity == "error"
    assert found[code].fix


def test_the_harmless_twin_of_the_checkpoint_warning_is_told_apart():
    found = probe(reentrant, ["head"])
    assert set(found) == {"checkpoint-harmless"}
    assert found["checkpoint-harmless"].names == ("block",)
    assert found["checkpoint-harmless"].severity == "info"


def test_a_reentrant_checkpoint_whose_inputs_need_gradients_is_fine():
    assert probe(reentrant, ["front", "block", "head"]) == {}


def test_a_part_that_is_never_called_is_unused_and_ddp_must_be_told():
    found = probe(lambda block, x: block(x), ["spare", "head"])
    assert found["no-gradient-unused"].names == ("spare.weight", "spare.bias")
    assert found["find-unused-parameters"].names == ("spare.weight", "spare.bias")


def test_a_pass_without_any_gradient_is_named():
    model = Net(under_no_grad)
    frozen = FreezePlan(train="block").apply(model)
    with doctor.watch(model, frozen.resolution) as seen:
        model(torch.randn(6, 4))
    found = {f.code for f in doctor.after_first_step(model, frozen.resolution, seen)}
    assert found == {"no-gradient-no_grad", "no-gradient-at-all"}


def test_buffers_that_the_pass_writes_are_found_without_a_hash():
    model = Net()
    frozen = FreezePlan(train="head").apply(model)
    frozen.release()
    model.train()
    with doctor.watch(model, frozen.resolution) as seen:
        model(torch.randn(6, 4)).sum().backward()
    (found,) = seen.findings()
    assert found.code == "frozen-written"
    assert found.names == ("block.1.running_mean", "block.1.running_var", "block.1.num_batches_tracked")


def codes(model, frozen, optimizer=None, **more) -> dict[str, tuple[str, ...]]:
    return {f.code: f.names for f in doctor.before(model, frozen.resolution, optimizer, **more)}


def trained_net() -> Net:
    model = Net()
    model.block[1].num_batches_tracked += 1
    return model


def test_a_plan_that_is_applied_has_no_findings():
    model = trained_net()
    frozen = FreezePlan(train="head").apply(model)
    assert codes(model.train(), frozen, frozen.optimizer(torch.optim.AdamW, lr=0.1)) == {}


def test_optimizer_and_plan_are_compared_both_ways():
    model = trained_net()
    frozen = FreezePlan(train=["head"]).apply(model)
    assert codes(model, frozen, torch.optim.SGD([model.head.weight], lr=1)) == {"not-in-optimizer": ("head.bias",)}
    everything = torch.optim.SGD([*model.head.parameters(), model.front.weight], lr=1)
    assert codes(model, frozen, everything) == {"not-in-plan": ("front.weight",)}
    ghost = torch.optim.SGD([*model.head.parameters(), nn.Parameter(torch.zeros(3))], lr=1)
    assert codes(model, frozen, ghost) == {"not-in-model": ("a tensor of shape (3,)",)}


def test_a_group_at_rate_zero_is_no_freeze():
    model = trained_net()
    frozen = FreezePlan(train=["head"]).apply(model)
    groups = frozen.param_groups(lr=0.1)
    groups[0]["lr"] = 0.0
    assert codes(model, frozen, torch.optim.SGD(groups)) == {"lr-zero": ("head.weight", "head.bias")}


def test_statistics_that_will_drift_and_those_that_may_are_told_apart():
    model = trained_net()
    frozen = FreezePlan(train="head").apply(model)
    frozen.release()
    found = codes(model.train(), frozen)
    assert found["norm-drifts"] == ("block.1",)
    assert "requires-grad" in found
    assert "block" in found["not-pinned"]
    tracking = trained_net()
    other = FreezePlan(train="head", norms="tracking").apply(tracking)
    assert codes(tracking.train(), other) == {"norm-tracks": ("block.1",)}


def test_statistics_that_were_never_learned_are_named():
    model = Net()
    frozen = FreezePlan(train="head").apply(model)
    assert codes(model, frozen) == {"norm-unlearned": ("block.1",)}


def test_a_replaced_train_method_is_named():
    model = trained_net()
    model.front.train = lambda mode=True: False
    frozen = FreezePlan(train="head").apply(model)
    assert codes(model, frozen) == {"train-patched": ("front",)}


def test_a_recurrent_layer_that_a_gradient_must_pass_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
    frozen = FreezePlan(train="[0]").apply(model)
    assert codes(model, frozen) == {"cudnn-rnn": ("1",)}


def test_weight_decay_on_a_zero_gradient_is_named():
    model = trained_net()
    frozen = FreezePlan(train=["head", "front"]).apply(model)
    optimizer = frozen.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.1)
    (model(torch.randn(6, 4)).sum() * 0).backward()
    found = {f.code for f in doctor.after_first_step(model, frozen.resolution, None, optimizer)}
    assert found == {"decay-only"}


def test_a_gradient_on_a_frozen_parameter_and_one_that_is_not_finite_are_named():
    model = trained_net()
    frozen = FreezePlan(train=["head"]).apply(model)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    model.head.bias.grad[0] = float("nan")
    found = {f.code: f.names for f in doctor.after_first_step(model, frozen.resolution)}
    assert found["not-finite"] == ("head.bias",)
    assert "front.weight" in found["frozen-with-gradient"]


def test_an_average_by_hand_over_frozen_tensors_is_warned_of():
    model = trained_net()
    frozen = FreezePlan(train="head").apply(model)
    twin = Net()
    twin.load_state_dict(model.state_dict())
    assert "average-over-frozen" in codes(model, frozen, average=twin)
    with torch.no_grad():
        twin.front.weight += 1e-6
    assert codes(model, frozen, average=twin) == {"average-drifts": ("front.weight",)}
    assert codes(model, frozen, average=torch.optim.swa_utils.AveragedModel(model)) == {}


def test_more_phases_than_compiled_graphs_are_warned_of():
    model = trained_net()
    thaw = [{"after": f"{i} epochs", "train": "front", "lr": 1 / i} for i in range(1, 10)]
    frozen = FreezePlan(train="head", thaw=thaw).apply(model)
    torch.compile(nn.Linear(1, 1), backend="eager")(torch.ones(1, 1))
    assert codes(model, frozen) == {"recompiles": ()}
    torch._dynamo.reset()


def test_saved_activations_leave_parameters_out_and_shrink_when_the_front_is_frozen():
    x = torch.randn(64, 4)
    kept = []
    for train in (["**"], ["head"]):
        model = trained_net()
        FreezePlan(train=train).apply(model)
        with doctor.SavedActivations(model) as saved:
            model(x).sum()
        kept.append(saved.bytes)
    assert kept[1] == 64 * 4 * 4
    assert kept[0] > 2 * kept[1]


def test_a_finding_reads_as_a_sentence():
    model = trained_net()
    frozen = FreezePlan(train=["head"]).apply(model)
    (found,) = doctor.before(model, frozen.resolution, torch.optim.SGD([model.head.weight], lr=1))
    assert str(found).startswith("error: these train but are not in the optimizer")
    assert found.to_dict()["names"] == ("head.bias",)
