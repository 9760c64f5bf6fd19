"""The calls that join rooms for users: train or resume, and then a page about it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec

from thawline.tasks import runs
from thawline.train import loop

_P = ParamSpec("_P")


@dataclass(frozen=True, slots=True)
class Run(loop.Run):
    """A run and where it left things, with the page about it.

    dir:     the run directory; the exported model is `dir / "model"`
    metrics: the last evaluation, e.g. {"valid/wer": 0.1}; empty without held-back samples
    step:    optimizer updates taken
    """

    def report(self) -> Path:
        """Write the page about this run (curves, phases, proof, and for images the mistakes); where it lies."""
        from thawline.report.page import write_page
        from thawline.tasks.vision_review import review_run

        return write_page(self.dir, review=review_run(self.dir))


def _reporting(call: Callable[_P, loop.Run]) -> Callable[_P, Run]:
    """The same call, whose run can write its page."""

    @functools.wraps(call)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> Run:
        done = call(*args, **kwargs)
        return Run(done.dir, done.metrics, done.step)

    return called


train = _reporting(runs.train)
resume = _reporting(runs.resume)
