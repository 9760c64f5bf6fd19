"""What is known of a LoRA adapter besides its factors: plain data that a delta records and a model is built from again.

The factors alone do not say what they are worth: the scale lies in the settings. Torch is not imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

NAME = "default"
"""The name under which peft keeps the adapters of a plan; it stands in the names of their tensors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One adapted layer, by the path of which it is kept.

    rank:    rows of the first factor
    alpha:   the product of the factors is scaled by alpha / rank, with `rslora` by alpha / sqrt(rank)
    dropout: of the adapter's input, in training
    fan_in_fan_out: whether the layer keeps its weight transposed (Conv1D of transformers)
    merged:  whether the layer's weight has the product in it already
    also:    other names of the layer's weight, where it is tied
    """

    rank: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0
    fan_in_fan_out: bool = False
    merged: bool = False
    also: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by.

        >>> Adapter(rank=4, alpha=8).scale, Adapter(rank=4, alpha=8, rslora=True).scale
        (2.0, 4.0)
        """
        return self.alpha / math.sqrt(self.rank) if self.rslora else self.alpha / self.rank

    def to_json(self) -> dict[str, object]:
        """A plain value; the scale is stated besides, so that a changed setting contradicts it."""
        return {**asdict(self), "also": list(self.also), "scale": self.scale}

    @classmethod
    def from_json(cls, value: Any) -> Adapter:
        """Read `to_json`'s value. Raises ValueError for another kind of adapter, or figures that contradict."""
        if not isinstance(value, Mapping):
            raise ValueError("the record of an adapter is no mapping")
        fields = dict(value)
        scale, also = fields.pop("scale", None), fields.pop("also", ())
        unknown = sorted(set(fields) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"an adapter has {unknown[0]!r}, which this version does not know")
        try:
            found = cls(**fields, also=tuple(map(str, also)))
        except TypeError as exc:
            raise ValueError(f"the record of an adapter lacks something: {exc}") from exc
        numbers = (found.alpha, found.dropout)
        if not isinstance(found.rank, int) or found.rank < 1 or not all(isinstance(n, int | float) for n in numbers):
            raise ValueError(f"an adapter has rank {found.rank!r}, alpha {found.alpha!r}, dropout {found.dropout!r}")
        if found.scale != scale:
            raise ValueError(
                f"an adapter of rank {found.rank} and alpha {found.alpha} has the scale {found.scale}, not {scale!r}"
            )
        return found


def factors(path: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """Names of the two factors of the adapter on the layer at `path`: of a linear layer or convolution, and of an
    embedding.

    >>> factors("ctc")[0]
    ('ctc.lora_A.default.weight', 'ctc.lora_B.default.weight')
    """
    first, second = f"{path}.lora_A.{NAME}.weight", f"{path}.lora_B.{NAME}.weight"
    return (first, second), (f"{path}.lora_embedding_A.{NAME}", f"{path}.lora_embedding_B.{NAME}")
