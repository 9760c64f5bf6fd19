"""Upstream's freeze switches, parameter by parameter and mode by mode."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from tests.models.videochat_case import BASE, CASES, VideoChatCase

from thawline.core.index import ModelIndex, ParamInfo
from thawline.core.select import select
from thawline.errors import RecipeError
from thawline.freeze.inspect import index_of
from thawline.freeze.plan import FreezePlan
from thawline.models.videochat.config import VideoChatConfig
from thawline.models.videochat.model import VideoChat
from thawline.models.videochat.switches import Switches, different_lr, no_decay, plan_of, plan_of_stage1

STAGES = [
    f"stage2__freeze_vit={v}__freeze_qformer={q}__lora=0" for v in (0, 1) for q in (0, 1)
] + [f"stage3__freeze_vit={v}__freeze_qformer={q}__lora={r}" for v in (0, 1) for q in (0, 1) for r in (0, 1)] + [
    "stage3f__freeze_vit=1__freeze_qformer=1__lora=1__freeze_lora=1"
]  # fmt: skip


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, shared: Path) -> VideoChatCase:
    return VideoChatCase(shared / "parity" / "videochat2" / request.param)


def situation(case: VideoChatCase, name: str) -> tuple[VideoChat, Switches, dict[str, Any]]:
    flags = {k: v == "1" for k, v in re.findall(r"__(\w+?)=(\d)", name)}
    config = case.config(stage=2 if name.startswith("stage2") else 3)
    if not flags["lora"]:
        config = dataclasses.replace(config, lora=None)
    switches = Switches(
        freeze_vit=flags["freeze_vit"],
        freeze_qformer=flags["freeze_qformer"],
        freeze_lora=flags.get("freeze_lora", False),
    )
    return case.empty(config), switches, case.json(f"trainable/{name}.json")


def upstream_name(name: str) -> str:
    return name.replace(".base_layer", "")


@pytest.mark.parametrize("name", STAGES)
def test_compat_upstream_gives_the_original_map_of_parameters(case: VideoChatCase, name: str) -> None:
    model, switches, golden = situation(case, name)
    plan = plan_of(switches, model.config, compat="upstream")
    trained = set(select(list(plan.train), index_of(model)))
    ours = {upstream_name(n): n in trained for n, _ in model.named_parameters()}
    assert ours == golden["requires_grad"]
    # Order decides the optimizer's groups. Upstream's own copy of LLaMA lists its frozen layers in another order.
    llm = model.config.llm_name
    assert [n for n in ours if not n.startswith(llm)] == [n for n in golden["requires_grad"] if not n.startswith(llm)]
    assert sum(p.numel() for n, p in model.named_parameters() if n in trained) == golden["n_trainable"]
    assert sum(p.numel() for p in model.parameters()) == golden["n_total"]


@pytest.mark.parametrize("name", STAGES)
def test_compat_upstream_gives_the_original_map_of_modes(case: VideoChatCase, name: str) -> None:
    model, switches, golden = situation(case, name)
    plan = plan_of(switches, model.config, compat="upstream")
    pinned = {n for n, _ in model.named_modules() if any(n == p or n.startswith(p + ".") for p in plan.pinned)}
    llm = model.config.llm_name
    wanted = set(golden["eval_modules_after_train"])
    # Inside the language model, transformers and peft have renamed and regrouped modules since; its root stands for it.
    assert {n for n in pinned if not n.startswith(llm)} == {n for n in wanted if not n.startswith(llm)}
    assert (llm in pinned) == (llm in wanted)


@pytest.mark.parametrize("name", STAGES)
def test_a_freeze_plan_of_these_selectors_holds_upstreams_modes_through_train(case: VideoChatCase, name: str) -> None:
    model, switches, golden = situation(case, name)
    FreezePlan(train=list(plan_of(switches, model.config, compat="upstream").train)).apply(model)
    model.train()
    llm = model.config.llm_name
    ours = {n for n, m in model.named_modules() if not m.training and not n.startswith(llm)}
    assert ours == {n for n in golden["eval_modules_after_train"] if not n.startswith(llm)}
    assert {upstream_name(n): p.requires_grad for n, p in model.named_parameters()} == golden["requires_grad"]


def test_stage_1_trains_everything_but_the_vision_transformer(case: VideoChatCase) -> None:
    golden = case.json("trainable/stage1.json")
    base = case.read(BASE)
    known = [ParamInfo(name=n, shape=tuple(base[n].shape), dtype="F32") for n in golden["requires_grad"]]
    plan = plan_of_stage1(compat="upstream")
    trained = set(select(list(plan.train), ModelIndex(known)))
    assert {n: n in trained for n in golden["requires_grad"]} == golden["requires_grad"]
    assert list(plan.pinned) == golden["eval_modules_after_train"] == []
    assert plan_of_stage1().pinned == ("vision_encoder",)


def test_by_default_extra_queries_freeze_with_the_q_former_and_it_is_said(case: VideoChatCase) -> None:
    config = case.config()
    plan = plan_of(Switches(freeze_qformer=True), config)
    assert "extra_query_tokens" not in plan.train
    assert any("upstream trains them (compat: upstream)" in note for note in plan.notes)
    assert "extra_query_tokens" in plan_of(Switches(freeze_qformer=True), config, compat="upstream").train


def test_an_open_language_model_beside_lora_is_said_to_make_whole_deltas(case: VideoChatCase) -> None:
    plan = plan_of(Switches(freeze_llm=False), case.config(), compat="upstream")
    model = case.empty()
    names = set(select(list(plan.train), index_of(model)))
    assert {n for n, _ in model.named_parameters() if n.startswith(model.config.llm_name)} <= names
    assert any("as large as it" in note for note in plan.notes)


def test_freeze_mhra_is_never_passed_over_silently(case: VideoChatCase) -> None:
    assert any("freeze_mhra has no effect" in n for n in plan_of(Switches(freeze_mhra=True), case.config()).notes)


def test_decay_and_second_rates_fall_as_in_upstreams_optimizer(case: VideoChatCase) -> None:
    model = case.empty()
    shapes = {upstream_name(n): tuple(p.shape) for n, p in model.named_parameters()}
    for golden in case.json("optimizer_groups.json").values():
        named = [n for group in golden["groups"] for n in group["params"]]
        without = set(no_decay({n: shapes[n] for n in named}))
        fast = set(
            different_lr(named, golden["different_lr"]["module_names"] if golden["different_lr"]["enable"] else [])
        )
        for group in golden["groups"]:
            for name in group["params"]:
                assert (0 if name in without else golden["weight_decay"]) == group["weight_decay"], name
                assert (golden["different_lr"]["lr"] if name in fast else golden["default_lr"]) == group["lr"], name


def test_a_second_rate_for_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="'decorder' is found in no parameter's name"):
        different_lr(["query_tokens"], ["decorder"])


def test_the_switches_need_no_model_on_disk() -> None:
    assert plan_of(Switches(), VideoChatConfig()).train == ("mistral_proj",)
