"""Optimizer groups from a resolution, and optimizer state by parameter name.

Torch keys the state of an optimizer by position: after a change of the groups it attaches the moments of one tensor
to another without a word. Here state is keyed `<parameter name>/<state key>` and checked by shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from thawline.errors import CheckpointError, RecipeError
from thawline.freeze.inspect import parameters_by_name
from thawline.freeze.resolve import Resolution


def param_groups(
    model: nn.Module, resolution: Resolution, *, lr: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: exactly the parameters that train in this phase.

    Each has "params", "names" (in the same order), "lr" (= lr * lr_factor), "lr_factor", "weight_decay" and "decays"
    (0 and False for what the plan keeps from decay), "since" (the phase in which these began to train, for a warm-up).
    """
    if not lr > 0:
        raise RecipeError(
            f"a learning rate of {lr} is no freeze", where="optim.lr", fix="freeze in the plan; use a positive rate"
        )
    params = parameters_by_name(model)
    groups: dict[tuple[float, bool, int], dict[str, Any]] = {}
    for name in resolution.trainable_names:
        d = resolution[name]
        group = groups.setdefault(
            (d.lr, d.decays, d.since),
            {
                "params": [],
                "names": [],
                "lr": lr * d.lr,
                "lr_factor": d.lr,
                "weight_decay": weight_decay if d.decays else 0.0,
                "decays": d.decays,
                "since": d.since,
            },
        )
        group["params"].append(params[name])
        group["names"].append(name)
    return list(groups.values())


def names_in(optimizer: torch.optim.Optimizer, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Parameters in the optimizer by name: from the groups' "names", else found in `model` by identity.

    Raises RecipeError for a parameter that has no name (it is not in the model: a head replaced after the optimizer
    was built, for instance).
    """
    known = {} if model is None else {id(p): name for name, p in parameters_by_name(model).items()}
    found: dict[str, Tensor] = {}
    for number, group in enumerate(optimizer.param_groups):
        names = group.get("names")
        for position, param in enumerate(group["params"]):
            if names is not None:
                name = names[position]
            elif id(param) in known:
                name = known[id(param)]
            else:
                raise RecipeError(
                    f"the optimizer holds a tensor of shape {tuple(param.shape)} that has no name in the model",
                    where=f"param_groups[{number}]['params'][{position}]",
                    fix="build the optimizer from frozen.param_groups(...), after the last change of the model",
                )
            found[name] = param
    return found


def optimizer_state_by_name(optimizer: torch.optim.Optimizer, model: nn.Module | None = None) -> dict[str, Tensor]:
    """The optimizer's state, keyed `<parameter name>/<state key>`; numbers become tensors without dimensions.

    The tensors are the optimizer's own (no copies).
    """
    state: dict[str, Tensor] = {}
    for name, param in names_in(optimizer, model).items():
        for key, value in optimizer.state.get(param, {}).items():
            if isinstance(value, Tensor):
                state[f"{name}/{key}"] = value
            elif isinstance(value, (bool, int, float)):
                state[f"{name}/{key}"] = torch.tensor(value)
    return state


def restore_optimizer_(
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Tensor],
    *,
    model: nn.Module | None = None,
    strict: bool = False,
) -> dict[str, Tensor]:
    """Attach state by name; what belongs to no parameter in the optimizer is returned, to be parked.

    Parameters without state begin afresh, as newly thawed ones do. strict refuses both kinds. Tensors are copied to
    the parameter's device ("step" counters stay on the CPU unless the optimizer is fused or capturable). Raises
    CheckpointError where a moment does not have its parameter's shape; nothing is attached then.
    """
    params = names_in(optimizer, model)
    flags = {id(p): bool(g.get("fused") or g.get("capturable")) for g in optimizer.param_groups for p in g["params"]}
    fresh: dict[str, dict[str, Tensor]] = {}
    parked: dict[str, Tensor] = {}
    for full, value in state.items():
        name, _, key = full.rpartition("/")
        if name not in params:
            parked[full] = value
            continue
        _check_shape(name, key, value, params[name])
        on_device = key != "step" or flags[id(params[name])]
        moved = value.detach().to(params[name].device) if on_device else value.detach().cpu()
        fresh.setdefault(name, {})[key] = moved.clone() if moved.data_ptr() == value.data_ptr() else moved
    if strict:
        missing = [name for name in params if name not in fresh]
        if parked or missing:
            parts = [f"state of {_names(parked)} fits no parameter"] if parked else []
            parts += [f"{missing[0]} and {len(missing) - 1} more have no state"] if missing else []
            raise CheckpointError(
                f"optimizer state and optimizer differ: {'; '.join(parts)}",
                fix="use the plan and phase that the state was saved under",
            )
    for name, entries in fresh.items():
        optimizer.state[params[name]] = dict(entries)
    return parked


def _names(keys: Iterable[str]) -> str:
    names = list(dict.fromkeys(key.rpartition("/")[0] for key in keys))
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


_FULL = frozenset(
    {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum", "square_avg", "grad_avg", "acc_delta"}
    | {"exp_inf", "ax", "prev", "step_size", "variance"}
)
"""Moments of torch's optimizers that have exactly their parameter's shape."""


def _check_shape(name: str, key: str, value: Tensor, param: Tensor) -> None:
    """Moments have their parameter's shape; factored ones (Adafactor) lack a dimension, counters have none."""
    if value.shape == param.shape or value.dim() == 0:
        return
    dims = set(param.shape) | {1}
    if key in _FULL or value.dim() > param.dim() or not set(value.shape) <= dims:
        raise CheckpointError(
            f"the optimizer state {key!r} has shape {tuple(value.shape)}, its parameter {tuple(param.shape)}",
            where=name,
            fix="the state belongs to another model, or the parameter was resized after it was saved",
        )
