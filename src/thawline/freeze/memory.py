"""What a phase costs in memory, as plain numbers from its resolution. Activations are measured, not estimated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from thawline.core.index import bits_of
from thawline.freeze.resolve import Resolution

_STATES: Mapping[str, int] = {"adamw": 2, "adam": 2, "sgd": 0, "momentum": 1, "adagrad": 1, "lion": 1}


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one device. weights_bytes counts parameters and buffers, tied tensors once."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "total_bytes": self.total_bytes}


def estimate(resolution: Resolution, *, optimizer: str = "adamw", momentum: float = 0.0) -> MemoryEstimate:
    """Weights, gradients and optimizer state of one phase.

    optimizer: adamw, adam, sgd (one state with `momentum`), adagrad, lion. A tensor of which some rows train has a
    gradient and moments for all of them. Raises KeyError for an optimizer that is not known.
    """
    word = "momentum" if optimizer == "sgd" and momentum else optimizer
    states = _STATES[word]
    weights = gradients = 0
    for d in resolution.decisions:
        nbytes = (d.numel * bits_of(d.dtype) + 7) // 8
        weights += nbytes
        if d.trains and not d.is_buffer:
            gradients += nbytes
    counters = 4 * len(resolution.trainable_names) if word in ("adamw", "adam", "adagrad") else 0
    return MemoryEstimate(weights, gradients, states * gradients + counters)
