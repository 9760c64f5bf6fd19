"""Plans by name, and the spellings of other tools as plans.

Each function returns plain settings of a `FreezePlan` (what would stand under `plan:` in a recipe), so a translated
spelling can be printed and kept. Torch is never imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from thawline.core.index import ModelIndex
from thawline.core.select import layers_of, select
from thawline.errors import RecipeError, SelectorError

Settings = dict[str, Any]

_HEADS = (
    *("ctc", "proj_out", "lm_head", "score", "classifier", "classification_head"),
    *("head", "heads", "fc", "_fc", "output_layer"),
)
_STACKS = ("encoder.encoders", "encoder.layers", "encoder.layer", "encoder.blocks", "layers", "layer", "blocks", "h")

NAMES = ("head-only", "decoder-only", "encoder-only", "last-N", "bitfit", "norm-only", "llrd", "ulmfit")


def preset(name: str, index: ModelIndex, *, where: str = "") -> Settings:
    """The settings that a preset's name means for this model.

    head-only, decoder-only, encoder-only, last-N (the last N layers of the main stack and the head), bitfit (biases
    and the head; Zaken et al. 2022), norm-only (normalisation layers and the head), llrd (all, rate falling by 0.9 a
    layer from the top), ulmfit (the head, then a layer an epoch from the top with rates falling by 2.6; Howard and
    Ruder 2018, sections 3.2 and 3.3). Raises RecipeError where the name is unknown, or the model has no such part.
    """
    word = name.strip().lower().replace("_", "-")
    last = re.fullmatch(r"last-(\d+)", word)
    if last is not None and int(last[1]) > 0:
        return {"train": [f"{main_stack(index, where)}[-{int(last[1])}:]", *heads(index, where)]}
    makers: dict[str, Callable[[], Settings]] = {
        "head-only": lambda: {"train": heads(index, where)},
        "decoder-only": lambda: {"train": [_part(index, "decoder", where)]},
        "encoder-only": lambda: {"train": [_part(index, "encoder", where)]},
        "bitfit": lambda: {"train": ["@bias", *_heads_if_any(index)]},
        "norm-only": lambda: {"train": ["@norm", *_heads_if_any(index)]},
        "llrd": lambda: {"train": ["**"], "lr": _layer_decay(index, 0.9, where), "no_decay": _no_decay(index)},
        "ulmfit": lambda: _ulmfit(index, where),
    }
    if word not in makers:
        raise RecipeError(f"there is no preset {name!r}", where=where, fix=f"presets: {', '.join(NAMES)}")
    return makers[word]()


def heads(index: ModelIndex, where: str = "") -> list[str]:
    """The output layers, by the names that such layers usually have. Raises SelectorError where there is none."""
    found = _heads_if_any(index)
    if not found:
        top = ", ".join(list(index.tree.root.children)[:8])
        raise SelectorError(
            "no output layer is known by its name in this model",
            where=where,
            fix=f"name it yourself under train; the model's parts: {top}",
        )
    return found


def main_stack(index: ModelIndex, where: str = "") -> str:
    """The layer list that most of the depth lies in: an encoder's where there is one, else the longest."""
    stacks = {n.path: n.layers() for n in index.tree.nodes if n.layers() > 1}
    if not stacks:
        raise SelectorError("this model has no layer list", where=where, fix="name the layers under train")

    def rank(path: str) -> tuple[bool, int, int, int]:
        ranks = [i for i, end in enumerate(_STACKS) if path == end or path.endswith("." + end)]
        inside = sum(path.startswith(other + ".") for other in stacks)
        return "encoder" not in path, inside, ranks[0] if ranks else len(_STACKS), -stacks[path]

    return min(stacks, key=rank)


def from_wenet(*, freeze_modules: str | Sequence[str] = (), optim_conf: Mapping[str, Any] | None = None) -> Settings:
    """WeNet's `--freeze_modules a,b` (names begin with one of them) and `optim_conf.modules` with a list as `lr`.

    In WeNet the last of `optim_conf.lr` belongs to every parameter outside `modules`; the same is meant here, as
    multipliers of that last rate. A prefix there is bare text; here it ends at a dot, so `encoder.encoders.1` does
    not take 10 and 11 with it.
    """
    settings: Settings = {"train": ["**"]}
    frozen = _words(freeze_modules)
    settings["train"] += [f"!{name}" for name in frozen]
    modules = list((optim_conf or {}).get("modules", ()))
    rates = (optim_conf or {}).get("lr")
    if modules:
        if not isinstance(rates, Sequence) or isinstance(rates, str) or len(rates) != len(modules) + 1:
            raise RecipeError(
                f"optim_conf.modules names {len(modules)} modules, so lr must list one rate more, got {rates!r}",
                fix="the last rate is for all other parameters",
            )
        if not rates[-1]:
            raise RecipeError("the last rate of optim_conf.lr is 0", fix="freeze the rest in the plan instead")
        settings["lr"] = {name: float(rate) / float(rates[-1]) for name, rate in zip(modules, rates, strict=False)}
    return settings


def from_ask_anything(config: Mapping[str, Any]) -> Settings:
    """Ask-Anything's (VideoChat2's) `freeze_vit`, `freeze_qformer`, `freeze_mhra`, `freeze_llm`, `freeze_lora`.

    As its code does (`models/videochat2/videochat2_*.py`): `extra_query_tokens` and the projection always train; the
    language model is frozen unless `freeze_llm: false` is written; `freeze_mhra: false` opens the local MHRA blocks
    of a frozen vision encoder.
    """
    known = {"freeze_vit", "freeze_qformer", "freeze_mhra", "freeze_llm", "freeze_lora", "use_lora"}
    odd = sorted(k for k in config if k.startswith("freeze_") and k not in known)
    if odd:
        raise RecipeError(f"unknown switch {odd[0]!r}", fix=f"known: {', '.join(sorted(known))}")
    rules = ["**"]
    if config.get("freeze_vit", True):
        rules += ["!vision_encoder", "!vision_layernorm"]
        if not config.get("freeze_mhra", True):
            rules.append("re:vision_encoder\\..*(lmhra|mhra|local_temporal).*")
    if config.get("freeze_qformer", True):
        rules += ["!qformer", "!query_tokens"]
    adapters = bool(config.get("use_lora", False)) and not config.get("freeze_lora", False)
    if config.get("freeze_llm", True):
        rules.append("!{llama_model,mistral_model,phi_model}")
        if adapters:
            rules.append("@lora")
    return {"train": rules}


def narrowed(settings: Mapping[str, Any], index: ModelIndex) -> Settings:
    """The settings without the rules of a foreign spelling that name parts this model does not have.

    Other tools name every part that any of their models may have. What is left must still name something.
    """
    kept = []
    for rule in settings.get("train", ()):
        for text in _spread(rule):
            try:
                select(text.removeprefix("!"), index)
            except SelectorError:
                continue
            kept.append(text)
    return {**settings, "train": kept}


def from_ms_swift(config: Mapping[str, Any], *, towers: Mapping[str, Sequence[str]]) -> Settings:
    """ms-swift's and LLaMA-Factory's switches as a plan.

    towers: which modules are `vit`, `aligner` and `llm` in this architecture, e.g. {"vit": ["model.visual"], ...}
    Understood: freeze_vit (also freeze_vision_tower), freeze_aligner (freeze_multi_modal_projector), freeze_llm
    (freeze_language_model, train_mm_proj_only), freeze_parameters, trainable_parameters, *_regex, vit_lr, aligner_lr
    with learning_rate, freeze_trainable_layers (with `layers`, the list it counts in).
    """
    rules: list[str] = ["**"]
    switches = {
        "vit": ("freeze_vit", "freeze_vision_tower"),
        "aligner": ("freeze_aligner", "freeze_multi_modal_projector"),
        "llm": ("freeze_llm", "freeze_language_model", "train_mm_proj_only"),
    }
    for tower, keys in switches.items():
        if any(config.get(k, False) for k in keys):
            if tower not in towers:
                raise RecipeError(f"{keys[0]} is set, but no module is known as {tower!r}", fix="name it in towers")
            rules += [f"!{path}" for path in towers[tower]]
    if config.get("train_mm_proj_only") and "vit" in towers:
        rules += [f"!{path}" for path in towers["vit"]]
    rules += [f"!{name}" for name in _words(config.get("freeze_parameters", ()))]
    if (pattern := config.get("freeze_parameters_regex")) is not None:
        rules.append(f"!re:{_anywhere(pattern)}")
    if (count := config.get("freeze_trainable_layers")) is not None:
        stack = str(config.get("layers", ""))
        if not stack:
            raise RecipeError(
                "freeze_trainable_layers needs `layers`, the list it counts in", fix="layers: model.layers"
            )
        piece = f"-{count}:" if int(count) > 0 else f":{-int(count)}"
        rules = [f"{stack}[{piece}]"]
    rules += _words(config.get("trainable_parameters", ()))
    if (pattern := config.get("trainable_parameters_regex")) is not None:
        rules.append(f"re:{_anywhere(pattern)}")
    settings: Settings = {"train": rules}
    base = config.get("learning_rate")
    rates = {
        path: float(config[key]) / float(base)
        for tower, key in (("vit", "vit_lr"), ("aligner", "aligner_lr"))
        if config.get(key) and base
        for path in towers.get(tower, ())
    }
    if rates:
        settings["lr"] = rates
    return settings


def _anywhere(pattern: str) -> str:
    # Those tools search; a selector's regular expression fits the whole name.
    return f".*(?:{pattern}).*"


def _spread(rule: str) -> list[str]:
    found = re.fullmatch(r"(!?)\{([^{}]*)\}", rule)
    return [f"{found[1]}{word}" for word in found[2].split(",")] if found else [rule]


def _words(value: str | Sequence[str]) -> list[str]:
    words = value.split(",") if isinstance(value, str) else list(value)
    return [word.strip().removesuffix(".") for word in words if word.strip()]


def _heads_if_any(index: ModelIndex) -> list[str]:
    root = index.tree.root
    inner = [root, *(c for k, c in root.children.items() if k in ("model", "decoder", "base_model", "module"))]
    found = [c for node in inner for key, c in node.children.items() if key in _HEADS and c.holds_tensors]
    # A head that is tied to the embedding is one tensor with it, and trains under both names.
    tied = [index.tensors[i].tied_to for node in found for i in index.tree.numbers(node)]
    return [node.path for node in found] + [name for name in dict.fromkeys(tied) if name is not None]


def _part(index: ModelIndex, word: str, where: str) -> str:
    for path in (word, f"model.{word}"):
        place = index.place(path)
        if place is not None and place.holds_tensors:
            return path
    top = ", ".join(list(index.tree.root.children)[:8])
    raise SelectorError(f"this model has no {word}", where=where, fix=f"its parts: {top}")


def _no_decay(index: ModelIndex) -> list[str]:
    return [f"@{kind}" for kind in ("bias", "norm") if index.of_kind(kind)[0]]


def _layer_decay(index: ModelIndex, decay: float, where: str) -> dict[str, Any]:
    stack = main_stack(index, where)
    parent = stack.rpartition(".")[0]
    below = []
    place = index.place(parent)
    for key, child in place.children.items() if place is not None else ():
        if child.path == stack:
            break
        if child.holds_tensors and key not in _HEADS:
            below.append(child.path)
    return {"decay": decay, "over": stack, "below": below}


def _ulmfit(index: ModelIndex, where: str) -> Settings:
    stack = main_stack(index, where)
    depth = len(layers_of(stack, index, where=where))
    return {
        "train": heads(index, where),
        "lr": {"decay": 1 / 2.6, "over": stack, "start": 1},
        "thaw": [
            {"over": stack, "from": "top", "every": "1 epoch"},
            {"after": f"{depth + 1} epochs", "train": ["**"]},
        ],
    }
