"""What a plan would do, before anything is trained: decisions by block and phase, memory, and what will go wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thawline.ckpt.source import open_source
from thawline.core.config import Document, bind
from thawline.core.index import ModelIndex
from thawline.errors import RecipeError
from thawline.freeze import doctor
from thawline.freeze.apply import apply_
from thawline.freeze.memory import MemoryEstimate, estimate
from thawline.freeze.plan import FreezePlan
from thawline.freeze.resolve import Resolution, resolve_all
from thawline.tasks.runs import task_of
from thawline.train.law import shape_
from thawline.train.recipe import Recipe, read_recipe


@dataclass(frozen=True, slots=True)
class Preview:
    """A plan resolved: one resolution and one memory estimate a phase, and the doctor's findings."""

    phases: tuple[Resolution, ...]
    memory: tuple[MemoryEstimate, ...]
    findings: tuple[Any, ...] = ()
    lr: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "lr": self.lr,
            "phases": [
                {
                    "phase": r.phase,
                    "parameters": r.parameters,
                    "trained": r.trained_parameters,
                    "trainable_names": list(r.trainable_names),
                    "memory": m.to_dict(),
                    "resolution": r.to_dict(),
                }
                for r, m in zip(self.phases, self.memory, strict=True)
            ],
            "findings": [f.to_dict() for f in self.findings],
        }

    def text(self) -> str:
        lines: list[str] = []
        for resolution, memory in zip(self.phases, self.memory, strict=True):
            if len(self.phases) > 1:
                lines.append(f"phase {resolution.phase}")
            lines.append(resolution.table())
            lines.append(
                f"memory   weights {_mb(memory.weights_bytes)}, gradients {_mb(memory.gradients_bytes)}, "
                f"optimizer {_mb(memory.optimizer_bytes)}, together {_mb(memory.total_bytes)} and activations"
            )
        lines += [str(finding) for finding in self.findings] or ["doctor   nothing found"]
        return "\n".join(lines)


def preview(
    target: Path, overrides: Sequence[str] = (), *, train: Sequence[str] = (), preset: str | None = None
) -> Preview:
    """The plan of a recipe on its model, or one given by `train` or `preset` on a model directory or weights file.

    For a weights file only the header is read; no model is built.
    """
    if target.suffix in (".yaml", ".yml"):
        if train or preset:
            raise RecipeError("a recipe has its own plan", fix="override it: plan.train='[...]'")
        return _of_recipe(read_recipe(target, overrides))
    if not (train or preset):
        raise RecipeError(
            "a model has no plan of its own", fix="give --train SELECTOR or --preset NAME, or a recipe instead"
        )
    plan = bind(FreezePlan, Document({"train": list(train), "preset": preset}, "command line"))
    with open_source(target) as source:
        index = ModelIndex.from_header(source.infos)
    phases = resolve_all(plan.expanded(index), index)
    return Preview(phases, tuple(estimate(r) for r in phases))


def _of_recipe(recipe: Recipe) -> Preview:
    model = task_of(recipe).build(recipe)
    phases = shape_(model, recipe.plan, seed=recipe.run.seed)
    apply_(model, phases[0])
    momentum = recipe.optim.momentum if recipe.optim.name == "sgd" else 0.0
    memory = tuple(estimate(r, optimizer=recipe.optim.name, momentum=momentum) for r in phases)
    return Preview(phases, memory, tuple(doctor.before(model, phases[0])), recipe.optim.lr)


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
