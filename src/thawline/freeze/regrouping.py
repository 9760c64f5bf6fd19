"""An optimizer's groups through the phases of a plan: parameters come and go, the groups themselves stay.

There is a group for every rate, decay and phase of thawing that any phase asks for, so that the number of groups never
changes, and a learning rate scheduler built over them stays right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thawline.errors import RecipeError
from thawline.freeze.groups import optimizer_state_by_name, param_groups, restore_optimizer_
from thawline.freeze.inspect import parameters_by_name
from thawline.freeze.resolve import Resolution

Key = tuple[float, bool, int]
"""What the parameters of a group have in common: multiple of the rate, whether they decay, the phase they thawed in."""


def groups_of_phases(
    model: nn.Module, resolutions: Sequence[Resolution], *, phase: int, lr: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The groups of every phase, as `groups.param_groups` makes them; those that `phase` does not train are empty."""
    groups: dict[Key, dict[str, Any]] = {}
    for resolution in resolutions:
        for group in param_groups(model, resolution, lr=lr, weight_decay=weight_decay):
            entry = groups.setdefault(_own_key(group), {**group, "params": [], "names": []})
            if resolution.phase == phase:
                entry["params"], entry["names"] = group["params"], group["names"]
    return list(groups.values())


def regroup_(
    optimizer: torch.optim.Optimizer, model: nn.Module, resolution: Resolution, parked: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Make the optimizer hold exactly what trains in `resolution`; state stays with its parameter.

    parked: state by name of what did not train until now; what fits no parameter any more is returned.
    Raises RecipeError, with nothing changed, for groups that were not built from the plan's.
    """
    state = {**parked, **optimizer_state_by_name(optimizer, model)}
    places: dict[Key, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        if "names" not in group:
            raise RecipeError(
                "the optimizer was not built from this plan's groups, so its groups cannot follow the phase",
                fix="build it with frozen.optimizer(...) or from frozen.param_groups(...)",
            )
        places[_own_key(group)] = group
    for group in param_groups(model, resolution, lr=1.0, weight_decay=1.0):
        if _own_key(group) not in places:
            raise RecipeError(
                f"the optimizer has no group for {group['names'][0]} (rate x {group['lr_factor']:g})",
                fix="build it from frozen.param_groups(...), which has the groups of every phase",
            )
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["params"], group["names"] = [], []
    refill_(places.values(), model, resolution)
    return restore_optimizer_(optimizer, state)


def refill_(groups: Iterable[dict[str, Any]], model: nn.Module, resolution: Resolution) -> None:
    """Put into each group what of it trains in `resolution`; the state of an optimizer stays where it is."""
    params = parameters_by_name(model)
    names: dict[Key, list[str]] = {}
    for name in resolution.trainable_names:
        d = resolution[name]
        names.setdefault((d.lr, d.decays, d.since), []).append(name)
    for group in groups:
        held = names.get(_own_key(group), [])
        group["params"], group["names"] = [params[name] for name in held], list(held)


def _own_key(group: Mapping[str, Any]) -> Key:
    return group["lr_factor"], group["decays"], group["since"]
