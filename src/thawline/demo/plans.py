"""The demo's recipes: one teaches the base voices from random weights, four fine-tune the result for the new ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thawline.ckpt.store import atomic_file
from thawline.core.config import dump_yaml
from thawline.demo.recogniser import BLOCKS

BATCH = 8
CHECKPOINT_EVERY = 15  # steps; not a divisor of an epoch, so that a kill falls between two of them in mid-epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to fine-tune.

    name:  of its recipe and its run
    title: as the table says it
    plan:  the recipe's plan
    """

    name: str
    title: str
    plan: Mapping[str, Any]


_TOP = [f"encoder.encoders[{BLOCKS - 1}:]", "encoder.after_norm", "decoder", "ctc"]

EVERYTHING = Variant(name="everything", title="everything trains", plan={"train": ["**"]})
TRACKING = Variant(
    name="tracking", title="lower part frozen, norms: tracking", plan={"train": _TOP, "norms": "tracking"}
)
PINNED = Variant(name="pinned", title="lower part frozen, norms: pinned", plan={"train": _TOP, "norms": "pinned"})
OUTPUT = Variant(name="output", title="only the output layer trains", plan={"train": ["ctc"], "norms": "pinned"})
VARIANTS = (EVERYTHING, TRACKING, PINNED, OUTPUT)


def write_base_recipe(path: Path, *, model: Path, train: Path) -> None:
    """The recipe of the base: `init: random` draws the weights, everything trains. The files are absolute paths."""
    _write(
        path,
        {
            "task": "speech",
            "model": str(model),
            "init": "random",
            "data": {"train": str(train), "batch": {"size": BATCH}},
            "plan": {"train": ["**"]},
            "optim": _optim(2e-3, warmup=30),
            "run": {**_run(epochs=4), "checkpoint": {"every": "1 epochs", "keep": 1}},
        },
    )


def write_recipe(path: Path, variant: Variant, *, model: Path, train: Path, epochs: int) -> None:
    """The recipe that fine-tunes `model` on the list `train` under the variant's plan."""
    _write(
        path,
        {
            "task": "speech",
            "model": str(model),
            "data": {"train": str(train), "batch": {"size": BATCH}},
            "plan": dict(variant.plan),
            "optim": _optim(2e-3, warmup=5),
            "run": {**_run(epochs=epochs), "checkpoint": {"every": f"{CHECKPOINT_EVERY} steps", "keep": 2}},
        },
    )


def _optim(lr: float, *, warmup: int) -> dict[str, Any]:
    schedule = {"name": "cosine", "warmup": f"{warmup} steps"}
    return {"name": "adamw", "lr": lr, "weight_decay": 0.01, "clip": 5.0, "schedule": schedule}


def _run(*, epochs: int) -> dict[str, Any]:
    # Reading costs less here than starting processes for it.
    return {"epochs": epochs, "seed": 7, "workers": 0, "device": "cpu"}


def _write(path: Path, recipe: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, force=True) as file:
        file.write(dump_yaml(recipe).encode())
