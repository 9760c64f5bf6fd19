"""A stretch of training as people write it: `500 steps`, `2 epochs`, `10 minutes`, `20%`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from thawline.errors import RecipeError

Unit = Literal["steps", "epochs", "minutes", "fraction"]

_SPAN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(%|[a-z]*)\s*")
_UNITS: dict[str, tuple[Unit, float]] = {
    "step": ("steps", 1), "steps": ("steps", 1), "": ("steps", 1),
    "epoch": ("epochs", 1), "epochs": ("epochs", 1),
    "minute": ("minutes", 1), "minutes": ("minutes", 1), "min": ("minutes", 1),
    "hour": ("minutes", 60), "hours": ("minutes", 60), "h": ("minutes", 60),
    "%": ("fraction", 0.01),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Span:
    """An amount of training; `amount` counts `unit` ("fraction" is a share of the whole run, 0 to 1)."""

    amount: float
    unit: Unit

    @classmethod
    def parse(cls, text: str | int | Span, *, where: str = "") -> Span:
        """Read `100 steps`, `2 epochs`, `10 minutes`, `20%`; a bare number counts steps.

        >>> Span.parse("2 epochs")
        Span(amount=2.0, unit='epochs')
        """
        if isinstance(text, Span):
            return text
        found = _SPAN.fullmatch(str(text))
        if found is None or found[2] not in _UNITS:
            raise RecipeError(
                f"{text!r} is not a stretch of training",
                where=where,
                fix="write a number and steps, epochs, minutes or %, e.g. '500 steps'",
            )
        unit, factor = _UNITS[found[2]]
        amount = float(found[1]) * factor
        if unit == "steps" and amount != int(amount):
            raise RecipeError(f"{text!r}: steps are whole numbers", where=where, fix="round it")
        if unit == "fraction" and amount > 1:
            raise RecipeError(f"{text!r} is more than the whole run", where=where, fix="at most 100%")
        return cls(amount, unit)

    def in_steps(self, *, steps_per_epoch: int, total_steps: int) -> int:
        """The same stretch as a number of optimizer steps. Minutes have none: wall-clock does not own the schedule."""
        if self.unit == "steps":
            return int(self.amount)
        if self.unit == "epochs":
            return round(self.amount * steps_per_epoch)
        if self.unit == "fraction":
            return round(self.amount * total_steps)
        raise RecipeError(f"{self} has no length in steps", fix="use steps, epochs or %")

    def __str__(self) -> str:
        if self.unit == "fraction":
            return f"{self.amount:.0%}"
        number = f"{self.amount:g}"
        return f"{number} {self.unit[:-1] if self.amount == 1 else self.unit}"
