"""YAML into typed, frozen values; every complaint carries file:line:column and the nearest known key.

A `Document` is plain data that remembers where each piece came from. `bind` turns it into a `Strict` value (pydantic,
frozen, unknown keys refused). Past this door no dictionary of settings travels. Scalars follow YAML 1.2: `1e-3` is a
number, `on` and `no` are strings; a key written twice is an error.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError
from pydantic_core import ErrorDetails

from thawline.core.forms import form_at, is_choice, words
from thawline.errors import RecipeError, ThawlineError

Location = tuple[str | int, ...]

_INT = re.compile(r"[-+]?\d+(_\d+)*")
_FLOAT = re.compile(r"[-+]?(\.\d+|\d+(_\d+)*(\.\d*)?)([eE][-+]?\d+)?")
_WORDS = {
    "null": None,
    "~": None,
    "": None,
    "true": True,
    "false": False,
    "True": True,
    "False": False,
}
_PLAIN = re.compile(r"[\w./][\w./+=~@-]*")
"""What needs no quotes wherever a scalar may stand."""
_UNQUOTED_SLICE = re.compile(r"[\w*]\[[-+\d:, ]*\]")
_MAX_DEPTH = 64
_OF_A_WHOLE = frozenset(("literal_error", "string_type", "dict_type", "model_type", "tuple_type", "list_type"))
"""What pydantic says of a value as a whole, for each member of a union."""
_OUT_OF_BOUNDS = frozenset(("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"))


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a piece of a document was written: `text` for people, `folder` for the relative paths in it."""

    text: str
    folder: Path


@dataclass(frozen=True, slots=True)
class Document:
    """Plain data (dict, list, str, int, float, bool, None) with the origin of every node."""

    data: Any
    name: str = ""
    origins: Mapping[Location, Origin] = field(default_factory=dict)

    def origin(self, *path: str | int) -> Origin:
        """Origin of the node at `path`, or of the nearest node above it that was written."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.origins:
                return self.origins[path[:end]]
        return Origin(self.name, Path())

    def where(self, *path: str | int) -> str:
        """`file:line:column` of the node at `path`, or of the nearest node above it."""
        return self.origin(*path).text


class Strict(BaseModel):
    """A frozen value that may come from YAML: unknown keys are refused, and it knows where it was written."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    _document: Document | None = PrivateAttr(default=None)
    _path: Location = PrivateAttr(default=())

    def where(self, *path: str | int) -> str:
        """`file:line:column` of a field or item; "" where the value was made in Python."""
        return "" if self._document is None else self._document.where(*self._path, *path)

    def folder(self, *path: str | int) -> Path:
        """The folder that relative paths written at this field are relative to."""
        return Path() if self._document is None else self._document.origin(*self._path, *path).folder


T = TypeVar("T", bound=Strict)


def read_yaml(path: Path | str) -> Document:
    """Read a YAML file. Raises RecipeError with the place where it is absent, empty or not YAML."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as exc:
        near = near_names(path.name, [p.name for p in path.parent.glob("*.y*ml")])
        fix = (
            f"did you mean {path.parent / near[0]}?"
            if near
            else "check the path; it is relative to the working directory"
        )
        raise RecipeError(f"no such file {str(path)!r}", fix=fix) from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise RecipeError(f"cannot be read: {exc}", where=str(path)) from exc
    return parse_yaml(text, str(path), folder=path.parent)


def parse_yaml(text: str, name: str, *, folder: Path | None = None) -> Document:
    """Parse YAML text; `name` stands for the file in messages, `folder` is what its relative paths start from."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as exc:
        raise _yaml_error(exc, text, name) from exc
    except yaml.YAMLError as exc:
        raise RecipeError(f"not YAML: {exc}", where=name) from exc
    if root is None:
        raise RecipeError("the file is empty", where=name, fix="`thawline init` writes a commented recipe")
    origins: dict[Location, Origin] = {}
    data = _construct(root, (), name, folder or Path(), origins)
    return Document(data, name, origins)


def dump_yaml(data: Any) -> str:
    """YAML text that `parse_yaml` reads back as the same data."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))


def scalar_text(value: Path | str) -> str:
    """A path or a word as it may stand after `key: ` or in a list, on one line; `parse_yaml` reads the same string.

    >>> scalar_text("data/train.list"), scalar_text("data: 1 #2"), scalar_text("1e3")
    ('data/train.list', '"data: 1 #2"', '"1e3"')
    """
    text = str(value)
    if _PLAIN.fullmatch(text) and isinstance(_scalar(text), str):
        return text
    return str(yaml.dump(text, Dumper=yaml.SafeDumper, default_style='"', allow_unicode=True, width=math.inf)).rstrip(
        "\n"
    )


def override(document: Document, assignments: Sequence[str] | Mapping[str, Any]) -> Document:
    """A copy with `a.b=value` applied; values are read as YAML, relative paths in them start at the working directory.

    >>> doc = parse_yaml("optim: {lr: 1}", "r.yaml")
    >>> override(doc, ["optim.lr=3e-4", "run.epochs=2"]).data
    {'optim': {'lr': 0.0003}, 'run': {'epochs': 2}}
    """
    import copy

    data, origins = copy.deepcopy(document.data), dict(document.origins)
    for key, value, text in _assignments(assignments):
        path = _set(data, key, value, text)
        for stale in [p for p in origins if p[: len(path)] == path]:
            del origins[stale]
        origins[path] = Origin(f"override '{text}'", Path.cwd())
    return Document(data, document.name, origins)


def bind(cls: type[T], document: Document, at: Location = ()) -> T:
    """The part of `document` at `at` as a value of type `cls`. Raises RecipeError naming every place that is wrong."""
    data = document.data
    for key in at:
        data = data[key]
    if not isinstance(data, Mapping):
        raise RecipeError(
            f"expected keys and values here, found {data!r}",
            where=document.where(*at),
            fix=f"known keys: {_known(cls)}",
        )
    try:
        value = cls.model_validate(data)
    except ValidationError as exc:
        raise _binding_error(cls, document, at, exc) from exc
    _attach(value, document, at)
    return value


def near_names(name: str, known: Sequence[str], *, count: int = 3) -> list[str]:
    """Names among `known` that look like `name`, best first."""
    lowered = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=count, cutoff=0.55)
    return [lowered[c] for c in close]


class _Dumper(yaml.SafeDumper):
    pass


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # PyYAML does not read back what it writes of the rarer line ends (U+0085 ...), unless they are escaped.
    style = '"' if not text.isprintable() else None if isinstance(_scalar(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_str)


def _yaml_error(exc: yaml.MarkedYAMLError, text: str, name: str) -> RecipeError:
    mark = exc.problem_mark or exc.context_mark
    if mark is None:
        return RecipeError(f"not YAML: {exc}", where=name)
    where = f"{name}:{mark.line + 1}:{mark.column + 1}"
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if (found := _UNQUOTED_SLICE.search(line)) is not None:
        selector = re.search(r"[^\s,\[\]{}:]+$", line[: found.start() + 1])
        example = f"{selector[0] if selector else ''}{line[found.start() + 1 : found.end()]}"
        return RecipeError(
            f"a slice inside a [...] list needs quotes: {example}",
            where=where,
            fix=f'write "{example}", or use a block list (- item)',
        )
    return RecipeError(f"not YAML: {exc.problem or exc.context}", where=where, fix=f"look at: {line.strip()}")


def _scalar(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if text in (".inf", "-.inf", ".nan"):
        return float(text.replace(".", ""))
    return text


def _construct(node: yaml.Node, path: Location, name: str, folder: Path, origins: dict[Location, Origin]) -> Any:
    mark = node.start_mark
    where = f"{name}:{mark.line + 1}:{mark.column + 1}"
    if len(path) > _MAX_DEPTH:
        raise RecipeError(f"nested more than {_MAX_DEPTH} deep (an alias to itself?)", where=where)
    origins[path] = Origin(where, folder)
    if isinstance(node, yaml.ScalarNode):
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
            raise RecipeError(f"the tag {node.tag!r} is not allowed", where=where, fix="write a plain value")
        return _scalar(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_construct(child, (*path, i), name, folder, origins) for i, child in enumerate(node.value)]
    assert isinstance(node, yaml.MappingNode)
    data: dict[str, Any] = {}
    for key_node, value_node in node.value:
        spot = f"{name}:{key_node.start_mark.line + 1}:{key_node.start_mark.column + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise RecipeError(
                "a key must be a plain word",
                where=spot,
                fix="quote it if it holds signs such as [ or {",
            )
        key = key_node.value
        if key in data:
            raise RecipeError(f"the key {key!r} is written twice", where=spot, fix="keep one of them")
        data[key] = _construct(value_node, (*path, key), name, folder, origins)
        # The key's own place is where people look; a block value starts on a later line.
        origins[(*path, key)] = Origin(spot, folder)
    return data


def _assignments(given: Sequence[str] | Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    if isinstance(given, Mapping):
        for key, value in given.items():
            yield key, value, f"{key}={value}"
        return
    for text in given:
        key, sign, value = text.partition("=")
        if not sign or not key.strip():
            raise RecipeError(
                f"{text!r} is not an override",
                where="command line",
                fix="write key=value, e.g. optim.lr=3e-4",
            )
        parsed = parse_yaml(value, f"override '{text}'").data if value.strip() else None
        yield key.strip(), parsed, text


def _set(data: Any, key: str, value: Any, text: str) -> Location:
    path: list[str | int] = []
    node, parts = data, key.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        step: str | int = part
        if isinstance(node, list):
            if not part.lstrip("-").isdigit() or not -len(node) <= int(part) < len(node):
                raise RecipeError(
                    f"{part!r} is not an item of {'.'.join(map(str, path))}, which has {len(node)}",
                    where=f"override '{text}'",
                    fix="use a number from 0",
                )
            step = int(part) % len(node)
        elif not isinstance(node, dict):
            raise RecipeError(
                f"{'.'.join(map(str, path))!r} is a value, it has no {part!r}",
                where=f"override '{text}'",
                fix="set it whole",
            )
        path.append(step)
        if last:
            node[step] = value
        else:
            if isinstance(node, dict) and node.get(part) is None:
                node[part] = {}
            node = node[step]
    return tuple(path)


def _attach(value: Any, document: Document, path: Location) -> None:
    if isinstance(value, Strict):
        value._document, value._path = document, path
        for name in type(value).model_fields:
            _attach(getattr(value, name), document, (*path, name))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _attach(item, document, (*path, i))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _attach(item, document, (*path, key))


def _known(cls: type[BaseModel]) -> str:
    return ", ".join(cls.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in get_args(annotation) for m in _models_in(arg)]


def _models_at(cls: type[BaseModel], loc: Location) -> list[type[BaseModel]]:
    """The models whose keys may stand at `loc`; pydantic's loc names union members by class, which narrows them."""
    models = [cls]
    for part in loc:
        if isinstance(part, str):
            named = [m for m in models if m.__name__ == part]
            fields = [m.model_fields[part].annotation for m in models if part in m.model_fields]
            models = [m for a in fields for m in _models_in(a)] if fields else named or models
    return models


def _in_data(data: Any, loc: Location) -> Location:
    """`loc` without the parts that pydantic adds for the members of a union."""
    path: list[str | int] = []
    for part in loc:
        if isinstance(data, Mapping) and part in data:
            data = data[part]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            continue
        path.append(part)
    return tuple(path)


def _describe(cls: type[BaseModel], document: Document, at: Location, detail: ErrorDetails) -> tuple[str, str, str]:
    data = document.data
    for key in at:
        data = data[key]
    loc = tuple(detail["loc"])
    path = _in_data(data, loc)
    where = document.where(*at, *path)
    spelled = ".".join(map(str, (*at, *path)))
    if detail["type"] == "extra_forbidden":
        key, parent = str(loc[-1]), ".".join(map(str, (*at, *path[:-1])))
        known = sorted({name for m in _models_at(cls, loc[:-1]) for name in m.model_fields})
        near = near_names(key, known)
        scope = f" in {parent!r}" if parent else ""
        fix = (f"did you mean {near[0]!r}? " if near else "") + f"known keys: {', '.join(known)}"
        return f"unknown key {key!r}{scope}", where, fix
    if detail["type"] == "missing" and isinstance(loc[-1], str):
        missing = ".".join(map(str, (*at, *path, loc[-1])))
        return f"{missing!r} is missing", where, f"add it to {document.name or 'the recipe'}"
    error = detail.get("ctx", {}).get("error")
    if isinstance(error, ThawlineError):
        return f"{spelled}: {error.what}", error.where or where, error.fix
    given = detail["input"]
    form = None if isinstance(error, Exception) else form_at(cls, path)
    # Of a number out of bounds pydantic says enough, unless something else than a number may stand there too.
    if form is not None and (is_choice(form) or detail["type"] not in _OUT_OF_BOUNDS):
        for key in path:
            data = data[key]
        return f"{spelled}: expected {words(form)}, got {data!r}", where, ""
    message = str(error) if isinstance(error, Exception) else detail["msg"]
    shown = "" if isinstance(given, (dict, BaseModel)) else f", got {given!r}"
    return f"{spelled}: {message[0].lower()}{message[1:]}{shown}", where, ""


def _binding_error(cls: type[BaseModel], document: Document, at: Location, exc: ValidationError) -> RecipeError:
    # A union reports each of its members; one complaint a place is enough for a person, and it is about what is
    # written deepest: of `{a: 5}`, that 5 is none, and not that the whole is no word.
    data = document.data
    for key in at:
        data = data[key]
    details = exc.errors()
    deepest = {_in_data(data, tuple(detail["loc"])) for detail in details}
    above = {path[:end] for path in deepest for end in range(len(path))}
    seen: dict[str, tuple[str, str, str]] = {}
    for detail in details:
        if detail["type"] in _OF_A_WHOLE and _in_data(data, tuple(detail["loc"])) in above:
            continue
        what, where, fix = _describe(cls, document, at, detail)
        seen.setdefault(where + what.partition(":")[0], (what, where, fix))
    (what, where, fix), *others = seen.values()
    more = "".join(f"\n{w}: {t}" + (f"\n  fix: {f}" if f else "") for t, w, f in others)
    return RecipeError(what, where=where, fix=fix + more) if fix else RecipeError(what + more, where=where)


def is_finite(value: float) -> float:
    """A validator for settings that must be ordinary numbers."""
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return value
