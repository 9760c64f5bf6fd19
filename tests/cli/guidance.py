"""What a text for people tells them to type, and whether it can be typed: verbs, options, keys of a recipe."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import click
from pydantic import BaseModel

import thawline
from thawline.cli.app import VERBS, app
from thawline.core.config import Strict
from thawline.train.recipe import Recipe

PACKAGE = Path(thawline.__file__).parent
PAGES = {"charts.py", "page.py", "serving_page.py", "speech_page.py"}
"""Modules whose strings are CSS and script, where `--ink` is a colour."""

_PROSE = ("thawline delta", "of thawline that")
_COMMAND = re.compile(r"thawline (?P<verb>[a-z]+)(?P<rest>[^`\n;]*)")
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
_KEY = re.compile(r"(?<![\w./])(?:run|data|optim|plan|start|options)(?:\.[a-z_]+)+(?![\w(/])")
_OTHERS = re.compile(r"\b(?:tar|pip|git|ffmpeg|compute-cmvn-stats) [^;`\n]*")
"""Commands of other programs, up to the end of the clause."""
_NO_KEYS = {"data.list", "data.pkl", "data.video.to_tiles"}
"""Files, and calls."""


@dataclass(frozen=True)
class Text:
    """A string of the package. f-strings have {} where values go."""

    place: str
    text: str


def texts(folder: Path = PACKAGE) -> Iterator[Text]:
    """Every string below `folder` that may be shown to somebody: all but docstrings, and the docstrings of verbs."""
    for path in sorted(folder.rglob("*.py")):
        if path.name in PAGES:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        silent = {id(doc) for doc in _docstrings(tree)} | {
            id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)
        } - {id(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)}
        for node in ast.walk(tree):
            if id(node) not in silent and isinstance(node, (ast.JoinedStr, ast.Constant)):
                text = _spelled(node)
                if text is not None and " " in text:
                    yield Text(f"{path.relative_to(folder)}:{node.lineno}", text)
    for verb in VERBS:
        yield Text(f"thawline {verb} --help", command(verb).help or "")


def wrong(text: str, verb: str = "") -> list[str]:
    """What `text` names that does not exist. verb: the verb that says it, whose options it may name bare."""
    found: list[str] = []
    for words_of_prose in _PROSE:
        text = text.replace(words_of_prose, "")
    bare = text
    for match in _COMMAND.finditer(text):
        bare = bare.replace(match[0], "")
        words = match["rest"].split()
        name = f"{match['verb']} {words[0]}" if match["verb"] == "data" and words else match["verb"]
        if match["verb"] not in VERBS:
            found.append(f"there is no verb `thawline {match['verb']}`")
            continue
        known = options(name)
        found += [f"`thawline {name}` has no {o}" for o in _OPTION.findall(match["rest"]) if o not in known]
    anywhere = options(verb) if verb else set().union(*map(options, [*VERBS, "data check", "data units", "data cmvn"]))
    said = f"`thawline {verb}` has no" if verb else "no verb has"
    found += [f"{said} {o}" for o in _OPTION.findall(_OTHERS.sub("", bare)) if o not in anywhere]
    found += [f"a recipe has no {key}" for key in _KEY.findall(text) if key not in _NO_KEYS and not is_key(key)]
    return found


@cache
def options(verb: str) -> set[str]:
    """The options of a verb, e.g. `train` or `data check`."""
    own = [command(verb), app]
    return {"--help", "--version"} | {o for c in own for p in c.params for o in (*p.opts, *p.secondary_opts)}


def command(verb: str) -> click.Command:
    """A verb, or a verb of `data`."""
    context = click.Context(app)
    first, _, second = verb.partition(" ")
    found = app.get_command(context, first)
    if second and isinstance(found, click.Group):
        found = found.get_command(context, second) or found
    assert found is not None
    return found


def is_key(key: str) -> bool:
    """Whether a recipe may hold `key`, e.g. run.checkpoint.every. What the tasks themselves say stands under `options`
    and `data.conf`: there a field of any task's settings will do."""
    models: list[type[BaseModel]] = [Recipe]
    for part in key.split("."):
        fields = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        if not fields:
            return False
        free = part in ("options", "conf")
        models = _settings_of_tasks() if free else [m for a in fields for m in _models(a)]
    return True


@cache
def _settings_of_tasks() -> list[type[BaseModel]]:
    for file in (PACKAGE / "tasks").glob("*.py"):
        importlib.import_module(f"thawline.tasks.{file.stem}")
    found: list[type[BaseModel]] = []
    waiting: list[type[BaseModel]] = [Strict]
    while waiting:
        below = waiting.pop().__subclasses__()
        waiting += below
        found += [c for c in below if c.__module__.startswith(("thawline.tasks", "thawline.data"))]
    return found


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in get_args(annotation) for m in _models(arg)]


def _docstrings(tree: ast.AST) -> Iterator[ast.AST]:
    """Docstrings, and the strings under fields that say what they are."""
    for node in ast.walk(tree):
        body: Sequence[ast.stmt] = getattr(node, "body", ()) if not isinstance(node, (ast.IfExp, ast.Lambda)) else ()
        for statement in body:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                yield statement.value


def _spelled(node: ast.JoinedStr | ast.Constant) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
