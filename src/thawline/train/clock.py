"""How fast a run goes, and what it waits for: read by people and by `speed.jsonl`, never by the mathematics."""

from __future__ import annotations

import resource
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import torch

from thawline.train.rundir import RowLog

_SMOOTHING = 0.9
_LOG_EVERY_S = 1.0


class Clock:
    """Times steps and what they wait for; one row a second at most goes to the file `log`.

    step, total_steps: where the run is, and how long it is
    """

    def __init__(self, log: Path, *, step: int, total_steps: int) -> None:
        self._log = RowLog(log)
        self._first, self._total = step, total_steps
        self._begun = self._lap = perf_counter()
        self._written = 0.0
        self._lost: defaultdict[str, float] = defaultdict(float)
        self._rate: float | None = None

    def waited(self, reason: str, seconds: float) -> None:
        """Count time in which the run did not train: "data" waited for, "saving", "evaluation", ..."""
        self._lost[reason] += seconds

    @contextmanager
    def waiting(self, reason: str) -> Iterator[None]:
        """Count the time inside."""
        began = perf_counter()
        try:
            yield
        finally:
            self.waited(reason, perf_counter() - began)

    def lap(self, samples: int, step: int) -> Mapping[str, float]:
        """End a step over `samples` samples, the run being after `step`.

        seconds:       since the step before it
        wait/<reason>: the share of them that went to waiting, by reason
        samples_per_s: smoothed; evaluations and saves not counted in, waiting for data is
        memory_mb, peak_memory_mb: held now, and at most so far; of the GPU where one is in use, else resident
        eta_s:         until the run is done, at its pace since it was taken up
        """
        now = perf_counter()
        seconds = max(now - self._lap, 1e-9)
        beside = sum(lost for reason, lost in self._lost.items() if reason != "data")
        rate = samples / max(seconds - beside, 1e-9)
        self._rate = rate if self._rate is None else _SMOOTHING * self._rate + (1 - _SMOOTHING) * rate
        held, peak = memory_mb()
        figures = {
            "seconds": seconds,
            "samples_per_s": self._rate,
            "memory_mb": held,
            "peak_memory_mb": peak,
            "eta_s": (now - self._begun) / max(step - self._first, 1) * max(self._total - step, 0),
        }
        figures |= {f"wait/{reason}": min(1.0, lost / seconds) for reason, lost in self._lost.items()}
        self._lap = now
        self._lost.clear()
        if now - self._written >= _LOG_EVERY_S:
            self._written = now
            self._log.append({"step": step, **{k: round(v, 4) for k, v in figures.items()}})
        return figures


def memory_mb() -> tuple[float, float]:
    """Memory of this process now, and the most so far, in MB: of the GPU where one is in use, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 1e6, torch.cuda.max_memory_allocated() / 1e6
    unit = 1.0 if sys.platform == "darwin" else 1024.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # no such file on this system
        return peak, peak
    return pages * resource.getpagesize() / 1e6, peak
