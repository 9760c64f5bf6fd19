"""LoRA adapters merged into their base, as one more source: each weight is computed while it is read.

The arithmetic is peft's own (peft/tuners/lora/layer.py, `get_delta_weight` and `merge`): W + (B @ A) * scaling, in fp32
for half-precision factors. Torch does it, in the same operations, so that a folder of peft's comes out as from
`merge_and_unload` and a delta of ours as from the export of its run, bit for bit. Kinds of adapter that do more than
add a product are refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from thawline.ckpt.formats.pieces import Computed, Plan, Planned
from thawline.core.adapter import Adapter, factors
from thawline.core.index import is_adapter
from thawline.errors import BaseMismatch, CheckpointError

CONFIG: Final = "adapter_config.json"
MERGED: Final = "merged adapter"
ADAPTER: Final = "adapter"

_PREFIX: Final = "base_model.model."
_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.weight)?")
_DROPPED: Final = (CONFIG, "README.md")
_ELSEWISE: Final = (
    "use_dora", "lora_bias", "target_parameters", "layer_replication", "use_bdlora", "arrow_config",
    "trainable_token_indices",
)  # fmt: skip
_REBASING: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base's own weights before the adapter is trained."""


@dataclass(frozen=True, slots=True)
class _Scale:
    """`alpha / r` of a module, as peft's patterns have it."""

    config: Mapping[str, Any]

    def of(self, path: str, rank: int, where: Path) -> float:
        stated = self._pattern("rank_pattern", path, self.config.get("r"))
        alpha = self._pattern("alpha_pattern", path, self.config.get("lora_alpha"))
        if stated != rank or not isinstance(alpha, int | float):
            raise CheckpointError(
                f"the factors of {path} have rank {rank}, {CONFIG} says r = {stated!r}, lora_alpha = {alpha!r}",
                where=str(where),
                fix="the file and its configuration are of two adapters",
            )
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def _pattern(self, key: str, path: str, default: object) -> object:
        patterns = self.config.get(key) or {}
        found = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", path)), None)
        return default if found is None else patterns[found]


def merge(adapter: Plan, base: Plan, *, path: Path, base_path: Path) -> Plan:
    """The base with an adapter added into its weights, under the base's names and in its element types.

    Raises CheckpointError for an adapter that cannot be merged by adding, BaseMismatch naming what the base lacks.
    """
    config = _config(adapter, path)
    pairs: dict[str, dict[str, Planned]] = {}
    embeddings: set[str] = set()
    plain: dict[str, Planned] = {}
    for name, tensor in adapter.tensors.items():
        own = name.removeprefix(_PREFIX)
        match = _FACTOR.fullmatch(own)
        if match is not None:
            pairs.setdefault(match["path"], {})[match["side"]] = tensor
            if match["embedding"]:
                embeddings.add(match["path"])
        elif ".lora_" in own:
            raise CheckpointError(f"{name!r} is no plain factor", where=str(path), fix="merge it with peft itself")
        else:
            plain[own.replace(".base_layer.", ".")] = tensor
    scale = _Scale(config)
    tensors = dict(base.tensors)
    # Whole tensors first: where peft saves an adapted embedding itself too, the adapter still goes on top of it.
    for name, tensor in plain.items():
        target = _name_in(base, name, path, base_path)
        if tensor.info.shape != base.tensors[target].info.shape:
            raise BaseMismatch(
                f"{target} is {tensor.info.shape} here and {base.tensors[target].info.shape} in the base {base_path}",
                where=str(path),
                fix="give the base it was trained from",
            )
        tensors[target] = tensor.renamed(target, origin=ADAPTER)
    for module, sides in pairs.items():
        target = _name_in(base, f"{module}.weight", path, base_path)
        if set(sides) != {"A", "B"}:
            raise CheckpointError(f"{module} has one factor of two", where=str(path), fix="copy the adapter again")
        embedding = module in embeddings
        flip = embedding or bool(config.get("fan_in_fan_out"))
        factor = scale.of(module, sides["A"].info.shape[0], path)
        tensors[target] = _merged(
            tensors[target], sides["A"], sides["B"], factor, flip=flip, twice=embedding, where=path
        )
    changed = {name for name in tensors if tensors[name] is not base.tensors[name]}
    for name, tensor in base.tensors.items():
        kept = tensor.info.tied_to
        if kept in changed and name not in changed:
            # What peft trains as a copy (`modules_to_save`) leaves the base's tensor to the other names.
            copied = _is_saved(kept, config)
            tensors[name] = tensor.renamed(name, tied_to=None) if copied else tensors[kept].renamed(name, tied_to=kept)
    return replace(
        base,
        format=f"{adapter.format} merged into {base.format}",
        tensors=tensors,
        files=(*base.files, *adapter.files),
        notes=(*base.notes, *adapter.notes, f"{len(pairs)} adapted layers merged, {len(plain)} tensors replaced"),
        sidecars={**base.sidecars, **{n: p for n, p in adapter.sidecars.items() if n not in _DROPPED}},
    )


def merge_recorded(plan: Plan, adapters: Mapping[str, Adapter], *, path: Path) -> Plan:
    """One of our own models with the adapters that its deltas record added into their weights, as the export of their
    run does it: layers under their own names again, and every name of a tied weight with the same values.

    Raises CheckpointError naming what does not fit together.
    """
    names = {name: _own_name(name, adapters) for name in plan.tensors}
    tensors = {own: plan.tensors[name].renamed(own) for name, own in names.items() if own}
    heads: dict[str, str] = {}  # every name of a merged weight -> the name that it was merged under
    for layer, adapter in adapters.items():
        if adapter.merged:
            continue
        pairs = [pair for pair in factors(layer) if all(name in plan.tensors for name in pair)]
        if len(pairs) != 1:
            raise CheckpointError(f"lacks factors of {layer}", where=str(path), fix="take the delta from a copy")
        first, second = (plan.tensors[name] for name in pairs[0])
        flip = pairs[0] == factors(layer)[1] or adapter.fan_in_fan_out
        target = f"{layer}.weight"
        made = _merged(tensors[target], first, second, adapter.scale, flip=flip, twice=True, where=path, live=True)
        others = [name for name in adapter.also if name in tensors]
        tensors |= {name: made.renamed(name) for name in (target, *others)}
        heads |= dict.fromkeys((target, *others), target)
    for own, tensor in tensors.items():
        tied = _own_name(tensor.info.tied_to or "", adapters)
        tied = heads.get(own, "" if tied in heads else tied)
        tensors[own] = tensor.renamed(own, tied_to=None if tied in ("", own) else tied)
    return replace(plan, tensors=tensors, notes=(*plan.notes, f"{len(adapters)} adapted layers merged"))


def _own_name(name: str, adapters: Mapping[str, Adapter]) -> str:
    """What a tensor is called without the adapters; "" for one of their factors."""
    if is_adapter(name):
        layer = name[: name.index(".lora_")] if ".lora_" in name else ""
        return "" if layer in adapters else name
    layer, wrapped, last = name.rpartition(".base_layer.")
    return f"{layer}.{last}" if wrapped and layer in adapters else name


def _config(adapter: Plan, path: Path) -> Mapping[str, Any]:
    file = adapter.sidecars.get(CONFIG)
    if file is None:
        raise CheckpointError(f"has no {CONFIG}", where=str(path), fix="give the adapter's own folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"cannot be read: {exc}", where=str(file), fix="copy the file again") from exc
    kind = config.get("peft_type")
    odd = [key for key in _ELSEWISE if config.get(key)]
    how = config.get("init_lora_weights")
    if isinstance(how, str) and how.lower().startswith(_REBASING):
        odd.append(f"init_lora_weights: {how}")
    if kind != "LORA" or odd:
        what = f"is a {kind} adapter" if kind != "LORA" else f"is a LoRA adapter with {', '.join(odd)}"
        raise CheckpointError(
            f"{what}, which is not a product added to a weight",
            where=str(path),
            fix="merge it with peft itself (merge_and_unload), then convert",
        )
    return dict(config)


def _is_saved(name: str, config: Mapping[str, Any]) -> bool:
    module = name.rpartition(".")[0]
    return any(f".{module}".endswith(f".{saved}") for saved in config.get("modules_to_save") or ())


def _name_in(base: Plan, name: str, path: Path, base_path: Path) -> str:
    """The base's name of an adapted tensor; a base saved without its head's prefix is known by the ending."""
    if name in base.tensors:
        return name
    endings = [own for own in base.tensors if name.endswith(f".{own}")]
    if len(endings) == 1:
        return endings[0]
    raise BaseMismatch(
        f"adapts {name!r}, which the base {base_path} does not have (it has {next(iter(base.tensors))!r}, ...)",
        where=str(path),
        fix="give the base it was trained from",
    )


def _merged(
    weight: Planned, a: Planned, b: Planned, scale: float, *, flip: bool, twice: bool, where: Path, live: bool = False
) -> Planned:
    """The weight with the scaled product of its factors added.

    flip:  the weight is kept transposed
    twice: round the product and then the sum, as peft does for embeddings, and for all layers where it merges safely
    live:  the factors are those of the model itself, and not widened by peft when it loaded them
    """
    rank = a.info.shape[0]
    rows, columns = b.info.shape[0], math.prod(a.info.shape[1:])
    shape = (columns, rows) if flip else (rows, *a.info.shape[1:])
    if b.info.shape[1:2] != (rank,) or math.prod(b.info.shape[2:]) != 1 or shape != weight.info.shape:
        raise BaseMismatch(
            f"factors {b.info.shape} and {a.info.shape} do not make up {weight.info.name} of {weight.info.shape}",
            where=str(where),
            fix="give the base it was trained from",
        )

    def make(chunk_bytes: int) -> Iterator[memoryview]:
        import torch

        from thawline.ckpt.tensors import tensor_of

        left, right = tensor_of(b), tensor_of(a)
        given = left.dtype
        half = given in (torch.float16, torch.bfloat16)
        if half:
            left, right = left.float(), right.float()
        made = tensor_of(weight)
        if made.dim() == 2:
            product = left @ right
            product = (product.T if flip else product) * scale
        elif made.shape[2:4] == (1, 1):
            product = (left.reshape(rows, rank) @ right.reshape(rank, columns)).reshape(made.shape) * scale
        else:
            convolve: Any = getattr(torch.nn.functional, f"conv{made.dim() - 2}d")
            product = convolve(right.transpose(0, 1), left).transpose(0, 1) * scale
        if half and live:
            product = product.to(given)
        made += product.to(made.dtype) if twice else product
        data = made.reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), chunk_bytes):
            yield data[start : start + chunk_bytes]

    return Planned(info=replace(weight.info, origin=MERGED), parts=(Computed((weight, a, b), make),))
