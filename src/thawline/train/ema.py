"""Exponential moving averages of what trains: what a run with `run.ema` evaluates, keeps as its best and exports.

After every update that is applied, average := average - (1 - d) * (average - weight), where d is the decay, at step n
at most (1 + n) / (10 + n): formula and rising decay of TensorFlow's ExponentialMovingAverage with `num_updates`
(tensorflow/python/training/moving_averages.py). An average that equals its weight stays as it is, bit for bit, so rows
that a plan freezes inside a trained tensor stay the base's in the average too.

Averages are kept for what has begun to train, from the value that it had then, in fp32 or wider. What is frozen again
later keeps the average that it had. Buffers (BatchNorm's statistics) are not averaged: they are taken as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from thawline.freeze.inspect import parameters_by_name
from thawline.train.recipe import EmaSettings


class Ema:
    """The averages of one model's parameters, by the parameters' first names.

    kept: averages of a checkpoint, whose names may be tied ones too; empty at the start of a run
    away: whether the model's own weights are out of it, or on their way (what `in_place` does)
    """

    def __init__(self, settings: EmaSettings, model: nn.Module, kept: Mapping[str, Tensor]) -> None:
        self._settings = settings
        self.away = False
        self._weights = parameters_by_name(model)
        self.averages = {name: kept[name].to(p.device) for name, p in self._weights.items() if name in kept}

    def follow_(self, trainables: Mapping[str, nn.Parameter]) -> None:
        """Begin the average of each that has none yet at its present value."""
        for name, p in trainables.items():
            if name not in self.averages:
                self.averages[name] = p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)

    @torch.no_grad()
    def update_(self, trainables: Mapping[str, nn.Parameter], step: int) -> None:
        """Move the averages after the update that followed `step` finished ones."""
        decay = self._settings.at(step)
        for name, p in trainables.items():
            average = self.averages[name]
            average.sub_((average - p) * (1 - decay))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Meanwhile the model holds the averages; afterwards its own weights again, bit for bit."""
        own = {name: self._weights[name].detach().clone() for name in self.averages}
        self.away = True
        try:
            self._put_(self.averages)
            yield
        finally:
            self._put_(own)
            self.away = False

    @torch.no_grad()
    def _put_(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._weights[name].copy_(value)
