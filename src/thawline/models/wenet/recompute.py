"""Activation checkpointing that leaves BatchNorm statistics alone the second time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def _statistics_rest(layer: nn.Module) -> Iterator[None]:
    # A recomputed BatchNorm in training would move its running statistics once more for the same batch: let it move
    # copies.
    norms = [m for m in layer.modules() if isinstance(m, nn.BatchNorm1d)]
    own = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        for name, buffer in norm._buffers.items():
            norm._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for norm, buffers in zip(norms, own, strict=True):
            norm._buffers.update(buffers)


def _contexts(layer: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _statistics_rest(layer)


def recomputed(layer: nn.Module) -> Callable[..., Any]:
    """`layer`, keeping only its input for the backward pass: less memory, one more forward pass."""
    return partial(checkpoint, layer, use_reentrant=False, context_fn=partial(_contexts, layer))
