"""Whether a run may go on here, and how exactly: what was recorded against what is.

Decides only; `loop` acts on it. The grades: EXACT (the same bits as if never stopped), SAME-DATA (the same samples and
masks in every step, other rounding), CONTINUES (nothing lost or repeated, but something of the recipe is different).
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import torch

from thawline.errors import RecipeError

Grade = Literal["EXACT", "SAME-DATA", "CONTINUES"]

_CANNOT_MATTER = (
    "run.workers",
    "run.tensorboard",
    "run.time_limit",
    "run.checkpoint.every",
    "run.checkpoint.keep",
    "run.engine",
    "run.nonfinite_limit",
    "data.max_bad",
    "run.device",  # recorded in the environment, where it decides the grade
    "model",  # the base is known by its fingerprint
    "data.train",  # the data are known by theirs
    "data.valid",
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How exactly a run goes on, and why not better."""

    grade: Grade
    reasons: tuple[str, ...]


def environment(device: torch.device) -> dict[str, Any]:
    """What decides the rounding of a run besides its recipe: versions, device, threads, kernel flags."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Every leaf that differs, as (dotted key, recorded value, value now)."""
    found: list[tuple[str, Any, Any]] = []
    for key in [*before, *(k for k in now if k not in before)]:
        a, b, dotted = before.get(key), now.get(key), f"{prefix}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping) and dotted not in ("data.conf", "plan"):
            found += changes(a, b, f"{dotted}.")
        elif a != b:
            found.append((dotted, a, b))
    return found


def judge(
    recorded: Mapping[str, Any], now: Mapping[str, Any], *, allow: Iterable[str] = (), where: str = ""
) -> Verdict:
    """Compare {"recipe", "data", "environment"} as recorded with those of now.

    Raises RecipeError listing every changed key that could matter and is not allowed by name.
    """
    allowed = tuple(allow)
    reasons: list[str] = []
    refused: list[tuple[str, Any, Any]] = []
    continues = False
    for part in ("recipe", "data"):
        for key, before, after in changes(recorded[part], now[part]):
            name = key if part == "recipe" else f"data.{key}.content"
            if name in _CANNOT_MATTER:
                continue
            if any(name == a or name.startswith(f"{a}.") for a in allowed):
                continues = True
                reasons.append(f"{name}: {before!r} -> {after!r} (allowed)")
            else:
                refused.append((name, before, after))
    if refused:
        listed = "\n".join(f"    {name}: {before!r} -> {after!r}" for name, before, after in refused)
        raise RecipeError(
            f"the run was begun with other settings:\n{listed}",
            where=where,
            fix="put them back, start a new run with --run, or go on all the same with "
            + " ".join(f"--allow {name}" for name, _, _ in refused),
        )
    drift = changes(recorded["environment"], now["environment"])
    reasons += [f"{key}: {before!r} -> {after!r}" for key, before, after in drift]
    if continues:
        return Verdict("CONTINUES", tuple(reasons))
    return Verdict("SAME-DATA" if drift else "EXACT", tuple(reasons))
