"""Upstream's `freeze_*` switches as selectors of a plan, and what of them surprises.

Plain data in and out; no torch. The selectors are what stands under `plan: train:` in a recipe. By default the evident
thing is meant; `compat="upstream"` gives upstream's maps exactly, parameter by parameter and mode by mode.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from thawline.errors import RecipeError
from thawline.models.videochat.config import VideoChatConfig

Compat = Literal["thawline", "upstream"]


DEAD_END = ("qformer.bert.encoder.layer[-1].intermediate", "qformer.bert.encoder.layer[-1].output")
"""Where the instruction's words end: the projection reads the queries only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Switches:
    """Upstream's names and defaults. freeze_lora exists in no upstream release; issue 235 added it by hand.

    freeze_mhra: of the first VideoChat, whose vision transformer has MHRA blocks; None where it is not written
    """

    freeze_vit: bool = True
    freeze_qformer: bool = True
    freeze_llm: bool = True
    freeze_lora: bool = False
    freeze_mhra: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchedPlan:
    """train: selectors of what trains, everything else is frozen; pinned: modules kept in eval mode; notes: surprises;
    may_rest: selectors of what trains without a gradient, so that the audit lets it stay.

    `pinned` follows from `train` in a FreezePlan (what is frozen runs in eval mode). It is listed because upstream's
    differs: there a frozen language model keeps following `model.train()`.
    """

    train: tuple[str, ...]
    pinned: tuple[str, ...]
    notes: tuple[str, ...]
    may_rest: tuple[str, ...] = ()


def plan_of(switches: Switches, config: VideoChatConfig, *, compat: Compat = "thawline") -> SwitchedPlan:
    """The plan that the switches mean for a model of stage 2, 3 or later.

    Raises RecipeError where nothing would train.
    """
    llm, lora = config.llm_name, config.lora is not None
    upstream = compat == "upstream"
    extra = config.qformer.extra_queries > 0
    train: list[str] = []
    pinned: list[str] = []
    notes: list[str] = []
    resting: tuple[str, ...] = ()
    if switches.freeze_vit:
        pinned += ["vision_encoder", "vision_layernorm"]
    else:
        train.append("vision_encoder")
        if config.vision.add_layernorm:
            train.append("vision_layernorm")
    if switches.freeze_qformer:
        pinned.append("qformer")
    else:
        train += ["qformer", "query_tokens"]
        if config.qformer.text_input:
            if upstream:
                resting = DEAD_END
            else:
                train += [f"!{dead}" for dead in DEAD_END]
            notes.append(
                "the text half of the Q-Former's last layer trains, as upstream has it, with a gradient of exactly 0: "
                "only weight decay moves it, and the audit lets the rest of it stay"
                if upstream
                else "the text half of the Q-Former's last layer is frozen: nothing reads it, so its gradient is "
                "exactly 0; upstream lets weight decay shrink it (compat: upstream)"
            )
    if extra:
        if not switches.freeze_qformer or upstream:
            train.append("extra_query_tokens")
        if switches.freeze_qformer:
            notes.append(
                "extra_query_tokens train although freeze_qformer is on, as upstream has it"
                if upstream
                else "extra_query_tokens are frozen with the Q-Former; upstream trains them (compat: upstream)"
            )
    train.append(config.projection_name)
    if not switches.freeze_llm:
        train.append(llm)
        if lora:
            notes.append(
                "freeze_llm is off beside LoRA: the whole language model trains, and a delta is as large as it"
            )
            if switches.freeze_lora:
                train.append(f"!{llm}.@lora")
    elif lora and not switches.freeze_lora:
        train.append(f"{llm}.@lora")
    if switches.freeze_lora:
        if not lora:
            notes.append("freeze_lora has no effect: this model has no adapters")
        elif switches.freeze_llm:
            pinned.append(llm)
    elif switches.freeze_llm and not lora and not upstream:
        pinned.append(llm)
    if upstream and switches.freeze_llm and not (lora and switches.freeze_lora):
        notes.append(
            "the frozen language model follows model.train() upstream; its dropout rates are 0 in every release"
        )
    if switches.freeze_mhra is not None:
        notes.append("freeze_mhra has no effect: VideoChat2's vision transformer has no MHRA blocks")
    return SwitchedPlan(train=tuple(train), pinned=tuple(pinned), notes=tuple(notes), may_rest=resting)


def plan_of_stage1(*, freeze_vision_encoder: bool = True, compat: Compat = "thawline") -> SwitchedPlan:
    """The plan of stage 1 (`videochat2_qformer.py`): everything but the vision transformer.

    Upstream puts the frozen vision transformer into eval mode once and lets `model.train()` take it out again.
    """
    train = (
        "vision_layernorm", "qformer", "query_tokens",
        "vision_temp_embed", "temp", "vision_proj", "text_proj", "itm_head",
    )  # fmt: skip
    if not freeze_vision_encoder:
        return SwitchedPlan(train=("vision_encoder", *train), pinned=(), notes=())
    if compat == "upstream":
        return SwitchedPlan(
            train=train, pinned=(), notes=("model.train() puts the frozen vision transformer back in training",)
        )
    return SwitchedPlan(train=train, pinned=("vision_encoder",), notes=())


def no_decay(shapes: Mapping[str, Sequence[int]], extra: Iterable[str] = ()) -> tuple[str, ...]:
    """Parameters that upstream does not decay: one-dimensional ones and biases (`utils/optimizer.py`).

    Query tokens are three-dimensional and do decay: upstream's list of exceptions (`no_weight_decay`) exists on no
    model after stage 1. Name them in `extra` to leave them out.
    """
    others = set(extra)
    return tuple(n for n, shape in shapes.items() if len(shape) == 1 or n.endswith(".bias") or n in others)


def different_lr(names: Iterable[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """Parameters that take the second rate of `different_lr`: `re.search` finds one of the patterns in the name.

    Raises RecipeError for a pattern that finds nothing.
    """
    known = list(names)
    for pattern in patterns:
        if not any(re.search(pattern, n) for n in known):
            raise RecipeError(
                f"different_lr: {pattern!r} is found in no parameter's name", fix="spell it as in the plan"
            )
    return tuple(n for n in known if any(re.search(p, n) for p in patterns))
