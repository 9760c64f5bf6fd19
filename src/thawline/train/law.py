"""The plan law while a run goes on: which tensors may differ from the base, and the proof that no other does.

Puts freeze (what may change) and ckpt (what did change) together; the two rooms do not know each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from thawline.ckpt.delta import BaseRef, Delta, check_base, delta_of, lay_over
from thawline.ckpt.formats.thawline_run import made_over
from thawline.ckpt.load import Checkpoint, load_strict_
from thawline.ckpt.source import made_by_builder
from thawline.core.rng import derive
from thawline.freeze.apply import apply_
from thawline.freeze.audit import AuditReport, Snapshot, audit, snapshot
from thawline.freeze.inspect import index_of
from thawline.freeze.lora import adapters_of, inject_
from thawline.freeze.norm import convert_to_groupnorm_
from thawline.freeze.plan import FreezePlan
from thawline.freeze.resolve import Resolution, resolve_all
from thawline.train.rundir import RunDirectory, write_json
from thawline.train.seeding import seed_all


def shape_(model: nn.Module, plan: FreezePlan, *, seed: int) -> tuple[Resolution, ...]:
    """Give `model` the structure that the plan asks for (adapters, GroupNorm) and resolve every phase on it.

    Adapters are drawn from the seed, so a model shaped again for a resume or an export is the same one.
    """
    if plan.lora is not None:
        seed_all(derive(seed, "lora"))
        inject_(model, plan.lora)
    phases = resolve_all(plan, index_of(model))
    replaced = {path for r in phases for path, policy in r.norms.items() if policy == "groupnorm"}
    if replaced:
        convert_to_groupnorm_(model, sorted(replaced))
        phases = resolve_all(plan, index_of(model))
    return phases


@dataclass(slots=True)
class Law:
    """What may differ, and what the model was before anything trained.

    plan:   written out for this model (presets and layer lists expanded)
    phases: the resolution of every phase of the plan
    base:   the base as it was loaded, before adapters and replaced norms
    starts: digests of every parameter and buffer before the first step, of the shaped model; one a phase, because which
            rows of a tensor count as frozen belongs to the phase
    entered: the highest phase entered so far
    """

    plan: FreezePlan
    seed: int
    phases: tuple[Resolution, ...]
    base: BaseRef
    starts: tuple[Snapshot, ...]
    entered: int = field(default=0)

    @classmethod
    def open(cls, plan: FreezePlan, model: nn.Module, files: RunDirectory, *, seed: int, source: Path) -> Law:
        """Recognise the base (BaseMismatch if the run was begun on another), shape the model, take the digests."""
        base = BaseRef.of(model, path=str(source))
        if files.base.exists():
            begun = BaseRef.read(files.base)
            check_base(begun, base, source=str(files.path))
            base = replace(base, below=begun.below, made=begun.made)
        else:
            base = replace(base, below=made_over(source), made=made_by_builder(base.digests, source))
            files.path.mkdir(parents=True, exist_ok=True)
            base.write(files.base)
        phases = shape_(model, plan, seed=seed)
        if any(r.rows for r in phases):
            starts = tuple(snapshot(model, r) for r in phases)
        else:
            starts = (snapshot(model),) * len(phases)
        return cls(plan.expanded(index_of(model)), seed, phases, base, starts)

    def enter(self, model: nn.Module, phase: int) -> Resolution:
        """Put the phase in force: requires_grad, modes, stale gradients."""
        self.entered = phase
        apply_(model, self.phases[phase])
        return self.phases[phase]

    def may_change(self) -> frozenset[str]:
        """Every name (tied ones included) that a phase entered so far lets change."""
        entered = self.phases[: self.entered + 1]
        return frozenset(name for r in entered for d in r.decisions if d.trains for name in (d.name, *d.also))

    def delta(self, model: nn.Module) -> Delta:
        """What differs from the base, after everything that may not differ has been shown not to.

        Raises LawBroken naming the tensors that changed though no phase so far names them.
        """
        self.audit(model, stepped=False).raise_if_broken()
        merged = False if self.plan.lora is not None else None
        adapters = adapters_of(model, besides=self.base.digests)
        return delta_of(self.base, model.state_dict(), merged=merged, adapters=adapters)

    def audit(self, model: nn.Module, *, stepped: bool | None = None) -> AuditReport:
        """Hold the model as it is against what it was, under every phase entered."""
        resolutions = self.phases[: self.entered + 1]
        now = snapshot(model, self.phases[self.entered])
        return audit(self.starts[self.entered], now, resolutions, stepped=stepped)

    def restore_(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        """Lay a checkpoint's tensors over the shaped base; every tensor is accounted for."""
        where = str(checkpoint.path)
        check_base(checkpoint.base, self.base, source=where)
        laid = lay_over(model.state_dict(), checkpoint.difference, as_shaped=self._drawn(model), source=where)
        load_strict_(model, laid, source=where)

    def under_every_name(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by first name -> by each name, as the model's state dict has them."""
        tied = self.phases[0]
        return {alias: t for name, t in tensors.items() for alias in (name, *tied[name].also)}

    def _drawn(self, model: nn.Module) -> frozenset[str]:
        """Names that shaping made (adapters, replaced norms): they are as drawn until a phase trains them."""
        return frozenset(name for name in model.state_dict() if name not in self.base.digests)

    def shaped_like(self, model: nn.Module) -> None:
        """Give a freshly loaded base the structure of the run's model."""
        shape_(model, self.plan, seed=self.seed)


def write_audit(files: RunDirectory, report: AuditReport) -> None:
    """Leave the audit in the run directory."""
    write_json(files.audit, report.to_dict())
