"""LoRA adapters through peft: put in by the plan, merged on a copy only.

`inject_` keeps the model's class and names: an adapted layer `x.q_proj` becomes peft's wrapper with
`x.q_proj.base_layer.weight` inside, which selectors still know as `x.q_proj.weight`.
"""

from __future__ import annotations

import copy
import re

from torch import nn

from thawline.core.extras import need
from thawline.core.index import is_adapter
from thawline.errors import RecipeError
from thawline.freeze.adapters import ADAPTER, lora_targets
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
    peft = need("peft", extra="hf")
    targets = lora_targets(index_of(model), lora)
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        # A regular expression of exact names; a list would match by ending, and so more than was meant.
        target_modules="|".join(re.escape(path) for path in targets),
        bias="none",
    )
    peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    return targets


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
