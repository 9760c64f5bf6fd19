"""WeNet's LoRA files: telling merged from unmerged ones, and the plain weights that either stands for.

WeNet writes full models with `lora_A` (r, in) and `lora_B` (out, r) beside each adapted weight. A file saved in step
mode holds the weight as it was, one saved at the end of an epoch holds weight + scale * B A, and nothing in the file
says which (wenet/models/finetune/lora/layers.py keeps that in a Python attribute). Only comparing with the base can
tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from thawline.errors import CheckpointError

Kind = Literal["none", "unmerged", "merged", "factors"]
"""No LoRA at all; weights beside factors, factors not in the weights; factors already in the weights; factors alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFile:
    """What a file was found to be.

    tensors: a whole plain model, the factors' product added exactly once, without the factors
    factors: module name -> (A (r, in), B (out, r))
    """

    kind: Kind
    tensors: Mapping[str, Tensor]
    factors: Mapping[str, tuple[Tensor, Tensor]]


def factors_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name -> (A, B). Raises CheckpointError where one of a pair is missing or they do not fit."""
    modules = sorted({n.rpartition(".")[0] for n in tensors if n.endswith((".lora_A", ".lora_B"))})
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for module in modules:
        a, b = tensors.get(f"{module}.lora_A"), tensors.get(f"{module}.lora_B")
        if a is None or b is None:
            raise CheckpointError(f"half a LoRA pair: {'lora_A' if a is None else 'lora_B'} is missing", where=module)
        if a.ndim != 2 or b.ndim != 2 or a.size(0) != b.size(1):
            raise CheckpointError(f"lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not fit", where=module)
        pairs[module] = (a, b)
    return pairs


def resolve_lora(
    tensors: Mapping[str, Tensor],
    *,
    scale: float,
    base: Mapping[str, Tensor] | None = None,
    merged: bool | None = None,
) -> LoraFile:
    """The plain model that a WeNet file stands for.

    scale:  lora_alpha / lora_rank of its lora_conf
    base:   the plain model that LoRA was put on
    merged: what kind of file it is, where that is known and there is no base

    Raises CheckpointError where base is needed, or where a weight is neither the base's nor the base's with the
    factors.
    """
    factors = factors_of(tensors)
    plain = {n: t for n, t in tensors.items() if not n.endswith((".lora_A", ".lora_B"))}
    if not factors:
        return LoraFile(kind="none", tensors=plain, factors={})
    if not any(f"{module}.weight" in plain for module in factors):
        if base is None:
            raise CheckpointError("this file holds LoRA factors only", fix="give the model that they belong to (base)")
        return LoraFile(kind="factors", tensors=_with_factors({**base, **plain}, factors, scale), factors=factors)
    if merged is None:
        merged = _is_merged(plain, factors, scale, base)
    whole = plain if merged else _with_factors(plain, factors, scale)
    return LoraFile(kind="merged" if merged else "unmerged", tensors=whole, factors=factors)


def _is_merged(
    plain: Mapping[str, Tensor],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    scale: float,
    base: Mapping[str, Tensor] | None,
) -> bool:
    if base is None:
        raise CheckpointError(
            "this LoRA file may hold merged weights (end of an epoch) or unmerged ones (step mode), "
            "and nothing in it says which",
            fix="give the model it was trained from (base), or say merged=True or merged=False",
        )
    found: dict[bool, str] = {}
    for module, (a, b) in factors.items():
        name = f"{module}.weight"
        for source, holder in (("the file", plain), ("the base", base)):
            if name not in holder:
                raise CheckpointError(f"{source} has no {name}", where=module)
        weight, before = plain[name].double(), base[name].double()
        product = scale * (b.double() @ a.double())
        if not bool(product.any()):
            continue  # a fresh pair: both kinds are the same
        to_before, to_after = float((weight - before).abs().max()), float((weight - before - product).abs().max())
        close = 1e-3 * float(product.abs().max())
        if min(to_before, to_after) > close:
            raise CheckpointError(
                f"{name} is neither the base's weight (off by {to_before:.3g}) "
                f"nor that with the factors (off by {to_after:.3g})",
                where=module,
                fix="check that this is the base it was trained from, and lora_alpha / lora_rank",
            )
        found[to_after < to_before] = module
    if len(found) == 2:
        raise CheckpointError(
            f"some weights hold their factors ({found[True]}) and some do not ({found[False]})",
            fix="this file was put together from two; give the one that WeNet wrote",
        )
    return next(iter(found), False)


def _with_factors(
    plain: Mapping[str, Tensor], factors: Mapping[str, tuple[Tensor, Tensor]], scale: float
) -> dict[str, Tensor]:
    whole = dict(plain)
    for module, (a, b) in factors.items():
        name = f"{module}.weight"
        if name not in whole:
            raise CheckpointError(f"there is no {name} for these factors", where=module)
        with torch.no_grad():  # WeNet's own order of operations, so that the sum is bitwise the one it would write
            whole[name] = whole[name] + (b @ a) * scale
    return whole
