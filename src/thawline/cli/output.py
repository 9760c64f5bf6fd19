"""Where words go: people's text on standard output, or on standard error where `--json` owns standard output."""

from __future__ import annotations

import json
import sys
from typing import Any


def say(text: str, *, as_json: bool = False) -> None:
    """Text for people."""
    print(text, file=sys.stderr if as_json else sys.stdout, flush=True)


def give(value: Any, text: str, *, as_json: bool) -> None:
    """The result of a verb: `value` as the one JSON object, or `text` for people."""
    print(json.dumps(value, ensure_ascii=False) if as_json else text, flush=True)


def print_error(text: str, exit_code: int, *, as_json: bool, what: str, where: str = "", fix: str = "") -> None:
    """An error as people read it on standard error, and as a JSON object where that was asked for."""
    print(f"error: {text}", file=sys.stderr, flush=True)
    if as_json:
        error = {"what": what, "where": where, "fix": fix, "exit_code": exit_code}
        print(json.dumps({"error": error}, ensure_ascii=False), flush=True)
