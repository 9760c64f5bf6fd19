"""Activation checkpointing: a block keeps only its input for the backward pass, and runs once more in it.

Never reentrant: that gives no gradient to a block whose input needs none, as of the first block above a frozen part.
Dropout draws the same masks the second time, and BatchNorm's statistics rest, so gradients are bitwise those of a plain
backward pass. Blocks below everything that trains keep nothing in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from thawline.errors import RecipeError


def recompute_(model: nn.Module) -> None:
    """Let the blocks of `model` recompute their activations: those of our models, which have a method `recompute_` for
    it, and those of transformers.

    Of transformers' blocks, the ones in eval mode do not: what a plan freezes as a whole keeps its activations where a
    gradient passes through it. Raises RecipeError for a model that has no such blocks.
    """
    found = False
    for module in model.modules():
        if callable(own := getattr(module, "recompute_", None)):
            own()
            found = True
        elif getattr(module, "supports_gradient_checkpointing", False):
            _refuse_statistics(module)
            # Not its public method: that makes the embeddings' output need a gradient, and with it everything that is
            # frozen between them and what trains.
            module._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False))  # type: ignore[operator]
            found = True
    if not found:
        raise RecipeError(
            f"{type(model).__name__} has no blocks that can recompute their activations",
            where="run.recompute",
            fix="leave it out; run.micro_batch takes less memory with any model",
        )


def recomputed(layer: nn.Module) -> Callable[..., Any]:
    """`layer`, keeping only its input for the backward pass: less memory, one more forward pass."""
    return partial(checkpoint, layer, use_reentrant=False, context_fn=partial(_contexts, layer))


def _contexts(layer: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _statistics_rest(layer)


@contextmanager
def _statistics_rest(layer: nn.Module) -> Iterator[None]:
    # A recomputed BatchNorm in training would move its running statistics once more for the same batch: let it move
    # copies.
    norms = [m for m in layer.modules() if isinstance(m, _BatchNorm)]
    own = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        for name, buffer in norm._buffers.items():
            norm._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for norm, buffers in zip(norms, own, strict=True):
            norm._buffers.update(buffers)


def _refuse_statistics(module: nn.Module) -> None:
    """Transformers has nothing like `_statistics_rest`."""
    if any(isinstance(m, _BatchNorm) for m in module.modules()):
        raise RecipeError(
            f"the BatchNorm statistics of {type(module).__name__} would move twice a pass",
            where="run.recompute",
            fix="leave it out, or replace the layers: plan.norms: groupnorm",
        )
