"""Modes and requires_grad on live models: pins that hold, and that come off."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from thawline.errors import RecipeError
from thawline.freeze.apply import apply_, is_pinned, release_
from thawline.freeze.inspect import index_of
from thawline.freeze.plan import FreezePlan
from thawline.freeze.resolve import resolve


def net() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU())
    return nn.Sequential(body, nn.Flatten(), nn.Dropout(0.5), nn.Linear(4 * 36, 2))


def pinned_net() -> nn.Sequential:
    model = net()
    FreezePlan(train="[3]").apply(model)
    return model


X = torch.randn(2, 3, 8, 8)
MODES = [False] * 5


def body_modes(model: nn.Module) -> list[bool]:
    return [m.training for m in model.get_submodule("0").modules()]


@pytest.mark.parametrize(
    "way",
    [
        lambda m: m,
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: torch.load(_saved(m), weights_only=False),
        lambda m: m.eval().train(),
    ],
    ids=["as it is", "deepcopy", "pickle", "torch.save", "eval and train"],
)
def test_a_pin_holds_through_train_and_copies(way):
    model = way(pinned_net())
    model.train()
    assert body_modes(model) == MODES
    assert model[2].training
    assert model[3].training
    model[0][1].train()
    assert not model[0][1].training


def _saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_a_pinned_module_is_still_what_it_was():
    model = pinned_net()
    plain = net()
    assert model[0].eval() is model[0]
    assert model[0].train() is model[0]
    assert isinstance(model[0][1], nn.BatchNorm2d)
    assert repr(model) == repr(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert "train" not in model[0].__dict__


def test_a_slice_of_a_pinned_container_stays_pinned():
    part = pinned_net()[0][:2]
    part.train()
    assert [m.training for m in part] == [False, False]


def test_a_frozen_part_in_training_computes_what_it_computes_in_eval():
    model = pinned_net()
    model.train()
    in_training = model[0](X)
    model.eval()
    assert torch.equal(in_training, model[0](X))
    assert torch.equal(model[0][1].running_mean, torch.zeros(4))


def test_a_pin_comes_off_and_leaves_no_trace():
    model = net().train()
    frozen = FreezePlan(train="[3]").apply(model)
    assert is_pinned(model[0])
    assert frozen.release() is model
    model.train()
    assert type(model[0]) is nn.Sequential
    assert type(model[0][1]) is nn.BatchNorm2d
    assert body_modes(model) == [True] * 5
    assert all(p.requires_grad for p in model.parameters())


def test_releasing_in_eval_leaves_the_model_in_eval():
    model = net().eval()
    FreezePlan(train="[3]").apply(model)
    release_(model)
    assert not any(m.training for m in model.modules())


def test_torch_compile_keeps_the_pin_and_the_statistics():
    model = pinned_net()
    before = model[0][1].running_mean.clone()
    compiled = torch.compile(model, backend="eager")
    compiled.train()
    compiled(X).sum().backward()
    assert body_modes(model) == MODES
    assert torch.equal(model[0][1].running_mean, before)
    assert model[3].weight.grad is not None
    torch._dynamo.reset()


def test_a_scripted_pinned_model_computes_the_same():
    model = pinned_net().eval()
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        scripted = torch.jit.script(model)
    assert torch.equal(scripted(X), model(X))


def test_attention_and_recurrent_layers_have_no_dropout_when_pinned():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
            self.lstm = nn.LSTM(8, 8, 2, dropout=0.5)
            self.head = nn.Linear(8, 2)

    model = Two()
    FreezePlan(train="head").apply(model)
    model.train()
    x = torch.randn(1, 5, 8)
    assert torch.equal(model.attention(x, x, x)[0], model.attention(x, x, x)[0])
    assert torch.equal(model.lstm(x)[0], model.lstm(x)[0])
    assert torch.equal(copy.deepcopy(model).train().lstm(x)[0], model.lstm(x)[0])


def test_spectral_norm_of_a_frozen_layer_does_not_iterate():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    frozen = FreezePlan(train="[1]").apply(model)
    model.train()
    for _ in range(3):
        model(torch.randn(2, 4))
    assert not frozen.audit().moved_buffers


def test_a_module_that_overrides_train_keeps_its_own_behaviour():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self.calls = 0

        def train(self, mode: bool = True) -> Half:
            super().train(mode)
            self.calls += 1
            return self

    model = nn.Sequential(Half(), nn.Linear(2, 2))
    FreezePlan(train="[1]").apply(model)
    model.train()
    assert (model[0].calls, model[0].training) == (1, False)


def test_dropout_shared_with_a_part_that_trains_is_left_alone():
    dropout = nn.Dropout(0.5)
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), dropout), nn.Sequential(nn.Linear(2, 2), dropout))
    FreezePlan(train="[1]").apply(model)
    assert not is_pinned(dropout)
    assert is_pinned(model[0][0])


def test_a_bare_parameter_can_train_in_a_frozen_module():
    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query_tokens = nn.Parameter(torch.zeros(1, 4))
            self.body = nn.Linear(4, 4)
            self.dropout = nn.Dropout(0.1)

    model = Prompted()
    FreezePlan(train="query_tokens").apply(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["query_tokens"]
    assert is_pinned(model.body)
    assert not is_pinned(model.dropout)


def test_a_resolution_of_another_model_changes_nothing():
    model = net()
    other = resolve(FreezePlan(train="[0]"), index_of(nn.Sequential(nn.Linear(2, 2))))
    with pytest.raises(RecipeError, match="belongs to another model"):
        apply_(model, other)
    assert all(p.requires_grad for p in model.parameters())


def test_a_plan_with_a_fault_leaves_the_model_as_it_was():
    model = net()
    with pytest.raises(RecipeError):
        FreezePlan(train="[3]", thaw=[{"after": "1 epoch", "train": "[9]"}]).apply(model)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(is_pinned(m) for m in model.modules())


def test_frozen_parameters_lose_their_gradient_and_thawed_ones_begin_without():
    model = net()
    model(X).sum().backward()
    FreezePlan(train="[3]").apply(model)
    assert model[0][0].weight.grad is None
    assert model[3].weight.grad is not None
