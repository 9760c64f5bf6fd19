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
from thawline.train.recipe import DataSettings, OptimSettings, RunSettings

Grade = Literal["EXACT", "SAME-DATA", "CONTINUES"]

_CANNOT_MATTER = (
    "run.workers",
    "run.recompute",  # the same bits
    "run.micro_batch",  # chosen before the first step; the state has it from then on
    "run.tensorboard",
    "run.time_limit",
    "run.checkpoint.keep",
    "run.checkpoint.keep_every",
    "run.checkpoint.on_error",
    "run.checkpoint.mirror",
    "run.engine",
    "run.device",  # recorded in the environment, where it decides the grade
    "data.max_bad",
    "model",  # the base is known by its fingerprint
    "data.train",  # the data are known by theirs
    "data.valid",
)
_DECIDES_WHERE_TO_GO_BACK_TO = ("run.checkpoint.every", "run.nonfinite.limit")
"""Cannot matter either, unless steps that are not finite send the run back to a checkpoint."""


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
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "cudnn tf32": torch.backends.cudnn.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn deterministic": torch.backends.cudnn.deterministic,
        "cudnn benchmark": torch.backends.cudnn.benchmark,
        "matmul precision": torch.get_float32_matmul_precision(),
        "mkldnn": torch.backends.mkldnn.enabled,
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

    A key of the recipe that is newer than the record counts as recorded at its default.

    Raises RecipeError listing every changed key that could matter and is not allowed by name.
    """
    allowed = tuple(allow)
    reasons: list[str] = []
    refused: list[tuple[str, Any, Any]] = []
    continues = False
    goes_back = now["recipe"]["run"]["nonfinite"]["then"] == "rewind"
    free = _CANNOT_MATTER + (() if goes_back else _DECIDES_WHERE_TO_GO_BACK_TO)
    for part, then in (("recipe", _with_defaults(recorded["recipe"])), ("data", recorded["data"])):
        for key, before, after in changes(then, now[part]):
            name = key if part == "recipe" else f"data.{key}.content"
            if name in free:
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
    known = recorded["environment"].keys() & now["environment"].keys()
    drift = [d for d in changes(recorded["environment"], now["environment"]) if d[0] in known]
    reasons += [f"{key}: {before!r} -> {after!r}" for key, before, after in drift]
    if continues:
        return Verdict("CONTINUES", tuple(reasons))
    return Verdict("SAME-DATA" if drift else "EXACT", tuple(reasons))


def _with_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    parts = {"data": DataSettings(train=""), "optim": OptimSettings(), "run": RunSettings()}
    return _laid_over({name: part.model_dump(mode="json") for name, part in parts.items()}, recipe)


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one, the values of `above` where both have one."""
    laid = {**below, **above}
    both = [key for key in below if isinstance(below[key], Mapping) and isinstance(above.get(key), Mapping)]
    return laid | {key: _laid_over(below[key], above[key]) for key in both}
