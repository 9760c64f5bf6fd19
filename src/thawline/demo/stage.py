"""Where the demo says what it does: titles, assertions with their outcome, small tables. On a terminal with colours and
a moving line while something takes time; anywhere else plain text.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

_PLAIN_WIDTH = 110  # columns of a table in a log, where nothing says how wide the reader's window is


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One assertion of the demo.

    scene:    the title it stood under
    text:     what was found
    expected: what should have been, said only where it was not
    """

    scene: str
    text: str
    ok: bool
    expected: str


@dataclass(slots=True)
class Stage:
    """Prints as it goes, and remembers every check."""

    out: TextIO = field(default_factory=lambda: sys.stdout)
    checks: list[Check] = field(default_factory=list)
    _scene: str = ""
    _scenes: int = 0
    _console: Console = field(init=False)

    def __post_init__(self) -> None:
        plain = not self.out.isatty()
        self._console = Console(file=self.out, highlight=False, width=_PLAIN_WIDTH if plain else None)

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.ok)

    def say(self, text: str = "", style: str = "") -> None:
        """A line as it is: never wrapped, brackets mean nothing."""
        self._console.print(Text(text, style), soft_wrap=True)

    def scene(self, title: str) -> None:
        """Begin the next numbered part."""
        self._scenes += 1
        self._scene = title
        self.say()
        self.say(f"{self._scenes}  {title}", "bold")

    def note(self, text: str) -> None:
        """Something worth knowing that is not an assertion; each line of it is indented."""
        for line in text.splitlines():
            self.say(f"          {line}".rstrip(), "dim")

    def check(self, ok: bool, text: str, *, expected: str) -> bool:
        """An assertion: what was found, and if it does not hold what was expected. Returns `ok`."""
        self.checks.append(Check(scene=self._scene, text=text, ok=ok, expected=expected))
        line = Text("   ")
        line.append("ok     " if ok else "FAILED ", "green" if ok else "bold red")
        line.append(text)
        self._console.print(line, soft_wrap=True)
        if not ok:
            self.say(f"          expected: {expected}", "red")
        return ok

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: frozenset[int]) -> None:
        """A table; the columns numbered in `right` are set flush right."""
        # A header that breaks over lines is hard to read in a log: plain tables keep it on one.
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for number, title in enumerate(columns):
            table.add_column(title, justify="right" if number in right else "left", no_wrap=True)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        indented = Table.grid()
        indented.add_column(width=10)
        indented.add_column()
        indented.add_row("", table)
        self.say()
        if self._console.is_terminal:
            self._console.print(indented)
        else:
            with self._console.capture() as captured:
                self._console.print(indented)
            for line in captured.get().splitlines():
                self.say(line.rstrip())
        self.say()

    @contextmanager
    def working(self, text: str) -> Iterator[Ticker]:
        """While something takes time: a moving line on a terminal, nothing elsewhere."""
        if not self._console.is_terminal:
            yield Ticker(text, None)
            return
        with Status(Text(text, "dim"), console=self._console) as status:
            yield Ticker(text, status)


@dataclass(slots=True)
class Ticker:
    """A monitor of runs (see `thawline.train.monitor`) that shows the step on the moving line."""

    text: str
    status: Status | None
    total: int = 0

    def begin(self, *, step: int, total_steps: int) -> None:
        self.total = total_steps

    def note(self, text: str) -> None: ...

    def step(self, row: Mapping[str, Any], speed: Mapping[str, float]) -> None:
        loss = row["loss"]  # a word where it is not finite
        self.show(f"step {row['step']} of {self.total}, loss {loss if isinstance(loss, str) else format(loss, '.2f')}")

    def evaluation(self, row: Mapping[str, float]) -> None: ...

    def end(self) -> None: ...

    def show(self, more: str) -> None:
        """The line, and what is going on now."""
        if self.status is not None:
            self.status.update(Text(f"{self.text}   {more}", "dim"))
