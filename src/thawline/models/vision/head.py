"""The last layer of a classifier: finding it, and giving it other classes on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from thawline.errors import RecipeError

_NEW_STD = 0.01
"""Standard deviation of new rows where none is kept: small, so that training starts at the loss of a guess, log(C)
(Girshick 2015, Fast R-CNN, section 3.1)."""


@dataclass(frozen=True, slots=True)
class HeadChange:
    """What `replace_head_` did.

    name:  dotted path of the layer
    kept:  classes whose rows were taken over from the old head
    new:   classes whose rows were drawn
    gone:  number of old rows that nothing needs any more
    """

    name: str
    kept: tuple[str, ...]
    new: tuple[str, ...]
    gone: int

    def __str__(self) -> str:
        kept = f"{len(self.kept)} rows kept ({', '.join(self.kept[:8])})" if self.kept else "no row kept"
        new = f"{len(self.new)} drawn ({', '.join(self.new[:8])}{' ...' if len(self.new) > 8 else ''})"
        return f"head {self.name}: {kept}, {new}, {self.gone} of the old left out"


def find_head(model: nn.Module, *, name: str = "", classes: int = 0) -> str:
    """Dotted path of the linear layer that gives the logits: `name`, or the last linear layer in the model.

    classes: the number of outputs it must have, where that is known
    Raises RecipeError where `name` is no linear layer, or there is none, with the layers there are.
    """
    linear = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    if name:
        if name not in linear:
            raise RecipeError(
                f"the head {name!r} is no linear layer of this model",
                fix=f"its last ones: {', '.join(list(linear)[-3:]) or 'none'}",
            )
        return name
    fitting = [path for path, m in linear.items() if not classes or m.out_features == classes]
    if not fitting:
        raise RecipeError(
            f"no linear layer gives {classes} classes" if classes else "the model has no linear layer",
            fix=f"name it with options.head_name; linear layers: {', '.join(list(linear)[-4:]) or 'none'}",
        )
    return str(fitting[-1])


def head_layer(model: nn.Module, name: str) -> nn.Linear:
    """The layer that `find_head` found."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def resize_head_(model: nn.Module, name: str, classes: int) -> None:
    """Give the head `classes` outputs, with weights still to be loaded; nothing where it has so many."""
    old = head_layer(model, name)
    if old.out_features != classes:
        new = nn.Linear(old.in_features, classes, bias=old.bias is not None)
        _put_(model, name, new.to(old.weight.device, old.weight.dtype).train(old.training))


def replace_head_(model: nn.Module, name: str, *, old: Sequence[str], new: Sequence[str], seed: int) -> HeadChange:
    """Exchange the head for one that gives the classes `new`.

    Classes that `old` names too keep their rows; the others are drawn from `seed`: weights normal with the spread of
    the kept rows (0.01 without any), so that no class starts louder than another, biases at the kept rows' mean, or 0.
    """
    layer = head_layer(model, name)
    rows = {label: i for i, label in enumerate(old)} if len(old) == layer.out_features else {}
    kept = tuple(label for label in new if label in rows)
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    taken = [rows[label] for label in kept]
    std = float(weight[taken].std()) if taken else _NEW_STD
    generator = torch.Generator().manual_seed(seed)
    made = nn.Linear(layer.in_features, len(new), bias=bias is not None)
    with torch.no_grad():
        made.weight.copy_(torch.randn(made.weight.shape, generator=generator) * std)
        if bias is not None:
            made.bias.fill_(float(bias[taken].mean()) if taken else 0.0)
        for label in kept:
            made.weight[new.index(label)] = weight[rows[label]].to(made.weight)
            if bias is not None:
                made.bias[new.index(label)] = bias[rows[label]].to(made.bias)
    _put_(model, name, made.to(weight.device, weight.dtype).train(layer.training))
    drawn = tuple(label for label in new if label not in rows)
    return HeadChange(name, kept, drawn, layer.out_features - len(kept))


def _put_(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    model.get_submodule(parent)._modules[key] = layer
