"""A model under its plan in a plain PyTorch loop: phases, optimizer and proof together."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from thawline.errors import LawBroken, RecipeError
from thawline.freeze.plan import FreezePlan


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 2))


def data(step: int) -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(step))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    model.train()
    optimizer.zero_grad()
    model(data(number)).square().sum().backward()
    optimizer.step()


PLAN = {
    "train": "[3]",
    "thaw": [
        {"after": "1 epoch", "train": "[2]", "lr": 0.1},
        {"after": "2 epochs", "freeze": "[3]"},
        {"after": "3 epochs", "train": "[3]"},
    ],
}


def digests(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def run(model: nn.Module, frozen, optimizer, first: int, last: int, per_epoch: int = 4) -> None:
    for number in range(first, last):
        frozen.advance(step=number, steps_per_epoch=per_epoch)
        step(model, optimizer, number)


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
def test_phases_in_a_plain_loop_move_exactly_what_is_due(cls: type[torch.optim.Optimizer]):
    model = net()
    frozen = FreezePlan(**PLAN).apply(model)
    optimizer = frozen.optimizer(cls, lr=0.01, weight_decay=0.1)
    phases = []
    for number in range(16):
        before = digests(model)
        changed = frozen.advance(step=number, steps_per_epoch=4)
        step(model, optimizer, number)
        moved = {k for k, v in digests(model).items() if not torch.equal(v, before[k])}
        phases.append((changed, sorted({int(k[0]) for k in moved})))
        assert moved == set(frozen.resolution.trainable_names)
    assert [p for p in phases if p[0]] == [(True, [2, 3]), (True, [2]), (True, [2, 3])]
    frozen.audit().raise_if_broken()


def test_advance_says_whether_the_phase_changed_and_takes_metrics():
    plan = FreezePlan(train="[3]", thaw=[{"when": "plateau(valid/loss, patience=1)", "train": "[2]"}])
    frozen = plan.apply(net())
    assert [frozen.advance(epoch=e, metrics={"valid/loss": x}) for e, x in ((1, 2.0), (2, 1.5), (3, 1.6))] == [
        False,
        False,
        True,
    ]
    assert not frozen.advance(epoch=3, metrics={"valid/loss": 1.6})


def test_a_run_stopped_and_resumed_in_each_phase_goes_on_bit_for_bit():
    whole = net()
    frozen = FreezePlan(**PLAN).apply(whole)
    run(whole, frozen, frozen.optimizer(torch.optim.AdamW, lr=0.01), 0, 16)
    for stop in (2, 4, 7, 9, 13):
        model = net()
        frozen = FreezePlan(**PLAN).apply(model)
        optimizer = frozen.optimizer(torch.optim.AdamW, lr=0.01)
        run(model, frozen, optimizer, 0, stop)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        again = net()
        frozen = FreezePlan(**PLAN).apply(again)
        optimizer = frozen.optimizer(torch.optim.AdamW, lr=0.01)
        again.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        run(again, frozen, optimizer, stop, 16)
        assert same(digests(whole), digests(again)), stop
        frozen.audit().raise_if_broken()


def test_the_state_of_another_plan_is_refused():
    a = FreezePlan(**PLAN).apply(net())
    b = FreezePlan(train="[3]").apply(net())
    with pytest.raises(RecipeError, match="saved under another plan"):
        b.load_state_dict(a.state_dict())
    plain = torch.optim.AdamW(net().parameters())
    with pytest.raises(RecipeError, match="not saved under a plan"):
        b.optimizer(torch.optim.AdamW, lr=1).load_state_dict(plain.state_dict())


@pytest.mark.parametrize(("moments", "kept"), [("park", True), ("reset", False)])
def test_moments_of_what_is_frozen_again_are_parked_or_dropped(moments: str, kept: bool):
    model = net()
    frozen = FreezePlan(**PLAN, moments=moments).apply(model)
    optimizer = frozen.optimizer(torch.optim.AdamW, lr=0.01)
    run(model, frozen, optimizer, 0, 8)
    before = {k: v.clone() for k, v in optimizer.state[model[3].weight].items()}
    run(model, frozen, optimizer, 8, 12)
    assert model[3].weight not in optimizer.state
    frozen.advance(step=12)
    state = optimizer.state.get(model[3].weight, {})
    assert bool(state) is kept
    assert all(torch.equal(state[k], before[k]) for k in state)


def test_a_scheduler_built_before_the_thaw_stays_right_after_it():
    model = net()
    frozen = FreezePlan(**PLAN).apply(model)
    optimizer = frozen.optimizer(torch.optim.AdamW, lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 / (1 + s))
    for number in range(6):
        frozen.advance(step=number, steps_per_epoch=4)
        step(model, optimizer, number)
        scheduler.step()
    rates = {n: g["lr"] for g in optimizer.param_groups for n in g["names"]}
    assert rates["3.weight"] == pytest.approx(0.01 / 7)
    assert rates["2.weight"] == pytest.approx(0.001 / 7)


def test_a_warm_up_scales_the_rate_during_the_step_only():
    plan = FreezePlan(train="[3]", thaw=[{"after": "2 steps", "train": "[2]", "warmup": "2 steps"}])
    seen = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            seen.append({n: g["lr"] for g in self.param_groups for n in g["names"] if n.endswith("weight")})
            return super().step(closure)

    model = net()
    frozen = plan.apply(model)
    optimizer = frozen.optimizer(Spy, lr=1e-3)
    run(model, frozen, optimizer, 0, 5)
    assert [s.get("2.weight") for s in seen] == [None, None, 5e-4, 1e-3, 1e-3]
    assert {s["3.weight"] for s in seen} == {1e-3}
    assert {g["lr"] for g in optimizer.param_groups} == {1e-3}


def test_an_optimizer_that_misses_what_trains_is_refused_at_the_next_step():
    model = net()
    frozen = FreezePlan(train="[2:]").apply(model)
    optimizer = frozen.optimizer(torch.optim.AdamW, lr=0.01)
    model[3] = nn.Linear(8, 2)
    with pytest.raises(LawBroken, match="no longer in the model"):
        step(model, optimizer, 0)


@pytest.mark.parametrize("settings", [{}, {"foreach": True}, {"fused": True}], ids=["default", "foreach", "fused"])
def test_groups_given_to_a_plain_optimizer_follow_the_phases_too(settings: dict):
    a, b = net(), net()
    attached, plain = FreezePlan(**PLAN).apply(a), FreezePlan(**PLAN).apply(b)
    one = attached.optimizer(torch.optim.AdamW, lr=0.01, **settings)
    two = torch.optim.AdamW(plain.param_groups(lr=0.01), **settings)
    run(a, attached, one, 0, 16)
    run(b, plain, two, 0, 16)
    assert same(digests(a), digests(b))
    plain.audit().raise_if_broken()


def test_an_optimizer_not_built_from_the_plan_cannot_be_attached():
    model = net()
    frozen = FreezePlan(train="[3]").apply(model)
    with pytest.raises(RecipeError, match="not built from this plan's groups"):
        frozen.attach(torch.optim.AdamW(model.parameters()))


def test_a_refused_phase_changes_nothing():
    model = net()
    frozen = FreezePlan(**PLAN).apply(model)
    optimizer = frozen.optimizer(torch.optim.AdamW, lr=0.01)
    model[0] = nn.Linear(4, 9)
    with pytest.raises(RecipeError, match="shape"):
        frozen.enter(1)
    assert frozen.phase == 0
    assert [n for g in optimizer.param_groups for n in g["names"]] == ["3.weight", "3.bias"]
    assert not model[2].weight.requires_grad


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


def test_only_the_named_rows_of_an_embedding_move_whatever_the_optimizer_does():
    for make in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD):
        model = Words()
        before = model.embed.weight.detach().clone()
        frozen = FreezePlan(train=["embed.weight[rows 7:]", "head"]).apply(model)
        optimizer = frozen.optimizer(make, lr=0.1, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.arange(10)).square().sum().backward()
            optimizer.step()
        assert torch.equal(model.embed.weight[:7], before[:7])
        assert not torch.isclose(model.embed.weight[7:], before[7:]).any()
        frozen.audit().raise_if_broken()


def test_the_audit_sees_a_frozen_row_that_moved():
    model = Words()
    frozen = FreezePlan(train=["embed.weight[rows 7:]", "head"]).apply(model)
    optimizer = torch.optim.SGD(frozen.param_groups(lr=0.1))  # not attached: nothing puts the rows back
    model(torch.arange(10)).square().sum().backward()
    optimizer.step()
    assert frozen.audit().moved_frozen == ("embed.weight[rows frozen]",)


def test_the_audit_covers_every_phase_on_its_own():
    model = net()
    frozen = FreezePlan(**PLAN).apply(model)
    optimizer = frozen.optimizer(torch.optim.AdamW, lr=0.01)
    run(model, frozen, optimizer, 0, 9)
    with torch.no_grad():
        model[3].weight.add_(1)  # it trained in phases 0 and 1; it is frozen in phase 2
    frozen.advance(step=12)
    assert frozen.audit().moved_frozen == ("3.weight",)


def test_wrapping_is_done_anew_at_each_phase():
    model = net()
    frozen = FreezePlan(**PLAN).apply(model)
    made = []
    frozen.wrap(lambda m: made.append(nn.Sequential(m)) or made[-1])
    first = frozen.wrapped
    frozen.advance(epoch=1)
    assert (len(made), frozen.wrapped is first) == (2, False)


def test_a_copy_of_the_model_is_frozen_like_the_original():
    model = net()
    FreezePlan(train="[3]").apply(model)
    twin = copy.deepcopy(model).train()
    assert [m.training for m in twin] == [False, False, False, True]
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
