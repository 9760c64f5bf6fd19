"""What a plan would do, before anything is trained: decisions by block and phase, memory, and what will go wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thawline.ckpt.source import open_source
from thawline.core.config import Document, bind, dump_yaml, override
from thawline.core.index import ModelIndex
from thawline.core.rng import derive
from thawline.data.loader import BatchRequest, Loader
from thawline.data.sampler import BatchPlan, Cursor
from thawline.errors import DataError, RecipeError
from thawline.freeze import doctor, presets
from thawline.freeze.apply import apply_
from thawline.freeze.memory import MemoryEstimate, estimate
from thawline.freeze.plan import FreezePlan
from thawline.freeze.resolve import Resolution, resolve_all
from thawline.models.recompute import recompute_
from thawline.tasks.loading import locate
from thawline.tasks.runs import open_recipe
from thawline.train.law import shape_
from thawline.train.recipe import Recipe
from thawline.train.rundir import RunDirectory
from thawline.train.seeding import seed_all
from thawline.train.task import Task


@dataclass(frozen=True, slots=True)
class Preview:
    """A plan resolved: one resolution and one memory estimate a phase, the doctor's findings, and the task's notes."""

    phases: tuple[Resolution, ...]
    memory: tuple[MemoryEstimate, ...]
    findings: tuple[Any, ...] = ()
    lr: float | None = None
    notes: tuple[str, ...] = ()
    activations: int | None = None
    """Bytes that autograd keeps for one micro-batch, measured in the first phase; None where no data is given."""

    def to_json(self) -> dict[str, Any]:
        return {
            "lr": self.lr,
            "activations_bytes": self.activations,
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
            "notes": list(self.notes),
        }

    def text(self) -> str:
        lines: list[str] = []
        for resolution, memory in zip(self.phases, self.memory, strict=True):
            if len(self.phases) > 1:
                lines.append(f"phase {resolution.phase}")
            lines.append(resolution.table())
            lines.append(
                f"memory   weights {_mb(memory.weights_bytes)}, gradients {_mb(memory.gradients_bytes)}, "
                f"optimizer {_mb(memory.optimizer_bytes)}, "
                + (f"averages {_mb(memory.averages_bytes)}, " if memory.averages_bytes else "")
                + f"together {_mb(memory.total_bytes)}, without activations; "
                f"a save copies {_mb(memory.saving_bytes)} on the host"
            )
        if self.activations is not None:
            lines.append(f"         activations of one micro-batch {_mb(self.activations)} (measured, first phase)")
        lines += [f"note     {note}" for note in self.notes]
        lines += [str(finding) for finding in self.findings] or ["doctor   nothing found"]
        return "\n".join(lines)


def preview(
    target: Path,
    overrides: Sequence[str] = (),
    *,
    train: Sequence[str] = (),
    preset: str | None = None,
    like: str | None = None,
) -> Preview:
    """The plan of a recipe on its model, or one given by `train`, `preset` or another tool's switches on a model.

    like: wenet, ask-anything or ms-swift; `overrides` are then its switches, e.g. `freeze_modules=encoder`
    For a model directory or a weights file only the header is read; no model is built.
    """
    if target.suffix in (".yaml", ".yml"):
        if train or preset or like:
            raise RecipeError("a recipe has its own plan", fix="override it: plan.train='[...]'")
        return _of_recipe(*open_recipe(target, overrides))
    run = RunDirectory(target)
    if run.begun:
        raise RecipeError("this is a run", where=str(target), fix=f"its plan: `thawline plan {run.recipe}`")
    locate(target)  # that there is something
    if not (train or preset or like):
        raise RecipeError(
            "a model has no plan of its own",
            where=str(target),
            fix="give --train SELECTOR, --preset NAME or --like TOOL, or a recipe instead",
        )
    with open_source(target) as source:
        index = ModelIndex.from_header(source.infos)
    settings: dict[str, Any] = {"train": list(train), "preset": preset}
    notes: tuple[str, ...] = ()
    if like is not None:
        settings = translated(like, overrides, index)
        notes = (dump_yaml({"plan": settings}).rstrip(),)
    plan = bind(FreezePlan, Document(settings, "command line"))
    phases = resolve_all(plan.expanded(index), index)
    return Preview(phases, tuple(estimate(r) for r in phases), notes=notes)


def translated(tool: str, switches: Sequence[str], index: ModelIndex) -> dict[str, Any]:
    """Another tool's switches as what would stand under `plan:`. For ms-swift `towers={vit: [...], llm: [...]}` says
    which modules its words mean in this architecture."""
    given: dict[str, Any] = override(Document({}, "command line"), switches).data
    if tool == "wenet":
        unknown = sorted(set(given) - {"freeze_modules", "optim_conf"})
        if unknown:
            raise RecipeError(f"WeNet has no switch {unknown[0]!r} for this", fix="freeze_modules, optim_conf")
        return presets.from_wenet(**given)
    if tool == "ask-anything":
        return presets.narrowed(presets.from_ask_anything(given), index)
    towers = given.pop("towers", {})
    return presets.from_ms_swift(given, towers=towers)


def _of_recipe(recipe: Recipe, task: Task) -> Preview:
    model = task.build(recipe)
    phases = shape_(model, recipe.plan, seed=recipe.run.seed)
    apply_(model, phases[0])
    if recipe.run.recompute:
        recompute_(model)
    momentum = recipe.optim.momentum if recipe.optim.name == "sgd" else 0.0
    ema = recipe.run.ema is not None
    memory = tuple(
        estimate(r, optimizer=recipe.optim.name, momentum=momentum, ema=ema, earlier=phases[:n])
        for n, r in enumerate(phases)
    )
    findings = doctor.before(model, phases[0])
    activations, seen = _first_batch(recipe, task, model, phases[0])
    notes = tuple(getattr(task, "notes", ()))  # some are known only once the samples have been opened
    return Preview(phases, memory, (*findings, *seen), recipe.optim.lr, notes, activations)


def _first_batch(
    recipe: Recipe, task: Task, model: nn.Module, resolution: Resolution
) -> tuple[int, list[doctor.Finding]]:
    """Run the first micro-batch forward and backward: what autograd keeps, and what the doctor sees. Nothing is
    updated, and buffers are put back."""
    samples = task.samples(recipe, model, "train")
    plan = BatchPlan(len(samples), seed=recipe.run.seed, batching=recipe.data.batch, length=samples.length)
    cursor, ids = next(iter(plan.batches(Cursor())))
    with Loader(samples, seed=recipe.run.seed) as loader:
        loaded = next(iter(loader.iterate([BatchRequest(epoch=0, cursor=cursor, ids=ids)])))
    if loaded.batch is None:
        raise DataError(f"no sample of the first batch can be read: {loaded.bad[0].reason}", where=loaded.bad[0].key)
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    seed_all(derive(recipe.run.seed, "plan"))
    with doctor.watch(model, resolution) as seen:
        with doctor.SavedActivations(model) as saved:
            sums = task.loss(model, loaded.batch)
            objective = torch.stack([term.sum for term in sums.terms.values()]).sum()
        objective.backward()  # type: ignore[no-untyped-call]
    findings = doctor.after_first_step(model, resolution, seen)
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])
    return saved.bytes, findings


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
