"""LoRA through peft: put in by the plan, names kept, merged on a copy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from thawline.errors import RecipeError, SelectorError
from thawline.freeze.adapters import with_adapters
from thawline.freeze.inspect import index_of
from thawline.freeze.lora import has_adapters, is_merged, merged_copy
from thawline.freeze.plan import FreezePlan, Lora
from thawline.freeze.resolve import resolve

pytest.importorskip("peft", reason="peft is not installed")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.v_proj = nn.Linear(4, 4, bias=False)
        self.norm = nn.LayerNorm(4)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.q_proj(x) + self.v_proj(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


IDS = torch.arange(9)[None]
PLAN = {"lora": {"target": "layers.**.{q,v}_proj", "r": 2, "alpha": 4, "dropout": 0.5, "modules_to_save": ["head"]}}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS).square().sum().backward()
        optimizer.step()


def test_adapters_and_the_new_head_train_and_nothing_else():
    model = Net()
    frozen = FreezePlan(**PLAN).apply(model)
    names = frozen.resolution.trainable_names
    assert {n for n in names if "lora" not in n} == {"head.weight", "head.bias"}
    assert len(names) == 2 + 2 * 2 * 2
    train(model, frozen.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.1))
    frozen.audit().raise_if_broken()


def test_the_function_is_the_same_before_training():
    plain, adapted = Net().eval(), Net()
    FreezePlan(**PLAN).apply(adapted)
    assert torch.equal(plain(IDS), adapted.eval()(IDS))


def test_dropout_of_the_adapter_is_on_while_the_base_is_pinned():
    model = Net()
    FreezePlan(**PLAN).apply(model)
    model.train()
    layer = model.layers[0].q_proj
    assert layer.lora_dropout["default"].training
    assert not layer.base_layer.training
    assert not model.layers[0].norm.training


def test_a_plan_is_resolved_before_the_adapters_are_there_just_as_after():
    model = Net()
    plan = FreezePlan(**PLAN)
    ahead = resolve(plan, index_of(model))
    frozen = plan.apply(model)
    before = {(d.name, d.shape, d.trains) for d in ahead.decisions}
    assert before == {(d.name, d.shape, d.trains) for d in frozen.resolution.decisions}
    assert {m for m in ahead.pinned if "lora_dropout" not in m} == {
        m for m in frozen.resolution.pinned if "lora_dropout" not in m
    }


def test_wrapped_layers_answer_to_their_original_names_in_later_phases():
    model = Net()
    frozen = FreezePlan(**PLAN, thaw=[{"after": "1 epoch", "train": "layers[-1].q_proj.weight"}]).apply(model)
    frozen.advance(epoch=1)
    assert model.layers[1].q_proj.base_layer.weight.requires_grad
    assert not model.layers[1].q_proj.base_layer.bias.requires_grad


def test_merging_happens_on_a_copy_under_the_original_names():
    model = Net()
    frozen = FreezePlan(**PLAN).apply(model)
    train(model, frozen.optimizer(torch.optim.AdamW, lr=0.1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    merged = merged_copy(model)
    assert list(merged.state_dict()) == list(Net().state_dict())
    # Adding the update into the weight rounds once more than applying it beside the weight.
    torch.testing.assert_close(merged.eval()(IDS), model.eval()(IDS), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert has_adapters(model)
    assert not has_adapters(merged)
    Net().load_state_dict(merged.state_dict())


def test_a_merged_model_says_so_and_is_not_merged_twice():
    model = Net()
    FreezePlan(**PLAN).apply(model)
    assert not is_merged(model)
    model.layers[0].q_proj.merge()
    assert is_merged(model)
    with pytest.raises(RecipeError, match="merged already"):
        merged_copy(model)
    with pytest.raises(RecipeError, match="no adapters"):
        merged_copy(Net())


@pytest.mark.parametrize(
    ("target", "message"),
    [("layers.**.k_proj", "matches none"), ("layers[0].norm", "holds no linear layer"), ("layers[7]", "out of range")],
)
def test_a_target_that_fits_nothing_is_refused_and_the_model_untouched(target: str, message: str):
    model = Net()
    with pytest.raises(SelectorError, match=message):
        FreezePlan(lora={"target": target}).apply(model)
    assert not has_adapters(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_container_gives_its_linear_layers_and_minus_takes_some_away():
    model = Net()
    FreezePlan(lora={"target": ["layers", "!layers[0]"]}).apply(model)
    wrapped = {n for n, m in model.named_modules() if hasattr(m, "base_layer")}
    assert wrapped == {"layers.1.q_proj", "layers.1.v_proj"}


def test_a_model_that_has_adapters_keeps_them():
    model = Net()
    FreezePlan(**PLAN).apply(model)
    again = FreezePlan(train=["@lora"]).apply(model)
    assert len(again.resolution.trainable_names) == 8


def test_an_embedding_named_itself_gets_its_own_kind_of_adapter():
    model = Net()
    lora = Lora(target="embed", r=2)
    planned = {(i.name, i.shape) for i in with_adapters(index_of(model), lora).params}
    FreezePlan(lora={"target": "embed", "r": 2}).apply(model)
    assert planned == {(i.name, i.shape) for i in index_of(model).params}
