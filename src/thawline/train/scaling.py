"""The loss scale of fp16, so that small gradients do not vanish: two numbers, and what follows from them.

The rule is that of `torch.amp.GradScaler` at its defaults. A scale is a power of two, so scaling rounds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

_STEADY = 2000


@dataclass(frozen=True, slots=True)
class LossScale:
    """What the loss is multiplied with before the backward pass, and the gradient divided by after it.

    steady: updates since the factor last changed
    """

    factor: float = 2.0**16
    steady: int = 0

    def after(self, *, overflowed: bool) -> LossScale:
        """The scale of the next step: half after a gradient that was not finite, double after many that were."""
        if overflowed:
            return LossScale(self.factor / 2)
        if self.steady + 1 == _STEADY:
            return LossScale(self.factor * 2)
        return LossScale(self.factor, self.steady + 1)
