"""A run's model as it was at one of its checkpoints: the base as the run's task builds it, shaped by its plan, with the
checkpoint's tensors over it, every one accounted for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from thawline.ckpt.delta import BaseRef, Delta, check_base, lay_over
from thawline.ckpt.load import Checkpoint, load_strict_
from thawline.core.digest import fingerprint
from thawline.errors import CheckpointError
from thawline.freeze.lora import reinject_
from thawline.tasks.runs import task_of
from thawline.train.law import shape_
from thawline.train.recipe import read_recipe
from thawline.train.task import Task


def restored(run: Path, base: Path, checkpoint: Checkpoint, *, averaged: bool = False) -> tuple[Task, nn.Module]:
    """The task, which knows how to export it, and the model in eval mode.

    run:      whose recipe says how the base was changed (units, adapters, GroupNorm)
    averaged: with the averages (EMA) that the checkpoint keeps in place of the weights
    Raises BaseMismatch for another base, CheckpointError where no averages are kept.
    """
    recipe = read_recipe(run / "recipe.yaml", {"model": str(base)})
    if averaged and not checkpoint.ema:
        raise CheckpointError(
            "keeps no averaged weights: the run has no run.ema",
            where=str(checkpoint.path),
            fix="take the weights themselves, or train with run.ema",
        )
    task = task_of(recipe)
    model = task.build(recipe)
    before = BaseRef.of(model, path=str(base))
    check_base(checkpoint.base, before, source=str(checkpoint.path))
    shape_(model, recipe.plan, seed=recipe.run.seed)
    restore_(model, checkpoint.difference, before, source=str(checkpoint.path))
    if averaged:
        own = model.state_dict()
        averages = {name: value.to(own[name].dtype) for name, value in checkpoint.ema.items()}
        load_strict_(model, {**own, **averages}, source=str(checkpoint.path))
    return task, model.eval()


def restore_(model: nn.Module, delta: Delta, before: BaseRef, *, source: str) -> None:
    """Lay a delta over the base that it was made from; what the plan made anew and never trained stays as drawn.

    Adapters that the delta records are put in where the model has none. What the run made of the base before it began
    (`delta.base.made`) may be another in the model, where the delta does without it.
    Raises BaseMismatch for another base, CheckpointError where the model has not the structure that the run gave it.
    """
    made = {name: delta.base.digests[name] for name in set(delta.base.made) - delta.from_base}
    digests = {**before.digests, **made}
    check_base(delta.base, replace(before, fingerprint=fingerprint(digests), digests=digests), source=source)
    reinject_(model, delta.adapters, source=source)
    _refuse_other_structure(model, delta, source)
    drawn = frozenset(name for name in model.state_dict() if name not in before.digests)
    load_strict_(model, lay_over(model.state_dict(), delta, as_shaped=drawn, source=source), source=source)


def _refuse_other_structure(model: nn.Module, delta: Delta, source: str) -> None:
    own = model.state_dict()
    fix = "give the run's folder or its checkpoint there; thawline convert makes a plain file of delta and base"
    resized = [n for n, t in delta.tensors.items() if n in own and own[n].shape != t.shape]
    if resized:
        name = resized[0]
        raise CheckpointError(
            f"{len(resized)} tensors have other shapes than in the base, first {name} "
            f"{tuple(delta.tensors[name].shape)} for {tuple(own[name].shape)}: the run gave the model other outputs, "
            "and what they mean (its units or classes) is not in a delta",
            where=source,
            fix=fix,
        )
    gone = [name for name in delta.removed if name in own]
    if gone:
        raise CheckpointError(
            f"{len(gone)} tensors of the base are no more, first {gone[0]}: the run replaced their layers, and by what "
            "is not in a delta",
            where=source,
            fix=fix,
        )
