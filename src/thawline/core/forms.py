"""What a setting may be, in words: from a field's type to "a whole number of at least 1, 'auto' or null"."""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

Form = tuple[Any, tuple[Any, ...]]
"""A type and its bounds."""


def form_at(cls: type[BaseModel], path: Sequence[str | int]) -> Form | None:
    """The type of the field of `cls` at `path` (keys and places in lists); None where none of its types goes so far."""
    found: list[Form] = [(cls, ())]
    for part in path:
        found = [inner for form in found for inner in _inside(form, part)]
    if not found:
        return None
    whole = functools.reduce(operator.or_, (kind for kind, _ in found))
    return whole, tuple(bound for _, bounds in found for bound in bounds)


def is_choice(form: Form) -> bool:
    """Whether there is more than one thing that it may be, null aside."""
    return sum(kind is not type(None) for kind, _ in _members(form)) > 1


def words(form: Form) -> str:
    """The sentence. null comes last, as what one writes to have nothing.

    >>> words((Annotated[int, FieldInfo(ge=1)] | Literal["auto"] | None, ()))
    "a whole number of at least 1, 'auto' or null"
    >>> words((tuple[float, float] | None, ()))
    'a list of 2 numbers or null'
    """
    said: dict[str, None] = {}
    for kind, bounds in _members(form):
        said.update(dict.fromkeys(_one(kind, bounds)))
    some = [word for word in said if word != "null"] + [word for word in said if word == "null"]
    return some[0] if len(some) == 1 else f"{', '.join(some[:-1])} or {some[-1]}"


def _members(form: Form) -> list[Form]:
    """The types of a union, each with its bounds; a type that is no union stands for itself."""
    kind, bounds = form
    origin: Any = get_origin(kind)
    if origin is Annotated:
        inner, *notes = get_args(kind)
        more = tuple(m for note in notes for m in (note.metadata if isinstance(note, FieldInfo) else (note,)))
        return _members((inner, (*bounds, *more)))
    if origin in (Union, types.UnionType):
        return [found for member in get_args(kind) for found in _members((member, bounds))]
    return [(kind, bounds)]


def _inside(form: Form, part: str | int) -> list[Form]:
    """What may stand at a key, or a place in a list, of a value of this type."""
    found: list[Form] = []
    for kind, _ in _members(form):
        origin: Any = get_origin(kind)
        arguments = get_args(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            fields = {field.alias or name: field for name, field in kind.model_fields.items()}
            found += [(fields[part].annotation, tuple(fields[part].metadata))] if part in fields else []
        elif origin in (dict, Mapping) and arguments:
            found.append((arguments[1], ()))
        elif origin in (list, tuple, Sequence) and isinstance(part, int):
            item = arguments[part] if len(arguments) > part and Ellipsis not in arguments else arguments[0]
            found.append((item, ()))
    return found


def _one(kind: Any, bounds: tuple[Any, ...]) -> list[str]:
    origin: Any = get_origin(kind)
    arguments = get_args(kind)
    if kind is None or kind is type(None):
        return ["null"]
    if origin is Literal:
        return [repr(value) for value in arguments]
    if kind is bool:
        return ["true", "false"]
    if kind in (int, float):
        return [("a whole number" if kind is int else "a number") + _bounded(bounds)]
    if kind is str:
        return ["a text"]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [f"keys and values ({', '.join(field.alias or name for name, field in kind.model_fields.items())})"]
    if origin in (list, tuple, Sequence):
        several = {"a whole number": "whole numbers", "a number": "numbers", "a text": "texts"}
        item = words((arguments[0], ()))
        count = "" if origin is not tuple or Ellipsis in arguments else f"{len(arguments)} "
        return [f"a list of {count}{several.get(item, f'items, each {item}')}"]
    if kind is dict or origin in (dict, Mapping):
        plain = len(arguments) < 2 or arguments[1] in (Any, object)
        return ["keys and values" if plain else f"keys with {words((arguments[1], ()))} each"]
    return [f"a {getattr(kind, '__name__', str(kind)).lower()}"]


def _bounded(bounds: tuple[Any, ...]) -> str:
    """The limits of a number, as annotated_types spells them."""
    limits = {name: getattr(b, name) for b in bounds for name in ("ge", "gt", "le", "lt") if hasattr(b, name)}
    if "ge" in limits and "le" in limits:
        return f" from {limits['ge']:g} to {limits['le']:g}"
    said = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
    return "".join(f"{' and' if n else ''} {said[name]} {value:g}" for n, (name, value) in enumerate(limits.items()))
