"""The classic mistakes of freezing by hand, each with what a plan does instead.

The numbers are those of the study of peers; every one was reproduced there with torch 2.13.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from thawline.ckpt.delta import BaseRef, apply, delta_of
from thawline.core.select import select
from thawline.errors import BaseMismatch, CheckpointError, LawBroken, RecipeError, SelectorError
from thawline.freeze import doctor
from thawline.freeze.audit import audit_average
from thawline.freeze.groups import optimizer_state_by_name, restore_optimizer_
from thawline.freeze.inspect import index_of
from thawline.freeze.lora import is_merged, merged_copy
from thawline.freeze.plan import FreezePlan


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


def mlp(n: int = 3, d: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(d, d) for _ in range(n)])


IMAGES = torch.randn(16, 3, 8, 8) * 3 + 2


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor | None = None, **settings: Any) -> None:
    optimizer.zero_grad(**settings)
    model(torch.randn(4, 8) if x is None else x).square().mean().backward()
    optimizer.step()


def snap(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: nn.Module) -> list[str]:
    return [k for k, v in model.state_dict().items() if not torch.equal(before[k], v)]


def test_01_statistics_of_a_frozen_batch_norm_do_not_drift_in_training():
    model = conv_net()
    frozen = FreezePlan(train="[5]").apply(model)
    optimizer = frozen.optimizer(torch.optim.SGD, lr=0.1)
    before, output = snap(model), model.eval()[:5](IMAGES)
    model.train()
    for _ in range(5):
        step(model, optimizer, IMAGES)
    assert changed(before, model) == ["5.weight", "5.bias"]
    assert torch.equal(model.eval()[:5](IMAGES), output)


def test_02_the_pin_survives_cycles_of_train_and_eval_and_comes_off():
    model = conv_net()
    frozen = FreezePlan(train="[5]").apply(model)
    for _ in range(2):
        model.eval()
        model.train()
        model[1].train(True)
        assert not model[1].training
    frozen.release()
    assert model.train()[1].training


def test_03_a_pin_is_no_function_on_the_instance_so_eval_returns_the_module_and_slices_stay_pinned():
    model = conv_net()
    FreezePlan(train="[5]").apply(model)
    assert model[1].eval() is model[1]
    assert "train" not in vars(model[1])
    front = model[:5]
    front.train()
    assert not front[1].training


def test_04_a_frozen_batch_norm_computes_in_training_what_it_computes_in_eval():
    model = conv_net()
    FreezePlan(train="[5]").apply(model)
    training = model.train()[:5](IMAGES)
    assert torch.equal(training, model.eval()[:5](IMAGES))
    assert model[1].track_running_stats


def test_05_batch_norms_are_frozen_with_their_block_before_and_after_a_thaw_elsewhere():
    model = nn.ModuleDict({"body": conv_net()[:5], "neck": nn.Linear(8, 8), "head": nn.Linear(8, 4)})
    frozen = FreezePlan(train="head", thaw=[{"after": "1 epoch", "train": "neck"}]).apply(model)
    for epoch in (0, 1):
        frozen.advance(epoch=epoch)
        model.train()
        model["body"](IMAGES)
        assert not model["body"][1].weight.requires_grad
        assert not model["body"][1].running_mean.any()
    frozen.audit().raise_if_broken()


def test_06_frozen_means_no_gradient_and_not_in_the_optimizer_so_weight_decay_cannot_move_it():
    model = mlp()
    frozen = FreezePlan(train="[2]").apply(model)
    optimizer = frozen.optimizer(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    before = snap(model)
    step(model, optimizer)
    assert [p.grad is None for p in model.parameters()] == [True, True, True, True, False, False]
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model[2].parameters()}
    assert changed(before, model) == ["2.weight", "2.bias"]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize(
    ("cls", "settings"), [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {"weight_decay": 0.0})]
)
def test_07_freezing_again_clears_gradients_and_parks_moments(cls, settings, set_to_none: bool):
    model = mlp()
    frozen = FreezePlan(train="**", thaw=[{"after": "1 epoch", "freeze": "[0]"}]).apply(model)
    optimizer = frozen.optimizer(cls, lr=0.1, **settings)
    for _ in range(3):
        step(model, optimizer, set_to_none=set_to_none)
    frozen.advance(epoch=1)
    assert model[0].weight.grad is None
    assert model[0].weight not in optimizer.state
    before = snap(model)
    optimizer.step()
    for _ in range(3):
        step(model, optimizer, set_to_none=set_to_none)
    assert [n for n in changed(before, model) if n.startswith("0")] == []


def test_08_what_thaws_is_in_the_optimizer_or_the_step_is_refused():
    model = mlp()
    frozen = FreezePlan(train="[2]", thaw=[{"after": "1 epoch", "train": "[0]"}]).apply(model)
    optimizer = frozen.optimizer(torch.optim.AdamW, lr=0.1)
    step(model, optimizer)
    frozen.advance(epoch=1)
    before = snap(model)
    step(model, optimizer)
    assert set(changed(before, model)) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    model[1].weight.requires_grad_(True)
    with pytest.raises(LawBroken, match=r"not in the plan but requires_grad: 1.weight"):
        frozen.check(optimizer)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    script = Path(__file__).with_name("ddp_cases.py")
    store = tmp_path_factory.mktemp("ddp") / "store"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(rank), str(store)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    return json.loads(outputs[0][0])


@pytest.mark.long
def test_09_a_thaw_under_ddp_wraps_anew_and_the_ranks_agree(two_processes: dict[str, Any]):
    assert two_processes["thaw_and_freeze_with_wrap"]["diverged"] == []
    assert two_processes["thaw_and_freeze_with_wrap"]["moved"][0] == ["a", "c"]
    refused = two_processes["thaw_without_wrap_is_refused"]
    assert "the ranks would drift apart" in refused["error"]
    assert (refused["phase"], refused["a"]) == (0, False)


@pytest.mark.long
def test_10_freezing_again_under_ddp_neither_hangs_nor_moves_the_frozen(two_processes: dict[str, Any]):
    assert two_processes["thaw_and_freeze_with_wrap"]["moved"][1] == ["b"]
    assert not two_processes["thaw_and_freeze_with_wrap"]["broken"]


@pytest.mark.long
def test_11_unused_parts_are_fine_when_frozen_and_named_when_they_train(two_processes: dict[str, Any]):
    assert two_processes["unused_but_frozen"]["diverged"] == []
    found = two_processes["unused_trainables_are_named"]["found"]
    assert found["find-unused-parameters"] == ["b.weight", "b.bias"]
    with pytest.raises(RecipeError, match="no parameter is left to train"):
        FreezePlan(train=["**", "!**"]).apply(mlp())


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.Adam])
def test_12_frozen_rows_stay_bit_for_bit_under_weight_decay(cls):
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    before = model[0].weight.detach().clone()
    frozen = FreezePlan(train="[0].weight[rows 8:]").apply(model)
    optimizer = frozen.optimizer(cls, lr=0.1, weight_decay=0.1)
    for _ in range(5):
        step(model, optimizer, torch.arange(10))
    assert torch.equal(model[0].weight[:8], before[:8])
    assert not torch.equal(model[0].weight[8:], before[8:])


def test_13_clipping_sees_only_what_trains():
    model = mlp()
    x = torch.randn(4, 8)
    model(x).square().mean().mul(1000).backward()
    frozen = FreezePlan(train="[2]").apply(model)
    for p in frozen.trainable_parameters():
        p.grad = None
    model(x).square().mean().backward()
    clean = copy.deepcopy(mlp())
    clean(x).square().mean().backward()
    over_all = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    over_plan = nn.utils.clip_grad_norm_(frozen.trainable_parameters(), 1e9)
    real = nn.utils.clip_grad_norm_(clean[2].parameters(), 1e9)
    assert over_all == over_plan == real


def test_14_a_tie_is_one_parameter_under_every_name_and_a_half_frozen_one_is_refused():
    class LM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(10, 8)
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.emb.weight

    assert select("head.*", index_of(LM())) == ("head.weight",)
    with pytest.raises(SelectorError, match=r"head\.weight and emb\.weight are one tensor"):
        FreezePlan(train="head").apply(LM())
    frozen = FreezePlan(train=["emb", "head"]).apply(LM())
    assert frozen.resolution["head.weight"].also == ("head.weight",)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.block, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, self.emb(x), use_reentrant=True))


@pytest.mark.parametrize(
    ("train", "code", "severity"),
    [(["block", "head"], "no-gradient-checkpoint", "error"), (["head"], "checkpoint-harmless", "info")],
)
def test_15_the_checkpoint_warning_is_told_fatal_from_harmless(train: list[str], code: str, severity: str):
    model = Checkpointed()
    frozen = FreezePlan(train=train).apply(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with doctor.watch(model, frozen.resolution) as seen:
            model(torch.randn(4, 8)).sum().backward()
    (found,) = doctor.after_first_step(model, frozen.resolution, seen)
    assert (found.code, found.severity) == (code, severity)


def test_16_an_average_that_drifts_over_frozen_tensors_is_found():
    model = mlp()
    frozen = FreezePlan(train="[2]").apply(model)
    good = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999))
    bad = mlp()
    for _ in range(100):
        good.update_parameters(model)
        with torch.no_grad():
            for e, p in zip(bad.parameters(), model.parameters(), strict=True):
                e.mul_(0.999).add_(p, alpha=0.001)
    assert audit_average(model, good, frozen.resolution) == ()
    assert "0.weight" in audit_average(model, bad, frozen.resolution)


def test_17_buffers_count_also_those_that_no_state_dict_holds():
    class Codebook(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(8))
            self.register_buffer("book", torch.ones(8), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.book.mul_(0.9).add_(x.mean(0), alpha=0.1)
            return x * self.w * self.book

    model = nn.Sequential(Codebook(), nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 2))
    frozen = FreezePlan(train="[2]").apply(model)
    optimizer = frozen.optimizer(torch.optim.SGD, lr=0.1)
    model.train()
    step(model, optimizer)
    frozen.audit().raise_if_broken()
    model[0].book.add_(1)
    assert frozen.audit().moved_buffers == ("0.book",)


def test_18_a_step_without_any_gradient_is_named_before_the_scaler_meets_it():
    model = mlp()
    frozen = FreezePlan(train="[0]").apply(model)
    with torch.no_grad(), doctor.watch(model, frozen.resolution) as seen:
        model(torch.randn(4, 8))
    codes = {f.code for f in doctor.after_first_step(model, frozen.resolution, seen)}
    assert codes == {"no-gradient-no_grad", "no-gradient-at-all"}


@pytest.mark.long
def test_19_a_compiled_model_trains_what_is_due_through_twelve_changes_of_phase():
    thaw = [{"after": f"{i} epochs", **({"train": "[0]"} if i % 2 else {"freeze": "[0]"})} for i in range(1, 13)]
    model = mlp()
    frozen = FreezePlan(train="[2]", thaw=thaw).apply(model)
    optimizer = frozen.optimizer(torch.optim.SGD, lr=0.1)
    compiled = torch.compile(model, backend="eager")
    for epoch in range(13):
        frozen.advance(epoch=epoch)
        before = snap(model)
        step(compiled, optimizer)
        assert set(changed(before, model)) == set(frozen.resolution.trainable_names)
    frozen.audit().raise_if_broken()
    torch._dynamo.reset()


def test_20_a_delta_over_another_base_is_refused_by_fingerprint():
    base, model = mlp(), mlp()
    frozen = FreezePlan(train="[2]").apply(model)
    step(model, frozen.optimizer(torch.optim.SGD, lr=0.1))
    delta = delta_of(BaseRef.of(base), model.state_dict())
    assert set(delta.changed) == {"2.weight", "2.bias"}
    other = nn.Sequential(*[nn.Linear(8, 8) for _ in range(3)])
    with pytest.raises(BaseMismatch):
        dict(apply(other.state_dict(), delta))
    merged = dict(apply(base.state_dict(), delta))
    assert all(torch.equal(v, merged[k]) for k, v in model.state_dict().items())


def test_21_a_delta_holds_what_differs_also_what_trained_once_and_is_frozen_again():
    base, model = mlp(), mlp()
    frozen = FreezePlan(train="**", thaw=[{"after": "1 epoch", "freeze": "[0]"}]).apply(model)
    step(model, frozen.optimizer(torch.optim.SGD, lr=0.1))
    frozen.advance(epoch=1)
    assert not model[0].weight.requires_grad
    assert {"0.weight", "0.bias"} <= set(delta_of(BaseRef.of(base), model.state_dict()).changed)


def test_22_optimizer_state_finds_its_parameter_by_name_and_shape():
    model = mlp()
    small = FreezePlan(train="[1:]").apply(model).optimizer(torch.optim.AdamW, lr=0.1)
    step(model, small)
    state = optimizer_state_by_name(small)
    whole = FreezePlan(train="**").apply(model).optimizer(torch.optim.AdamW, lr=0.1)
    assert restore_optimizer_(whole, state) == {}
    assert torch.equal(whole.state[model[2].bias]["exp_avg"], small.state[model[2].bias]["exp_avg"])
    assert model[0].weight not in whole.state
    with pytest.raises(CheckpointError, match="shape"):
        restore_optimizer_(whole, {"0.bias/exp_avg": torch.zeros(8, 8)})


def test_23_a_resume_after_a_thaw_is_in_the_thawed_phase_and_goes_on_bit_for_bit():
    plan = FreezePlan(train="[2]", thaw=[{"after": "1 epoch", "train": "[0]"}])

    def begin() -> tuple[nn.Module, Any, torch.optim.Optimizer]:
        model = mlp()
        frozen = plan.apply(model)
        return model, frozen, frozen.optimizer(torch.optim.AdamW, lr=0.1)

    def go_on(model: nn.Module, frozen: Any, optimizer: torch.optim.Optimizer, epochs: range) -> None:
        for epoch in epochs:
            frozen.advance(epoch=epoch)
            torch.manual_seed(epoch)
            step(model, optimizer)

    whole = begin()
    go_on(*whole, range(4))
    first = begin()
    go_on(*first, range(2))
    again = begin()
    again[0].load_state_dict(first[0].state_dict())
    again[2].load_state_dict(first[2].state_dict())
    assert again[1].phase == 1
    assert again[0][0].weight.requires_grad
    go_on(*again, range(2, 4))
    assert changed(snap(whole[0]), again[0]) == []


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu())


def test_24_adapters_are_merged_on_a_copy_and_a_merged_model_says_so():
    pytest.importorskip("peft", reason="peft is not installed")
    model = Small()
    frozen = FreezePlan(lora={"target": "body", "r": 2, "modules_to_save": ["head"]}).apply(model)
    step(model, frozen.optimizer(torch.optim.AdamW, lr=0.1))
    before = snap(model)
    merged = merged_copy(model)
    assert changed(before, model) == []
    assert (is_merged(model), list(merged.state_dict())) == (False, list(Small().state_dict()))
    model.body.merge()
    assert is_merged(model)


def test_25_a_new_head_beside_adapters_trains_because_the_plan_says_so():
    pytest.importorskip("peft", reason="peft is not installed")
    model = Small()
    frozen = FreezePlan(train="head", lora={"target": "body", "r": 2}).apply(model)
    optimizer = frozen.optimizer(torch.optim.AdamW, lr=0.1)
    before = snap(model)
    for _ in range(2):
        step(model, optimizer)
    assert {"head.weight", "head.bias"} <= set(changed(before, model))
    frozen.audit().raise_if_broken()


def test_26_a_rate_of_zero_is_refused_as_a_freeze():
    with pytest.raises(RecipeError, match="a rate of 0 is no freeze"):
        FreezePlan(train="**", lr={"[0]": 0})
    with pytest.raises(RecipeError, match="is no freeze"):
        FreezePlan(train="**").apply(mlp()).param_groups(lr=0.0)


@pytest.mark.parametrize(("context", "code"), [(torch.no_grad, "no_grad"), (torch.inference_mode, "inference")])
def test_27_a_trainable_under_no_grad_or_inference_mode_is_named(context, code: str):
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enc, self.head = mlp(2), nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            with context():
                h = self.enc(x)
            return self.head(h.clone())

    model = Wrapped()
    frozen = FreezePlan(train=["enc[1]", "head"]).apply(model)
    with doctor.watch(model, frozen.resolution) as seen:
        model(torch.randn(4, 8)).sum().backward()
    (found,) = doctor.after_first_step(model, frozen.resolution, seen)
    assert (found.code, found.names) == (f"no-gradient-{code}", ("enc.1.weight", "enc.1.bias"))


def test_28_two_passes_through_a_frozen_prefix_agree_bit_for_bit_in_training():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), nn.Linear(8, 2))
    FreezePlan(train="[1]").apply(model)
    model.train()
    x = torch.randn(4, 8)
    assert torch.equal(model[0](x), model[0](x))


def test_29_a_head_replaced_after_the_optimizer_was_built_stops_the_next_step():
    model = mlp()
    frozen = FreezePlan(train="[2]").apply(model)
    optimizer = frozen.optimizer(torch.optim.SGD, lr=0.1)
    model[2] = nn.Linear(8, 4)
    with pytest.raises(LawBroken, match="no longer in the model"):
        step(model, optimizer)
    (found,) = [f for f in doctor.before(model, frozen.resolution, optimizer) if f.code == "not-in-model"]
    assert found.severity == "error"


def test_30_selectors_end_at_segments_and_a_typo_is_an_error():
    layers = nn.ModuleDict({"module": mlp(12), "visual": nn.ModuleDict({"blocks": mlp(2)})})
    index = index_of(layers)
    with pytest.raises(SelectorError, match=r"closest: module.1"):
        select("modle.1", index)
    assert select("module.1", index) == ("module.1.weight", "module.1.bias")
    assert {n.split(".")[1] for n in select("module[1,10]", index)} == {"1", "10"}
    with pytest.raises(SelectorError, match="expected to name 2, it names 12"):
        select({"select": "module[:]", "expect": 2}, index)


@pytest.mark.long
def test_31_statistics_of_a_frozen_norm_agree_between_ranks_without_broadcast(two_processes: dict[str, Any]):
    assert two_processes["pinned_statistics_agree_between_ranks"] == {"diverged": [], "broken": False}
