"""Where LoRA adapters go, as plain data: which layers a plan's `lora.target` names, and the model's index with them.

`freeze/lora.py` puts the adapters in; this module lets a plan be resolved before that, or against a file.
"""

from __future__ import annotations

from collections.abc import Sequence

from thawline.core.adapter import NAME as ADAPTER
from thawline.core.index import ModelIndex, Node, ParamInfo, is_adapter
from thawline.core.select import items_of, match
from thawline.errors import SelectorError
from thawline.freeze.plan import Counted, Lora


def has_adapters(index: ModelIndex) -> bool:
    """Whether the model holds LoRA adapters already."""
    return any(is_adapter(info.name) for info in index.params)


def lora_targets(index: ModelIndex, lora: Lora) -> tuple[str, ...]:
    """Paths of the linear layers (or an embedding or convolution named itself) that `lora.target` names.

    Raises SelectorError where the target matches nothing or holds no such layer.
    """
    chosen: dict[str, Node] = {}
    for i, selector in enumerate(lora.target):
        where = lora.where("target", i) or f"lora.target[{i}]"
        for item in items_of(_value(selector), where=where):
            found = match(item, index)
            layers = _layers(index, found.numbers, found.anchors)
            if item.minus:
                chosen = {path: node for path, node in chosen.items() if path not in layers}
            elif not layers:
                raise SelectorError(
                    f"{item.text!r} holds no linear layer to put an adapter on: {', '.join(found.anchors[:4])}",
                    where=where,
                    fix="name linear layers, e.g. decoder.**.{q,v}_proj or llm.@linear",
                )
            else:
                chosen.update(layers)
    if not chosen:
        raise SelectorError("lora.target names no layer", where=lora.where("target"), fix="take fewer away")
    return tuple(node.path for node in sorted(chosen.values(), key=lambda n: n.order))


def with_adapters(index: ModelIndex, lora: Lora) -> ModelIndex:
    """The index that the model will have once `lora` is put in: names and shapes as peft makes them."""
    targets = set(lora_targets(index, lora))
    params: list[ParamInfo] = []
    done: set[str] = set()
    for info in index.params:
        owner, _, last = info.name.rpartition(".")
        if owner not in targets:
            params.append(info)
            continue
        params.append(_renamed(info, f"{owner}.base_layer.{last}"))
        if owner not in done and last == "weight":
            done.add(owner)
            params.extend(_adapters(owner, info, lora.r))
    modules = {}
    for path, classes in index.modules.items():
        modules[path] = classes
        if path in targets:
            modules[path] = ("Linear", "LoraLayer")
            modules[f"{path}.base_layer"] = classes
            for half in ("lora_dropout", "lora_A", "lora_B"):
                modules[f"{path}.{half}"] = ("ModuleDict",)
            modules[f"{path}.lora_dropout.{ADAPTER}"] = ("Dropout",) if lora.dropout else ("Identity",)
            modules[f"{path}.lora_A.{ADAPTER}"] = modules[f"{path}.lora_B.{ADAPTER}"] = ("Linear",)
    return ModelIndex(params, index.buffers, modules, source=index.source)


def _value(selector: str | Counted) -> object:
    return selector if isinstance(selector, str) else selector.model_dump()


def _layers(index: ModelIndex, numbers: Sequence[int], anchors: Sequence[str]) -> dict[str, Node]:
    layers: dict[str, Node] = {}
    named = set(anchors)
    for number in numbers:
        info = index.tensors[number]
        owner, _, last = info.name.rpartition(".")
        node = index.place(owner)
        if node is None or last != "weight" or owner in layers or is_adapter(info.name):
            continue
        linear = index.has_kind(node, "linear")
        # A header cannot tell a bias-free linear layer from an embedding; then the name decides.
        if linear is None:
            linear = not index.has_kind(node, "embedding")
        if linear or (owner in named and len(info.shape) >= 2):
            layers[owner] = node
    return layers


def _renamed(info: ParamInfo, name: str) -> ParamInfo:
    return ParamInfo(
        name=name, shape=info.shape, dtype=info.dtype, module_class=info.module_class, tied_to=info.tied_to
    )


def _adapters(owner: str, info: ParamInfo, r: int) -> list[ParamInfo]:
    out, inner, *window = info.shape
    down: tuple[int, ...] = (r, inner, *window)
    up: tuple[int, ...] = (out, r, *(1 for _ in window))
    if info.module_class == "Embedding":
        return [
            ParamInfo(name=f"{owner}.lora_embedding_A.{ADAPTER}", shape=(r, out), dtype=info.dtype),
            ParamInfo(name=f"{owner}.lora_embedding_B.{ADAPTER}", shape=(inner, r), dtype=info.dtype),
        ]
    return [
        ParamInfo(name=f"{owner}.lora_A.{ADAPTER}.weight", shape=down, dtype=info.dtype, module_class="Linear"),
        ParamInfo(name=f"{owner}.lora_B.{ADAPTER}.weight", shape=up, dtype=info.dtype, module_class="Linear"),
    ]
