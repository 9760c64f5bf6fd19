"""The plan law proved from the files of a run: nothing is taken from what the run said of itself while it trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from thawline.ckpt.delta import BaseRef, check_base
from thawline.ckpt.load import checkpoints, read_checkpoint
from thawline.ckpt.source import Source, open_source
from thawline.errors import CheckpointError, RecipeError
from thawline.freeze.audit import AuditReport, Snapshot, audit
from thawline.tasks.runs import task_of
from thawline.train.law import shape_
from thawline.train.recipe import read_recipe
from thawline.train.rundir import RunDirectory
from thawline.train.state import RunState


def audit_run(directory: Path, *, base: Path | None = None) -> AuditReport:
    """Hold the newest checkpoint and the exported model of a run against its base and its plan, bit for bit.

    The base is read again and must be the one the run recorded (BaseMismatch otherwise). Every tensor that no phase
    entered so far names must have the base's digest, in the checkpoint and in the exported model.
    """
    files = RunDirectory(directory.absolute())
    if not files.begun:
        raise RecipeError(f"{str(directory)!r} is not a run directory", fix="it would hold recipe.yaml and base.json")
    recipe = read_recipe(files.recipe, {} if base is None else {"model": str(base.absolute())})
    found = checkpoints(files.checkpoints)
    if not found:
        raise CheckpointError("no checkpoint to audit", where=str(files.checkpoints), fix="let the run write one")
    recorded = BaseRef.read(files.base)
    model = task_of(recipe).build(recipe)
    check_base(recorded, BaseRef.of(model), source=str(files.path))
    phases = shape_(model, recipe.plan, seed=recipe.run.seed)
    checkpoint = read_checkpoint(found[0][1])
    entered = phases[: RunState.from_json(checkpoint.state["run"]).phase + 1]
    before = BaseRef.of(model)
    after = {**before.digests, **checkpoint.difference.digests}
    buffers = {d.name for d in phases[0].decisions if d.is_buffer}
    first_names = {d.name for d in phases[0].decisions}
    report = audit(_snapshot(before.digests, buffers, first_names), _snapshot(after, buffers, first_names), entered)
    if files.finished and recipe.plan.lora is None:
        with open_source(files.model) as exported:
            made = _exported(exported, before.digests, after)
        report = report.merged(
            audit(
                _snapshot(before.digests, buffers, first_names),
                _snapshot(made, buffers, first_names),
                entered,
                stepped=False,
            )
        )
    return report


def _snapshot(digests: Mapping[str, str], buffers: set[str], first_names: set[str]) -> Snapshot:
    kept = {n: d for n, d in digests.items() if n in first_names}
    return Snapshot(
        {n: d for n, d in kept.items() if n not in buffers}, {n: d for n, d in kept.items() if n in buffers}
    )


def _exported(exported: Source, before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, str]:
    """Digests of the exported model; a name the format leaves out (tied, or derived) counts as in the checkpoint."""
    made = dict(after)
    for name in exported.names:
        if name in before or name in after:
            made[name] = exported.digest(name)
    return made
