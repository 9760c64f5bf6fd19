"""The calls that join rooms for users: train or resume, and then a page about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thawline.tasks import runs
from thawline.train import loop
from thawline.train.monitor import Monitor


@dataclass(frozen=True, slots=True)
class Run:
    """A run and where it left things.

    dir:     the run directory; the exported model is `dir / "model"`
    metrics: the last evaluation, e.g. {"valid/wer": 0.1}; empty without held-back samples
    step:    optimizer updates taken
    """

    dir: Path
    metrics: Mapping[str, float]
    step: int

    def report(self) -> Path:
        """Write the page about this run (curves, phases, proof, and for images the mistakes); where it lies."""
        from thawline.report.page import write_page
        from thawline.tasks.vision_review import review_run

        return write_page(self.dir, review=review_run(self.dir))


def train(
    recipe: str | Path,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    *,
    run: str | Path | None = None,
    allow: Sequence[str] = (),
    monitor: Monitor | None = None,
) -> Run:
    """Train a recipe in `run` (default: runs/NAME), or go on with it there; see `thawline.tasks.runs.train`."""
    return _of(runs.train(recipe, overrides, run=run, allow=allow, monitor=monitor))


def resume(directory: str | Path, overrides: Mapping[str, Any] | Sequence[str] = (), **options: Any) -> Run:
    """Go on with a run; options as in `thawline.tasks.runs.resume` (step, fork, verify, allow, monitor)."""
    return _of(runs.resume(directory, overrides, **options))


def _of(done: loop.Run) -> Run:
    return Run(done.dir, done.metrics, done.step)
