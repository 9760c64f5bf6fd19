"""LoRA adapters through peft: put in by the plan, merged on a copy only.

`inject_` keeps the model's class and names: an adapted layer `x.q_proj` becomes peft's wrapper with
`x.q_proj.base_layer.weight` inside, which selectors still know as `x.q_proj.weight`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

from torch import nn

from thawline.core.adapter import NAME as ADAPTER
from thawline.core.adapter import Adapter, factors
from thawline.core.extras import need
from thawline.core.index import is_adapter
from thawline.errors import CheckpointError, RecipeError
from thawline.freeze.adapters import lora_targets
from thawline.freeze.inspect import index_of, unwrap
from thawline.freeze.plan import Lora


def inject_(model: nn.Module, lora: Lora) -> tuple[str, ...]:
    """Put adapters on the layers that `lora.target` names; their paths. The function computed stays the same.

    Raises RecipeError where the model has adapters already, SelectorError where the target fits nothing, MissingExtra
    without peft.
    """
    if has_adapters(model):
        raise RecipeError(
            "the model has LoRA adapters already", where=lora.where(), fix='drop lora: from the plan, train "@lora"'
        )
    targets = lora_targets(index_of(model), lora)
    _put_(model, targets, r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, use_rslora=lora.rslora)
    return targets


def reinject_(model: nn.Module, adapters: Mapping[str, Adapter], *, source: str) -> None:
    """Put back the adapters that a delta records, their factors still to be loaded; those that are there stay.

    source: the delta; for messages
    Raises CheckpointError naming the layers that the model does not have, MissingExtra without peft.
    """
    modules = dict(unwrap(model).named_modules())
    strangers = sorted(path for path in adapters if path not in modules)
    if strangers:
        raise CheckpointError(
            f"adapts {len(strangers)} layers that the model does not have: {', '.join(strangers[:5])}",
            where=source,
            fix="build the model that it was trained on",
        )
    new = {path: a for path, a in adapters.items() if not hasattr(modules[path], "base_layer")}
    settings: dict[tuple[Any, ...], list[str]] = {}
    for path, a in new.items():
        settings.setdefault((a.rank, a.alpha, a.dropout, a.rslora, a.fan_in_fan_out), []).append(path)
    for (rank, alpha, dropout, rslora, flipped), paths in settings.items():
        _put_(
            model, paths, r=rank, lora_alpha=alpha, lora_dropout=dropout, use_rslora=rslora, fan_in_fan_out=flipped
        )  # fmt: skip
    for path in (path for path, a in new.items() if a.merged):
        layer: Any = unwrap(model).get_submodule(path)
        layer.merged_adapters = [ADAPTER]


def adapters_of(model: nn.Module, *, besides: Container[str] = ()) -> dict[str, Adapter]:
    """The adapters of a model by the path of their layer: all that their factors do not say.

    besides: names of tensors; adapters whose factors are among them are left out (the base's own)
    Raises CheckpointError for a kind of adapter that is more than a product of two factors added to a weight.
    """
    bare = unwrap(model)
    names: dict[int, list[str]] = {}
    for name, parameter in bare.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found: dict[str, Adapter] = {}
    for path, module in bare.named_modules():
        layer: Any = module
        if not hasattr(layer, "base_layer") or ADAPTER not in getattr(layer, "r", {}):
            continue
        if any(name in besides for pair in factors(path) for name in pair):
            continue
        odd = [key for key in ("use_dora", "lora_bias") if getattr(layer, key, {}).get(ADAPTER)]
        if odd or ADAPTER in getattr(layer, "lora_variant", {}):
            raise CheckpointError(
                f"its adapter is more than a product added to the weight: {', '.join(odd) or 'a variant of peft'}",
                where=path,
                fix="use plain LoRA, or save the model with peft itself",
            )
        weight = layer.base_layer.weight
        found[path] = Adapter(
            rank=layer.r[ADAPTER],
            alpha=float(layer.lora_alpha[ADAPTER]),
            rslora=bool(layer.use_rslora[ADAPTER]),
            dropout=float(getattr(layer.lora_dropout[ADAPTER], "p", 0.0)),
            fan_in_fan_out=bool(getattr(layer, "fan_in_fan_out", False)),
            merged=bool(layer.merged),
            also=tuple(n for n in names[id(weight)] if n != f"{path}.base_layer.weight"),
        )
    return found


def _put_(model: nn.Module, paths: Iterable[str], **settings: Any) -> None:
    peft = need("peft", extra="hf")
    config = peft.LoraConfig(
        # A regular expression of exact names; a list would match by ending, and so more than was meant.
        target_modules="|".join(re.escape(path) for path in paths),
        bias="none",
        **settings,
    )
    peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)


def has_adapters(model: nn.Module) -> bool:
    """Whether the model has LoRA adapters (merged or not)."""
    return any(is_adapter(name) for name, _ in unwrap(model).named_parameters())


def is_merged(model: nn.Module) -> bool:
    """Whether the adapters are added into the base weights at this moment (peft's `merge_adapter`).

    A checkpoint must say so: the weights of a merged model under unmerged adapters would count them twice.
    """
    return any(bool(getattr(m, "merged", False)) and hasattr(m, "base_layer") for m in unwrap(model).modules())


def merged_copy(model: nn.Module) -> nn.Module:
    """A copy with the adapters added in and taken out, under the original names. `model` itself is not touched.

    Merging in place would write the frozen base, and undoing it does not give back the same bits.
    """
    if is_merged(model):
        raise RecipeError("the adapters are merged already", fix="unmerge them, or load the base and the adapters anew")
    made = copy.deepcopy(unwrap(model))
    layers = [(path, m) for path, m in made.named_modules() if hasattr(m, "base_layer") and hasattr(m, "merge")]
    if not layers:
        raise RecipeError("the model has no adapters to merge", fix="export it as it is")
    for path, layer in layers:
        layer.merge(safe_merge=True)
        parent, _, key = path.rpartition(".")
        made.get_submodule(parent)._modules[key] = layer.get_base_layer()
    if hasattr(made, "peft_config"):
        del made.peft_config
    return made
