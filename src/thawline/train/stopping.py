"""Being told to stop: signals and the time limit become a reason that the loop reads between steps."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from thawline.core.span import Span

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignal:
    """While entered, SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 set `reason` in place of ending the process.

    A second Ctrl-C does not wait for the end of the step: it raises KeyboardInterrupt at once. Outside the main thread,
    where Python allows no handlers, only the time limit counts.
    """

    def __init__(self, limit: Span | None) -> None:
        self._deadline = None if limit is None else time.monotonic() + limit.amount * 60
        self._limit = limit
        self._signal: str | None = None
        self._previous: dict[int, Any] = {}

    @property
    def reason(self) -> str | None:
        """Why to stop, or None to go on."""
        if self._signal is not None:
            return self._signal
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return f"the time limit of {self._limit}"
        return None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._handle) for s in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name
