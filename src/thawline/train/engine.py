"""The engine of one process: the model on its device, the optimizer over what trains, and the update.

An engine is built under one resolution and thrown away at the end of its phase; what must outlive it is captured by
name (`optimizer_state`). Engines of several processes take the same place: they know their rank and override `gather`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from thawline.errors import RecipeError
from thawline.freeze import doctor
from thawline.freeze.apply import keep_rows, mask_gradients_, put_rows_back_
from thawline.freeze.groups import optimizer_state_by_name, param_groups, restore_optimizer_
from thawline.freeze.resolve import Resolution
from thawline.train.recipe import OptimSettings

T = TypeVar("T")


def pick_device(name: str) -> torch.device:
    """The device a recipe means: `auto` is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise RecipeError(f"{name!r} is not a device", where="run.device", fix="auto, cpu, cuda or cuda:N") from exc
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError("no GPU is usable here", where="run.device", fix="run.device=auto takes what there is")
    return device


@dataclass(frozen=True, slots=True)
class Rate:
    """The learning rate of one update, and its momentum.

    factor:   what the schedule multiplies every rate with
    warmup:   phase in which a group began to train -> its own warm-up, 0 to 1
    momentum: SGD's momentum, Adam's first beta; None leaves that of the recipe
    """

    factor: float
    warmup: Callable[[int], float] = lambda since: 1.0
    momentum: float | None = None


@dataclass(slots=True)
class Engine:
    """The model, its optimizer, and the arithmetic of one update."""

    model: nn.Module
    resolution: Resolution
    optim: OptimSettings
    device: torch.device
    precision: str
    rank: int = 0
    world: int = 1
    optimizer: torch.optim.Optimizer = field(init=False)
    trainables: dict[str, nn.Parameter] = field(init=False)
    parked: dict[str, Tensor] = field(init=False, default_factory=dict)
    torn: bool = field(init=False, default=False)
    """The tensors are past the last step that the run has on record, or on their way there."""
    _looked: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.model.to(self.device)
        self.model.train()  # what the plan pins stays in eval mode
        groups = param_groups(self.model, self.resolution, lr=self.optim.lr, weight_decay=self.optim.weight_decay)
        self.trainables = {name: p for group in groups for name, p in zip(group["names"], group["params"], strict=True)}
        self.optimizer = _optimizer(self.optim, groups)

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, in their order."""
        return [value]

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the forward pass: half of it by autocast on request, weights and update stay fp32."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16 if self.precision == "bf16" else torch.float16)

    @contextmanager
    def first_look(self) -> Iterator[Look]:
        """Goes around the passes of a step; in the first step of the phase the doctor watches."""
        if self._looked:
            yield Look(None, self)
            return
        with doctor.watch(self.model, self.resolution) as seen:
            yield Look(seen, self)
        self._looked = True

    def buffers(self) -> dict[str, Tensor]:
        """Copies of the buffers that a forward pass may change (BatchNorm's statistics)."""
        moving = set(self.resolution.moving_buffers)
        return {name: b.detach().clone() for name, b in self.model.named_buffers() if name in moving}

    @torch.no_grad()
    def put_buffers_back_(self, kept: Mapping[str, Tensor]) -> None:
        """Give buffers these values: those before a forward pass that does not count, or the mean of several."""
        for name, buffer in self.model.named_buffers():
            if name in kept:
                buffer.copy_(kept[name])

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def take_gradients_(self) -> dict[str, Tensor]:
        """The gradients of what trains, by name; the parameters are left without."""
        taken = {name: p.grad for name, p in self.trainables.items() if p.grad is not None}
        self.zero_grad()
        return taken

    def put_gradients_(self, gradients: Mapping[str, Tensor]) -> None:
        """Give the parameters these gradients."""
        for name, gradient in gradients.items():
            self.trainables[name].grad = gradient

    def clip_(self) -> float:
        """Scale the gradient of what trains to at most `optim.clip`; its norm before that. Frozen rows have none."""
        mask_gradients_(self.model, self.resolution)
        limit = self.optim.clip if self.optim.clip is not None else math.inf
        return float(nn.utils.clip_grad_norm_(self.trainables.values(), limit))

    def prepare_(self) -> dict[str, Tensor]:
        """Make what an update needs memory for: state for gradients that have none yet, and copies of frozen rows.

        State starts at zero, as torch's optimizers start theirs. Nothing else changes, so a step that runs out of
        memory here can be taken again. Returns the rows for `update_`.
        """
        for p in self.trainables.values():
            if p.grad is not None and not self.optimizer.state.get(p):
                self.optimizer.state[p] = _state(self.optim, p)
        return keep_rows(self.model, self.resolution)

    def update_(self, rate: Rate, kept: dict[str, Tensor]) -> None:
        """One optimizer update, each group at its own rate; the frozen rows `kept` are put back bit for bit.

        After `prepare_` it happens whole or not at all: the fused kernels write in place and make no tensors.
        """
        self.torn = True
        for group in self.optimizer.param_groups:
            group["lr"] = self.optim.lr * group["lr_factor"] * rate.factor * rate.warmup(group["since"])
            if rate.momentum is not None:
                group |= _with_momentum(group, rate.momentum)
        self.optimizer.step()
        put_rows_back_(self.model, self.resolution, kept)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Moments and counters, keyed `<parameter name>/<state key>`."""
        return {**self.parked, **optimizer_state_by_name(self.optimizer)}

    def restore_optimizer_(self, state: Mapping[str, Tensor]) -> None:
        """Attach state by name; that of what does not train in this phase is parked, and captured again."""
        self.parked = restore_optimizer_(self.optimizer, state)


@dataclass(frozen=True, slots=True)
class Look:
    """What the doctor saw of one step, if it watched."""

    seen: doctor.Watch | None
    engine: Engine

    def findings(self) -> tuple[doctor.Finding, ...]:
        """Findings while the gradients are still there; none where nobody watched."""
        if self.seen is None:
            return ()
        engine = self.engine
        return tuple(doctor.after_first_step(engine.model, engine.resolution, self.seen, engine.optimizer))


def _optimizer(optim: OptimSettings, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, fused=True)
    cls = torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam
    return cls(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def _with_momentum(group: Mapping[str, Any], momentum: float) -> dict[str, Any]:
    return {"betas": (momentum, group["betas"][1])} if "betas" in group else {"momentum": momentum}


def _state(optim: OptimSettings, param: Tensor) -> dict[str, Tensor]:
    if optim.name == "sgd":
        return {"momentum_buffer": torch.zeros_like(param)} if optim.momentum else {}
    step = torch.zeros((), dtype=torch.float32, device=param.device)
    return {"step": step, "exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
