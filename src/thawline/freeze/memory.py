"""What a phase costs in memory, as plain numbers from its resolution. Activations are measured, not estimated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from thawline.core.index import bits_of
from thawline.freeze.resolve import Resolution

_STATES: Mapping[str, int] = {"adamw": 2, "adam": 2, "sgd": 0, "momentum": 1, "adagrad": 1, "lion": 1}


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one device. weights_bytes counts parameters and buffers, tied tensors once; averages_bytes is nothing
    where a run keeps no averages of its weights. saving_bytes is no part of the total: what the host needs more while a
    checkpoint is written, which is copied first (trained tensors, optimizer, averages)."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    averages_bytes: int = 0
    saving_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.averages_bytes

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "total_bytes": self.total_bytes}


def estimate(
    resolution: Resolution,
    *,
    optimizer: str = "adamw",
    momentum: float = 0.0,
    ema: bool = False,
    earlier: Sequence[Resolution] = (),
) -> MemoryEstimate:
    """Weights, gradients, optimizer state and averages of one phase.

    optimizer: adamw, adam, sgd (one state with `momentum`), adagrad, lion. A tensor of which some rows train has a
               gradient and moments for all of them
    ema:       the run averages what trains, in fp32 or wider
    earlier:   the phases before this one: what trained then keeps its state and its average, even if it rests now
    Raises KeyError for an optimizer that is not known.
    """
    word = "momentum" if optimizer == "sgd" and momentum else optimizer
    states = _STATES[word]
    sizes = {d.name: (d.numel, bits_of(d.dtype)) for d in resolution.decisions}
    weights = sum(_bytes(numel, bits) for numel, bits in sizes.values())
    gradients = sum(_bytes(*sizes[name]) for name in resolution.trainable_names)
    begun = {name for phase in (*earlier, resolution) for name in phase.trainable_names}
    trained = sum(_bytes(*sizes[name]) for name in begun)
    state = states * trained + (4 * len(begun) if word in ("adamw", "adam", "adagrad") else 0)
    averages = sum(_bytes(sizes[name][0], max(sizes[name][1], 32)) for name in begun) if ema else 0
    return MemoryEstimate(weights, gradients, state, averages, trained + state + averages)


def _bytes(numel: int, bits: int) -> int:
    return (numel * bits + 7) // 8
