"""How tensors of a VideoChat2 model are called: by the model here, by upstream's files, and before LoRA.

peft puts `base_model.model.` in front of the language model's own names, and since 0.5 calls an adapted layer's own
weight `base_layer.weight`; files written with 0.4 lack that segment. Everything is compared under the name that a
tensor has without LoRA. Plain strings in and out; torch is never imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

_LLM = re.compile(r"^(mistral_model|llama_model|phi_model)\.")
_WRAPPED = "base_model.model."
_LORA = re.compile(r"\.lora_[AB]\.")
_ROTARY = re.compile(r"(^|\.)rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$")
_HEADS = re.compile(r"^(vision_temp_embed$|temp$|vision_proj\.|text_proj\.|itm_head\.|qformer\.cls\.)")
_TEXT_BRANCH = re.compile(
    r"^qformer\.bert\.(embeddings\.(word|position)_embeddings\.|encoder\.layer\.\d+\.(intermediate|output)\.)"
)
_PROJECTION = re.compile(r"^(mistral|llama|phi)_proj\.")

Part = Literal[
    "vision_encoder", "vision_layernorm", "qformer", "text_branch", "queries", "extra_queries", "projection", "llm",
    "lora", "stage1_heads", "derived", "other",
]  # fmt: skip


def canonical(name: str) -> str:
    """The name without what LoRA adds to it.

    >>> canonical("mistral_model.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")
    'mistral_model.model.layers.0.self_attn.q_proj.weight'
    """
    found = _LLM.match(name)
    if found is None:
        return name
    rest = name[found.end() :].removeprefix(_WRAPPED)
    return found[0] + rest.replace(".base_layer.", ".")


def as_upstream(name: str, *, wrap: bool = False) -> str:
    """The name in files written with upstream's peft 0.4: wrapped, but without `base_layer`.

    wrap: put the wrapper into names of the language model, for a model whose adapters have none

    >>> as_upstream("mistral_model.base_model.model.lm_head.base_layer.weight")
    'mistral_model.base_model.model.lm_head.weight'
    """
    found = _LLM.match(name)
    if found is None:
        return name
    rest = name[found.end() :].replace(".base_layer.", ".")
    return found[0] + (_WRAPPED if wrap else "") + rest


def wrappings(names: Iterable[str]) -> int:
    """How many times peft has wrapped the language model that these names belong to."""
    deepest = 0
    for name in names:
        found = _LLM.match(name)
        if found is None:
            continue
        rest, depth = name[found.end() :], 0
        while rest.startswith(_WRAPPED):
            rest, depth = rest[len(_WRAPPED) :], depth + 1
        deepest = max(deepest, depth)
    return deepest


def part_of(name: str) -> Part:
    """Which part of the model a tensor belongs to.

    >>> part_of("qformer.bert.encoder.layer.3.output.dense.weight"), part_of("llama_proj.bias")
    ('text_branch', 'projection')
    """
    if _ROTARY.search(name) or name == "qformer.bert.embeddings.position_ids":
        return "derived"
    if _HEADS.match(name):
        return "stage1_heads"
    if _LLM.match(name):
        return "lora" if _LORA.search(name) else "llm"
    if _TEXT_BRANCH.match(name):
        return "text_branch"
    if _PROJECTION.match(name):
        return "projection"
    if name == "query_tokens":
        return "queries"
    if name == "extra_query_tokens":
        return "extra_queries"
    if name.startswith("vision_encoder."):
        return "vision_encoder"
    if name.startswith("vision_layernorm."):
        return "vision_layernorm"
    return "qformer" if name.startswith("qformer.") else "other"


def is_rotary(name: str) -> bool:
    """Whether the tensor is a table of rotary frequencies, which every version of transformers computes anew."""
    return bool(_ROTARY.search(name))
