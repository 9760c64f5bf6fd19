"""Brings a live model under a resolution: requires_grad, stale gradients, and modes. The only place that does.

A frozen module is held in eval mode by its class: `m.__class__` becomes a generated subclass whose `train()` leaves
the mode alone. So the pin holds through `model.train()`, a slice `model[:5]`, `deepcopy`, pickling, DDP and
`torch.compile`; `isinstance`, `repr`, parameter names and state dicts stay as they were; `m.eval()` still returns the
module. (A function put on the instance, as `module.train = disabled_train`, makes `eval()` return something else, and
is lost or shared wrongly in copies.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from thawline.core.select import Rows
from thawline.errors import RecipeError
from thawline.freeze.inspect import unwrap
from thawline.freeze.resolve import Resolution

M = TypeVar("M", bound=nn.Module)

_PINNED: dict[type, type] = {}


class _Pinned(nn.Module):
    """Mixed into the class of a pinned module."""

    def train(self: M, mode: bool = True) -> M:
        super().train(mode)  # the children decide for themselves
        if "_thawline_released" not in self.__dict__:
            self.training = False
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The generated class cannot be found by name; what is written is the original class, and that it is pinned.
        cls = type(self)
        reduced: Any = super().__reduce_ex__(protocol)
        original = cls.__dict__.get("_thawline_original", cls)
        args = tuple(original if a is cls else a for a in reduced[1])
        return _rebuild_pinned, (reduced[0], args), *reduced[2:]


def _rebuild_pinned(make: Callable[..., nn.Module], args: tuple[Any, ...]) -> nn.Module:
    module = make(*args)
    object.__setattr__(module, "__class__", _pinned_class(type(module)))
    return module


def _pinned_class(cls: type) -> type:
    made = _PINNED.get(cls)
    if made is None:
        body = {
            "_thawline_original": cls,
            "__module__": cls.__module__,  # tools that know torch's own layers by their module still do
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
        }
        made = _PINNED[cls] = type(cls.__name__, (_Pinned, cls), body)
    return made


def is_pinned(module: nn.Module) -> bool:
    """Whether `module` is held in eval mode."""
    return isinstance(module, _Pinned) and "_thawline_released" not in module.__dict__


def pin_(module: nn.Module) -> None:
    """Hold this one module (not its children) in eval mode. Raises RecipeError for TorchScript."""
    if isinstance(module, torch.jit.ScriptModule):
        raise RecipeError(
            f"a scripted module ({module.original_name}) cannot be held in eval mode",
            fix="apply the plan before torch.jit.script",
        )
    if isinstance(module, _Pinned):
        module.__dict__.pop("_thawline_released", None)
    else:
        object.__setattr__(module, "__class__", _pinned_class(type(module)))
    module.training = False


def unpin_(module: nn.Module, *, training: bool) -> None:
    """Let this module follow `train()` again, beginning with the mode given."""
    if not isinstance(module, _Pinned):
        return
    original = type(module).__dict__.get("_thawline_original")
    if original is not None:
        object.__setattr__(module, "__class__", original)
        module.__dict__.pop("_thawline_released", None)
    else:
        # FSDP2 and parametrizations derive a class of their own from the pinned one; it cannot be taken out again.
        module.__dict__["_thawline_released"] = True
    module.training = training


def apply_(model: nn.Module, resolution: Resolution) -> None:
    """Set requires_grad, drop gradients that no longer belong, and pin or unpin modules, as `resolution` says.

    Everything is checked before anything is changed. Raises RecipeError where the resolution is another model's, and
    where a DistributedDataParallel wrapper would be left with a stale set of parameters: its reducer knows only what
    trained when it was built, and the ranks would drift apart without a word.
    """
    wrapper = model
    model = unwrap(model)
    params = dict(model.named_parameters(remove_duplicate=False))
    _check_same(params, resolution)
    wanted = {d.name: d.trains for d in resolution.decisions if not d.is_buffer}
    changed = [name for name, on in wanted.items() if params[name].requires_grad != on]
    if changed and isinstance(wrapper, nn.parallel.DistributedDataParallel):
        raise RecipeError(
            f"what trains cannot change under DistributedDataParallel ({changed[0]} and {len(changed) - 1} more)",
            fix="apply to the bare model and wrap it anew; `Frozen.wrap` does this at every phase",
        )
    pins = _modules_to_pin(model, resolution)
    for name, on in wanted.items():
        param = params[name]
        if param.requires_grad != on:
            param.requires_grad_(on)
            param.grad = None
        elif not on:
            param.grad = None
    for module in model.modules():
        if id(module) in pins:
            pin_(module)
        else:
            unpin_(module, training=model.training)
    if changed and "torch._dynamo" in sys.modules:
        # A compiled graph bakes in which tensors need gradients; guards notice, but the limit of recompiles is small.
        torch._dynamo.reset()


def release_(model: nn.Module) -> None:
    """Take every pin off: all modules follow `train()` again. requires_grad stays as it is."""
    model = unwrap(model)
    for module in model.modules():
        unpin_(module, training=model.training)


def mask_gradients_(model: nn.Module, resolution: Resolution) -> None:
    """Zero the gradient of the rows that do not train. Call it between backward and clipping."""
    if resolution.rows:
        params = dict(unwrap(model).named_parameters())
        for name, rows in resolution.rows.items():
            grad = params[name].grad
            if grad is not None:
                grad[frozen_rows(grad.shape[0], rows).to(grad.device)] = 0


def keep_rows(model: nn.Module, resolution: Resolution) -> dict[str, Tensor]:
    """Copies of the rows that do not train, to be put back after the optimizer's step (`put_rows_back_`).

    Masked gradients alone do not hold them: weight decay and old moments still move them.
    """
    if not resolution.rows:
        return {}
    params = dict(unwrap(model).named_parameters())
    return {
        name: params[name].detach()[frozen_rows(params[name].shape[0], rows).to(params[name].device)].clone()
        for name, rows in resolution.rows.items()
    }


@torch.no_grad()
def put_rows_back_(model: nn.Module, resolution: Resolution, kept: dict[str, Tensor]) -> None:
    """Write back what `keep_rows` copied."""
    params = dict(unwrap(model).named_parameters()) if kept else {}
    for name, values in kept.items():
        param = params[name]
        param[frozen_rows(param.shape[0], resolution.rows[name]).to(param.device)] = values


def frozen_rows(count: int, rows: Rows) -> Tensor:
    """Boolean mask (count,) of the rows outside the ranges `rows`."""
    mask = torch.ones(count, dtype=torch.bool)
    for start, stop in rows:
        mask[start:stop] = False
    return mask


def _check_same(params: dict[str, nn.Parameter], resolution: Resolution) -> None:
    names = {name for d in resolution.decisions if not d.is_buffer for name in (d.name, *d.also)}
    missing, extra = sorted(names - params.keys()), sorted(params.keys() - names)
    if missing or extra:
        parts = [f"{len(missing)} are missing, e.g. {missing[0]}"] if missing else []
        parts += [f"{len(extra)} are new, e.g. {extra[0]}"] if extra else []
        raise RecipeError(
            f"the resolution belongs to another model: {'; '.join(parts)}",
            fix="resolve the plan against this model",
        )
    for d in resolution.decisions:
        if not d.is_buffer and tuple(params[d.name].shape) != d.shape:
            raise RecipeError(
                f"{d.name} has shape {tuple(params[d.name].shape)}, the resolution was made for {d.shape}",
                fix="resolve the plan against this model",
            )
        for other in d.also:
            if params[other] is not params[d.name]:
                raise RecipeError(
                    f"{other} was tied to {d.name} and is no more", fix="tie the weights before the plan is applied"
                )


def _modules_to_pin(model: nn.Module, resolution: Resolution) -> set[int]:
    """Modules by identity; one that several parts share is pinned only if each of them is frozen."""
    pinned = set(resolution.pinned)
    wanted: dict[int, bool] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        wanted[id(module)] = wanted.get(id(module), True) and path in pinned
    return {key for key, on in wanted.items() if on}
