"""How fast a run goes: read by people and by `speed.jsonl`, never by the mathematics."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from thawline.train.rundir import append_row

_SMOOTHING = 0.9


@dataclass(slots=True)
class Clock:
    """Times steps and the waiting for data between them; one row a second at most goes to `log`."""

    log: Path
    every_s: float = 1.0
    _lap: float = field(default_factory=time.perf_counter)
    _written: float = 0.0
    _waited: float = 0.0
    _rate: float | None = None

    def waited(self, seconds: float) -> None:
        """Count time spent waiting for the loader since the last lap."""
        self._waited += seconds

    def lap(self, samples: int, step: int) -> dict[str, float]:
        """End a step over `samples` samples; figures of its speed (smoothed rate) and of memory (peak, MB)."""
        now = time.perf_counter()
        seconds = max(now - self._lap, 1e-9)
        rate = samples / seconds
        self._rate = rate if self._rate is None else _SMOOTHING * self._rate + (1 - _SMOOTHING) * rate
        figures = {
            "seconds": seconds,
            "samples_per_s": self._rate,
            "loading_share": min(1.0, self._waited / seconds),
            "memory_mb": peak_memory_mb(),
        }
        self._lap, self._waited = now, 0.0
        if now - self._written >= self.every_s:
            self._written = now
            append_row(self.log, {"step": step, **{k: round(v, 4) for k, v in figures.items()}})
        return figures


def peak_memory_mb() -> float:
    """The most memory this process held so far: of the GPU where one is in use, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1.0 if sys.platform == "darwin" else 1024.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
