"""A model under its plan, in anybody's loop: phases, optimizer and proof kept together.

`plan.apply(model)` returns a `Frozen`. At a change of phase requires_grad, stale gradients, modes, the groups and
state of attached optimizers, the DDP wrapper and compiled graphs change together, or, where anything is refused, not
at all.

In a plain PyTorch loop (and in the same three places of WeNet's train.py):

    frozen = FreezePlan.from_yaml("plan.yaml").apply(model)              # once the base is loaded
    optimizer = frozen.optimizer(torch.optim.AdamW, lr=1e-4, weight_decay=0.01)
    for epoch in range(epochs):
        frozen.advance(epoch=epoch, metrics={"valid/loss": valid_loss})  # what is due thaws; True if the phase changed
        for batch in loader:
            ...                                                          # clip over frozen.trainable_parameters()
    frozen.audit().raise_if_broken()

A resume needs nothing more: `optimizer.load_state_dict(saved)` brings the model into the phase it was saved in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thawline.core.index import ModelIndex
from thawline.errors import LawBroken, RecipeError
from thawline.freeze.apply import apply_, keep_rows, mask_gradients_, put_rows_back_, release_
from thawline.freeze.audit import AuditReport
from thawline.freeze.groups import names_in
from thawline.freeze.inspect import index_of, parameters_by_name, unwrap
from thawline.freeze.lora import has_adapters, inject_
from thawline.freeze.norm import NormChange, convert_to_groupnorm_
from thawline.freeze.plan import FreezePlan
from thawline.freeze.proof import Proof, no_digests
from thawline.freeze.regrouping import groups_of_phases, refill_, regroup_
from thawline.freeze.resolve import Resolution, resolve_all
from thawline.freeze.schedule import Progress, phase_at, warmup_factor

STATE_KEY = "thawline"
"""Key under which an attached optimizer's state dict carries the phase, the evaluations and parked moments."""


def apply_plan(plan: FreezePlan, model: nn.Module, *, audit: bool = True) -> Frozen:
    """Bring `model` under `plan`; see `FreezePlan.apply`. Every phase is resolved before the model is touched.

    What changes the model's structure is done here, once: adapters of `lora`, and `groupnorm`.
    """
    inner = unwrap(model)
    index = index_of(inner)
    plan = plan.expanded(index)
    planned = resolve_all(plan, index)
    requires_grad = {name: p.requires_grad for name, p in inner.named_parameters()}
    if plan.lora is not None and not has_adapters(inner):
        inject_(inner, plan.lora)
    replaced = [path for path, policy in planned[0].norms.items() if policy == "groupnorm"]
    changes = convert_to_groupnorm_(inner, replaced)
    if plan.lora is not None or changes:
        index = index_of(inner)
        planned = resolve_all(plan, index)
    apply_(model, planned[0])
    return Frozen(inner, plan, index, planned, changes, requires_grad, audit=audit)


class Frozen:
    """A model under its plan.

    plan:         expanded for this model; index: the model as plain data
    resolutions:  one a phase; norm_changes: layers that `groupnorm` replaced, with the cost of each
    phase:        the phase in force; history: evaluations seen by `advance`
    wrapped:      what `wrap` made of the model, renewed at each phase; the model itself without `wrap`
    """

    def __init__(
        self,
        model: nn.Module,
        plan: FreezePlan,
        index: ModelIndex,
        resolutions: Sequence[Resolution],
        norm_changes: Sequence[NormChange],
        requires_grad: Mapping[str, bool],
        *,
        audit: bool,
    ) -> None:
        self.model = model
        self.plan = plan
        self.index = index
        self.resolutions = tuple(resolutions)
        self.norm_changes = tuple(norm_changes)
        self.phase = 0
        self.progress = Progress()
        self.history: list[dict[str, float]] = []
        self.wrapped: nn.Module = model
        self._wrap: Callable[[nn.Module], nn.Module] | None = None
        self._was = dict(requires_grad)
        self._optimizers: list[torch.optim.Optimizer] = []
        self._handed: list[dict[str, Any]] = []
        self._parked: dict[str, Tensor] = {}
        self._kept_rows: dict[str, Tensor] = {}
        self._rates: list[tuple[dict[str, Any], float]] = []
        self._checked = False
        self._seen = {0}
        self._proof = Proof(model, self.resolution) if audit else None

    @property
    def resolution(self) -> Resolution:
        """The decisions in force."""
        return self.resolutions[self.phase]

    def table(self) -> str:
        """The decisions in force by block, as text."""
        notes = [f"note: {change.cost}" for change in self.norm_changes]
        return "\n".join([self.resolution.table(), *notes])

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that train now, in model order: what gradients are clipped over."""
        params = parameters_by_name(self.model)
        return [params[name] for name in self.resolution.trainable_names]

    def param_groups(self, *, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Groups for a torch optimizer over what trains now; see `thawline.freeze.groups.param_groups`.

        A plan of several phases also gets the groups of later ones, still empty. So the number of groups never
        changes, and a learning rate scheduler built over them stays right when parameters come and go.

        An optimizer keeps the very groups it is given, and these follow `advance`. One that is attached, too, is
        checked at each change, has its state parked, and holds frozen rows.
        """
        groups = groups_of_phases(self.model, self.resolutions, phase=self.phase, lr=lr, weight_decay=weight_decay)
        self._handed.extend(groups)
        return groups

    def optimizer(
        self, cls: type[torch.optim.Optimizer], *, lr: float, weight_decay: float = 0.0, **settings: Any
    ) -> torch.optim.Optimizer:
        """An optimizer of class `cls` over what trains now, attached (see `attach`)."""
        made = cls(self.param_groups(lr=lr, weight_decay=weight_decay), lr=lr, **settings)  # type: ignore[call-arg]
        return self.attach(made)

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Keep an optimizer built from `param_groups` in step with the plan, by torch's own hooks; returns it.

        At a change of phase its groups follow and state stays with its parameter; before a step it must hold exactly
        what trains; rows that do not train are put back after it; a warm-up scales the rate during it. Its state dict
        carries the phase, and loading that brings the model into it, whatever trained before.
        """
        if any("names" not in group for group in optimizer.param_groups):
            raise RecipeError(
                "the optimizer was not built from this plan's groups",
                fix="torch.optim.AdamW(frozen.param_groups(lr=...)), or frozen.optimizer(torch.optim.AdamW, lr=...)",
            )
        if self.follows(optimizer):
            return optimizer
        self._optimizers.append(optimizer)
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        optimizer.register_state_dict_post_hook(self._on_save)
        optimizer.register_load_state_dict_pre_hook(self._on_load)
        return optimizer

    def follows(self, optimizer: object) -> bool:
        """Whether `optimizer` is attached."""
        return any(known is optimizer for known in self._optimizers)

    def wrap(self, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """The model wrapped by `make` (DistributedDataParallel, torch.compile); done anew at every phase.

        After `advance` returned True, go on with `frozen.wrapped`.
        """
        self._wrap = make
        self.wrapped = make(self.model)
        return self.wrapped

    def advance(
        self,
        *,
        epoch: float | None = None,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> bool:
        """Tell how far the run is, and what was measured there; enters the phase that is due. True if it changed.

        epoch: epochs completed; step: updates taken; metrics: an evaluation at this point. Attached optimizers follow.
        What is not given stays as it was told last.
        """
        known = self.progress
        told = step, epoch
        where: dict[str, float] = {}
        if steps_per_epoch is None:
            steps_per_epoch = known.steps_per_epoch
        if step is None:
            step = round(epoch * steps_per_epoch) if epoch is not None and steps_per_epoch else known.step
        if epoch is None:
            epoch = step / steps_per_epoch if steps_per_epoch else known.epoch
        self.progress = Progress(
            step=step,
            epoch=epoch,
            total_steps=known.total_steps if total_steps is None else total_steps,
            steps_per_epoch=steps_per_epoch,
        )
        if metrics:
            # A position that was never told must not stand in the record as 0.
            if step or told[0] is not None:
                where["step"] = step
            if epoch or told[1] is not None:
                where["epoch"] = epoch
            self._record({**metrics, **where})
        return self.enter(phase_at(self.plan, self.progress, self.history))

    def enter(self, phase: int) -> bool:
        """Go to a phase by number; True if it was another. Raises RecipeError, with nothing changed, where refused."""
        if phase == self.phase:
            return False
        if not 0 <= phase < len(self.resolutions):
            raise RecipeError(f"there is no phase {phase}", fix=f"0 to {len(self.resolutions) - 1}")
        target = self.resolutions[phase]
        if set(target.trainable_names) != set(self.resolution.trainable_names):
            self._refuse_stale_wrapper()
        for optimizer in self._optimizers:
            names_in(optimizer)
        left = None if self._proof is None else self._proof.leave(self.resolution)
        apply_(self.model, target)
        self.phase = phase
        self._seen.add(phase)
        self._checked = False
        if self._proof is not None and left is not None:
            self._proof.enter(target, left)
        for optimizer in self._optimizers:
            self.sync_(optimizer)
        self._refill_handed()
        if self._wrap is not None:
            self.wrapped = self._wrap(self.model)
        return True

    @torch.no_grad()
    def sync_(self, optimizer: torch.optim.Optimizer) -> None:
        """Make the optimizer hold exactly what trains now. State stays with its parameter; that of what is frozen
        again is parked or dropped, as the plan's `moments` says, and taken up when it thaws once more."""
        parked = regroup_(optimizer, self.model, self.resolution, self._parked)
        self._parked = {k: v.clone() for k, v in parked.items()} if self.plan.moments == "park" else {}

    def audit(self) -> AuditReport:
        """What changed since `apply`, held against every phase gone through, bitwise.

        Raises RecipeError where `apply` was told not to take digests.
        """
        if self._proof is None:
            raise no_digests()
        return self._proof.report(self.resolution, [self.resolutions[phase] for phase in sorted(self._seen)])

    def release(self) -> nn.Module:
        """Undo `apply`: pins off, requires_grad as it was found; the model. Adapters and GroupNorm layers stay."""
        release_(self.model)
        for name, param in self.model.named_parameters():
            if name in self._was:
                param.requires_grad_(self._was[name])
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """What a resumed loop must be told: phase, evaluations, parked moments, digests of the base."""
        return {
            "plan": self.plan.digest,
            "phase": self.phase,
            "seen": sorted(self._seen),
            "history": [dict(row) for row in self.history],
            "progress": [self.progress.step, self.progress.epoch],
            "parked": dict(self._parked),
            "base": None if self._proof is None else self._proof.base.to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` wrote, and enter its phase. Raises RecipeError for the state of another plan."""
        if state["plan"] != self.plan.digest:
            raise RecipeError(
                "the state was saved under another plan", fix="resume with the same plan, or begin a new run"
            )
        self.enter(int(state["phase"]))
        self._seen = {int(p) for p in state["seen"]}
        self.history = [dict(row) for row in state["history"]]
        step, epoch = state["progress"]
        self.progress = Progress(
            step=step,
            epoch=epoch,
            total_steps=self.progress.total_steps,
            steps_per_epoch=self.progress.steps_per_epoch,
        )
        self._parked = dict(state["parked"])
        if self._proof is not None:  # the weights may be loaded after this; the next step goes on
            self._proof.interrupt(state["base"])

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises LawBroken unless requires_grad, the optimizer and the plan name the same set of live parameters."""
        live = parameters_by_name(self.model)
        planned = set(self.resolution.trainable_names)
        by_identity = {id(p): name for name, p in live.items()}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        in_optimizer = {by_identity[i] for i in held if i in by_identity}
        grads = {name for name, p in live.items() if p.requires_grad}
        ghosts = len([i for i in held if i not in by_identity])
        problems = [
            ("not in the plan but in the optimizer", in_optimizer - planned),
            ("in the plan but not in the optimizer, so never updated", planned - in_optimizer),
            ("not in the plan but requires_grad", grads - planned),
            ("in the plan but without requires_grad", planned - grads),
        ]
        texts = [f"{what}: {', '.join(sorted(names)[:4])}" for what, names in problems if names]
        if ghosts:
            texts.append(f"{ghosts} tensors in the optimizer are no longer in the model (a part was replaced?)")
        if texts:
            raise LawBroken("; ".join(texts), fix="apply the plan after the last change of the model, then attach")

    def _refill_handed(self) -> None:
        """Bring groups of optimizers that are not attached to the new phase; their state stays where it is."""
        attached = {id(group) for optimizer in self._optimizers for group in optimizer.param_groups}
        refill_([group for group in self._handed if id(group) not in attached], self.model, self.resolution)

    def _record(self, row: Mapping[str, float]) -> None:
        row = {key: float(value) for key, value in row.items()}
        if self.history and all(self.history[-1].get(k) == row.get(k) for k in ("step", "epoch")):
            self.history[-1].update(row)
        else:
            self.history.append(dict(row))

    def _refuse_stale_wrapper(self) -> None:
        dist = torch.distributed
        if self._wrap is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise RecipeError(
                "what trains changes, but a DistributedDataParallel wrapper made before would not notice: "
                "the ranks would drift apart",
                fix="wrap with frozen.wrap(lambda m: DistributedDataParallel(m)), and go on with frozen.wrapped",
            )

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not self._checked:
            self.check(optimizer)
            self._checked = True
            if self._proof is not None:
                self._proof.go_on(self.resolution)
        self._restore_rates()  # a subclass that calls super().step() brings us here twice
        mask_gradients_(self.model, self.resolution)
        self._kept_rows = keep_rows(self.model, self.resolution)
        for group in optimizer.param_groups:
            if group["params"] and group["since"]:
                factor = warmup_factor(self.plan, group["since"], self.progress, self.history)
                if factor != 1.0:
                    self._rates.append((group, group["lr"]))
                    group["lr"] = group["lr"] * factor

    def _after_step(self, *_: Any) -> None:
        put_rows_back_(self.model, self.resolution, self._kept_rows)
        self._kept_rows = {}
        self._restore_rates()

    def _restore_rates(self) -> None:
        for group, lr in self._rates:
            group["lr"] = lr
        self._rates.clear()

    def _on_save(self, _: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, STATE_KEY: self.state_dict()}

    def _on_load(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        if STATE_KEY not in state:
            raise RecipeError(
                "the optimizer state was not saved under a plan",
                fix="load it into a plain optimizer, or begin the optimizer anew",
            )
        self.load_state_dict(state[STATE_KEY])
        self.sync_(optimizer)
        for mine, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
            if mine["names"] != saved["names"]:
                raise RecipeError(
                    "the optimizer state was saved for other parameters", fix="resume with the same plan and model"
                )
        self._checked = False
        return {key: value for key, value in state.items() if key != STATE_KEY}
