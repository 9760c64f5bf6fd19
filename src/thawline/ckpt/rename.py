"""Tables of names: what each tensor of a checkpoint is to be called elsewhere."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from thawline.ckpt.formats.pieces import Planned
from thawline.errors import RecipeError

Rename = Mapping[str, str] | Sequence[tuple[str, str]]
"""Name -> new name, where a name ending in "." is a prefix; or (regular expression, replacement) pairs."""


def read_rename_table(path: Path) -> Rename:
    """A table of names from a JSON or YAML file: a mapping, or a list of [regular expression, replacement].

    Raises RecipeError naming the file if it is neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise RecipeError(f"cannot be read: {exc}", where=str(path), fix="give a JSON or YAML file") from exc
    try:
        value = json.loads(text)
    except ValueError:
        from thawline.core.config import parse_yaml

        value = parse_yaml(text, str(path)).data
    if isinstance(value, dict) and all(isinstance(item, str) for pair in value.items() for item in pair):
        return {str(old): str(new) for old, new in value.items()}
    if isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(item, str) for item in pair) for pair in value
    ):
        return [(str(pattern), str(replacement)) for pattern, replacement in value]
    raise RecipeError(
        "is neither a mapping of names nor a list of [pattern, replacement]", where=str(path), fix="see --rename"
    )


def renamed(tensors: dict[str, Planned], rename: Rename | None, where: str) -> dict[str, Planned]:
    """The same tensors under the names that the table gives them; None and an empty table leave all as it is.

    Raises RecipeError for a table that changes nothing, gives two tensors one name, or a name that cannot be one.
    """
    if not rename:
        return tensors
    change = _renamer(rename)
    names = {name: change(name) for name in tensors}
    unfit = [old for old, new in names.items() if not new or "\0" in new or not _is_text(new)]
    if unfit:
        raise RecipeError(
            f"the table gives {unfit[0]!r} the name {names[unfit[0]]!r}",
            where=where,
            fix="correct the table",
        )
    clashes = [name for name, count in Counter(names.values()).items() if count > 1]
    if clashes:
        raise RecipeError(
            f"the table gives {Counter(names.values())[clashes[0]]} tensors the name {clashes[0]!r}",
            where=where,
            fix="make the table one to one",
        )
    if all(old == new for old, new in names.items()):
        raise RecipeError(
            f"the table of names changes none; the first names are {', '.join(list(names)[:3])}",
            where=where,
            fix="correct its left sides",
        )
    return {
        names[name]: tensor.renamed(names[name], tied_to=names.get(tensor.info.tied_to or "", tensor.info.tied_to))
        for name, tensor in tensors.items()
    }


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _renamer(rename: Rename) -> Callable[[str], str]:
    if isinstance(rename, Mapping):
        exact = dict(rename)
        prefixes = [old for old in exact if old.endswith(".")]

        def by_name(name: str) -> str:
            if name in exact:
                return exact[name]
            prefix = next((old for old in prefixes if name.startswith(old)), None)
            return name if prefix is None else exact[prefix] + name[len(prefix) :]

        return by_name
    try:
        pairs = [(re.compile(pattern), replacement) for pattern, replacement in rename]
        for pattern, replacement in pairs:
            pattern.sub(replacement, "")  # reads the replacement, whether it matches or not
    except (re.error, IndexError) as exc:
        raise RecipeError(f"a row is no regular expression and replacement: {exc}", fix="correct the table") from exc

    def by_pattern(name: str) -> str:
        for pattern, replacement in pairs:
            name = pattern.sub(replacement, name)
        return name

    return by_pattern
