"""Adapters on the language model: wrapped exactly once, on layers that exist. The arithmetic is peft's."""

from __future__ import annotations

import difflib
import warnings

from torch import nn

from thawline.core.extras import need
from thawline.errors import RecipeError
from thawline.models.videochat.config import LORA_TARGETS, Family, LoraConfig

_WRAPPER = "base_model.model."


def with_lora(llm: nn.Module, config: LoraConfig, *, family: Family) -> nn.Module:
    """The language model inside peft's wrapper, with new adapters (B = 0, so that nothing changes yet).

    Raises RecipeError where it is wrapped already (adapters inside adapters load from no file: they stay at zero, and
    the answers are the base model's), and where a target names no layer (Mistral's list on Phi-3 adapts three of eight
    without a word) unless `config.allow_unmatched`.
    """
    if is_wrapped(llm):
        raise RecipeError(
            "the language model carries adapters already; wrapped twice, no checkpoint would fit it",
            fix="load it without LoRA and let the configuration add it, or leave LoRA out of the configuration",
        )
    targets = config.targets or LORA_TARGETS[family]
    layers = {name.rpartition(".")[2] for name, module in llm.named_modules() if isinstance(module, nn.Linear)}
    lost = [t for t in targets if t not in layers]
    if len(lost) == len(targets) or (lost and not config.allow_unmatched):
        near = sorted({m for t in lost for m in difflib.get_close_matches(t, layers, n=2, cutoff=0.3)})
        raise RecipeError(
            f"LoRA targets {', '.join(map(repr, lost))} name no layer of this language model",
            fix=f"its linear layers: {', '.join(sorted(layers))}" + (f"; closest: {', '.join(near)}" if near else ""),
        )
    peft = need("peft", extra="hf")
    settings = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        inference_mode=False,
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=[t for t in targets if t in layers],
    )
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5 under a name that will go in version 6.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        wrapped: nn.Module = peft.get_peft_model(llm, settings)
    return wrapped


def is_wrapped(llm: nn.Module) -> bool:
    """Whether adapters are on it, by names: also where a plan put them into the layers without peft's wrapper."""
    return any(".lora_" in name or name.startswith(_WRAPPER) for name, _ in llm.named_parameters())


def unwrapped(llm: nn.Module) -> nn.Module:
    """The causal language model itself, adapters still in its layers."""
    # Not by the attribute `base_model`: transformers' models have one too, which is something else.
    if any(name.startswith(_WRAPPER) for name, _ in llm.named_parameters()):
        return llm.get_submodule("base_model.model")
    return llm


def merged(llm: nn.Module) -> nn.Module:
    """The language model with its adapters added into its weights, and no wrapper left. Changes `llm`.

    Raises RecipeError where there are no adapters, or a plan put them in (it merges them itself).
    """
    if not is_wrapped(llm):
        raise RecipeError("there are no adapters to merge", fix="export it as it is")
    if unwrapped(llm) is llm:
        raise RecipeError(
            "these adapters were put in by a plan", fix="merge them with thawline.freeze.lora.merged_copy"
        )
    plain: nn.Module = llm.merge_and_unload()  # type: ignore[operator]
    return plain
