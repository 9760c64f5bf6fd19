"""docs/checkpoints.md tells the truth: its Python runs, and every command in it has such a verb with such options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from thawline.cli.app import VERBS, app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


def test_the_python_runs() -> None:
    found = blocks("python")
    assert found
    for block in found:
        exec(compile(block, str(PAGE), "exec"), {})


def test_every_command_is_a_verb_with_these_options() -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(lines) > 10
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[0] == "thawline"
        assert words[1] in VERBS
        command = app.get_command(None, words[1])  # type: ignore[arg-type]  # it needs none
        assert command is not None
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line
