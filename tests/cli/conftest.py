"""Every error that a test of a verb provokes is read: an option that it advises is one of that verb."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from tests.cli.guidance import wrong

from thawline.cli import app
from thawline.cli.output import print_error


@pytest.fixture(autouse=True)
def advice(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was advised in vain; the test fails where that is anything."""
    verbs: list[str] = []
    found: list[str] = []
    call = app._call

    def noticing(argv: Sequence[str]) -> int:
        words = [word for word in argv if not word.startswith("-")]
        verbs.append(" ".join(words[: 2 if words[:1] == ["data"] else 1]))
        return call(argv)

    def reading(text: str, exit_code: int, *, what: str, fix: str = "", **more: Any) -> None:
        if verbs[-1].split(" ")[0] in app.VERBS:
            found.extend(wrong(fix, verbs[-1]))
        print_error(text, exit_code, what=what, fix=fix, **more)

    monkeypatch.setattr(app, "_call", noticing)
    monkeypatch.setattr(app, "print_error", reading)
    yield found
    assert found == []
