"""Upstream's configuration scripts (`config_7b_stage3.py`) as plain data, read and never run.

They are Python files of assignments: constants, `dict(...)`, lists, and strings such as "${num_frames}" that stand for
another assignment. Only that much is understood; whatever else is in them is passed over unless it is asked for.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from thawline.errors import RecipeError

_REFERENCE = re.compile(r"\$\{(\w+)\}")
_DEEPEST = 16


def read_script(text: str, *, name: str, where: str = "") -> dict[str, Any]:
    """The dictionary that a script assigns to `name`, references resolved.

    Raises RecipeError where it is no Python, assigns no such dictionary, or writes something else than constants in it.

    >>> read_script("num_frames = 8\\nmodel = dict(depth=-2, frames='${num_frames}')", name="model")
    {'depth': -2, 'frames': 8}
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as exc:
        raise RecipeError(f"not Python: {exc}", where=where) from exc
    assigned = {
        target.id: statement.value
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    if name not in assigned:
        raise RecipeError(f"it assigns nothing to {name!r}", where=where, fix="give one of upstream's config_*.py")
    value = _value(assigned[name], assigned, where, 0)
    if not isinstance(value, dict):
        raise RecipeError(f"{name!r} is no dictionary in it", where=where, fix="give one of upstream's config_*.py")
    return value


def _value(node: ast.expr, assigned: Mapping[str, ast.expr], where: str, depth: int) -> Any:
    if depth > _DEEPEST:
        raise RecipeError("its references run in a circle, or too deep", where=f"{where}:{node.lineno}")
    if isinstance(node, ast.Constant):
        found = _REFERENCE.fullmatch(node.value) if isinstance(node.value, str) else None
        if found is not None and found[1] in assigned:
            return _value(assigned[found[1]], assigned, where, depth + 1)
        return node.value
    if isinstance(node, ast.Name) and node.id in assigned:
        return _value(assigned[node.id], assigned, where, depth + 1)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _value(node.operand, assigned, where, depth + 1)
        if isinstance(inner, (int, float)):
            return -inner
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item, assigned, where, depth + 1) for item in node.elts]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {k.arg: _value(k.value, assigned, where, depth + 1) for k in node.keywords if k.arg is not None}
    if isinstance(node, ast.Dict):
        keys = [k for k in node.keys if k is not None]
        return {
            _value(k, assigned, where, depth + 1): _value(v, assigned, where, depth + 1)
            for k, v in zip(keys, node.values, strict=True)
        }
    raise RecipeError(
        f"{ast.unparse(node)!r} is not a constant, and scripts are not run",
        where=f"{where}:{node.lineno}",
        fix="write the model section as JSON or YAML",
    )
