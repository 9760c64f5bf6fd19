"""A live model as a `ModelIndex`: its parameters, buffers, ties and classes. Reads only; changes nothing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from thawline.core.digest import DTYPES
from thawline.core.index import ModelIndex, ParamInfo
from thawline.errors import RecipeError


def index_of(model: nn.Module) -> ModelIndex:
    """Every parameter (tied ones under each of their names), buffer and module of `model`.

    Raises RecipeError for a lazy module whose parameters have no shape yet.
    """
    model = unwrap(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    params: list[ParamInfo] = []
    buffers: list[ParamInfo] = []
    first_name: dict[int, str] = {}
    for path, module in modules.items():
        prefix = f"{path}." if path else ""
        own = original_class(module).__name__
        for key, value in module._parameters.items():
            if value is None:
                continue
            name = prefix + key
            _refuse_lazy(name, value)
            first = first_name.setdefault(id(value), name)
            params.append(
                ParamInfo(
                    name=name,
                    shape=tuple(value.shape),
                    dtype=dtype_name(value),
                    module_class=own,
                    tied_to=None if first == name else first,
                )
            )
        for key, value in module._buffers.items():
            if value is None:
                continue
            name = prefix + key
            _refuse_lazy(name, value)
            buffers.append(
                ParamInfo(
                    name=name,
                    shape=tuple(value.shape),
                    dtype=dtype_name(value),
                    is_buffer=True,
                    persistent=key not in module._non_persistent_buffers_set,
                    module_class=own,
                )
            )
    index = ModelIndex(params, buffers, {path: class_names(m) for path, m in modules.items()})
    _ = index.tree  # grown here, so that resolving does not wait for it
    return index


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and DistributedDataParallel, whose names are the original ones."""
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def dtype_name(tensor: Tensor) -> str:
    """The safetensors spelling of the tensor's dtype; torch's own word where that format has none."""
    word = str(tensor.dtype).removeprefix("torch.")
    return DTYPES.get(word, word)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class a module had before it was pinned (`thawline.freeze.apply`)."""
    cls = type(module)
    original: type[nn.Module] = cls.__dict__.get("_thawline_original", cls)
    return original


def class_names(module: nn.Module) -> tuple[str, ...]:
    """Class names along the method resolution order, up to and without nn.Module."""
    names: list[str] = []
    for cls in original_class(module).__mro__:
        if cls is nn.Module:
            break
        names.append(cls.__name__)
    return tuple(names)


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Each parameter once, by its first name."""
    return dict(unwrap(model).named_parameters())


def all_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every buffer under every name it has, also those that no state dict holds."""
    for path, module in unwrap(model).named_modules(remove_duplicate=False):
        for key, value in module._buffers.items():
            if value is not None:
                yield (f"{path}.{key}" if path else key), value


def _refuse_lazy(name: str, value: Tensor) -> None:
    if torch.nn.parameter.is_lazy(value):
        raise RecipeError(
            "the parameter has no shape yet (its module is lazy)",
            where=name,
            fix="run one batch through the model before the plan is applied",
        )
