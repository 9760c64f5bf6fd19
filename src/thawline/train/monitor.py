"""What a person sees while a run goes on: a live line on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol, TextIO

_WORTH_TELLING = 0.3
"""Share of a step's time from which on it is shown what the run waited for."""
_COUNTS = ("utterances", "words", "unreadable", "images", "samples")


class Monitor(Protocol):
    """Told of everything; changes nothing."""

    def begin(self, *, step: int, total_steps: int) -> None: ...
    def note(self, text: str) -> None: ...
    def step(self, row: Mapping[str, Any], speed: Mapping[str, float]) -> None: ...
    def evaluation(self, row: Mapping[str, float]) -> None: ...
    def end(self) -> None: ...


class SilentMonitor:
    """Says nothing: notebooks that look at the metrics themselves, and tests."""

    def begin(self, *, step: int, total_steps: int) -> None: ...
    def note(self, text: str) -> None: ...
    def step(self, row: Mapping[str, Any], speed: Mapping[str, float]) -> None: ...
    def evaluation(self, row: Mapping[str, float]) -> None: ...
    def end(self) -> None: ...


@dataclass(slots=True)
class PlainMonitor:
    """One line every `interval_s` seconds, for logs and schedulers."""

    out: TextIO = field(default_factory=lambda: sys.stderr)
    interval_s: float = 5.0
    _total: int = 0
    _last: float = 0.0

    def begin(self, *, step: int, total_steps: int) -> None:
        self._total = total_steps

    def note(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    def step(self, row: Mapping[str, Any], speed: Mapping[str, float]) -> None:
        now = time.monotonic()
        if now - self._last >= self.interval_s or row["step"] == self._total:
            self._last = now
            left = f"  {timedelta(seconds=round(speed['eta_s']))} left" if speed else ""
            self.note(f"step {row['step']}/{self._total}  {_progress_text(row, speed)}{left}")

    def evaluation(self, row: Mapping[str, float]) -> None:
        self.note(_evaluation_text(row))

    def end(self) -> None: ...


class RichMonitor:
    """A live progress line with rich, for terminals."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("train", text="")

    def begin(self, *, step: int, total_steps: int) -> None:
        self._progress.update(self._task, completed=step, total=total_steps)
        self._progress.start()

    def note(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def step(self, row: Mapping[str, Any], speed: Mapping[str, float]) -> None:
        self._progress.update(self._task, completed=row["step"], text=_progress_text(row, speed))

    def evaluation(self, row: Mapping[str, float]) -> None:
        self.note(_evaluation_text(row))

    def end(self) -> None:
        self._progress.stop()


def terminal_monitor() -> Monitor:
    """Rich on a terminal, plain lines otherwise."""
    return RichMonitor() if sys.stderr.isatty() else PlainMonitor()


def _progress_text(row: Mapping[str, Any], speed: Mapping[str, float]) -> str:
    loss = row["loss"] if isinstance(row["loss"], str) else f"{row['loss']:.4f}"  # "nan", or "empty" without samples
    text = f"epoch {row['epoch']:.2f}  loss {loss}  lr {row['lr']:.2e}"
    if speed:
        text += f"  {speed['samples_per_s']:.1f} samples/s  {speed['memory_mb']:.0f} MB"
        waits = {k.removeprefix("wait/"): share for k, share in speed.items() if k.startswith("wait/")}
        told = {reason: share for reason, share in waits.items() if share > _WORTH_TELLING}
        text += "".join(f"  (waits for {reason} {share:.0%})" for reason, share in told.items())
    return text


def _evaluation_text(row: Mapping[str, float]) -> str:
    return f"evaluated after step {row['step']:.0f}  {metrics_text(row)}"


def metrics_text(row: Mapping[str, float]) -> str:
    """The held-back figures of an evaluation, rates first, counts left to the log."""
    shown = {k.removeprefix("valid/"): v for k, v in row.items() if k.startswith("valid/")}
    return "  ".join(f"{name} {value:.4f}" for name, value in shown.items() if name not in _COUNTS)
