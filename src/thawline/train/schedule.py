"""Learning rate and momentum as pure functions of the step: no scheduler object, no state to lose.

`step` counts the optimizer updates already done, so the first update of a run has step 0.
"""

from __future__ import annotations

import math

from thawline.errors import RecipeError
from thawline.train.recipe import ScheduleSettings


def lr_factor(schedule: ScheduleSettings, step: int, *, total_steps: int, steps_per_epoch: int) -> float:
    """The rate of the update after `step` finished ones, as a multiple of `optim.lr`.

    constant, linear, cosine, wsd: linear warm-up to 1, then flat, or down to `floor` at `total_steps` in a line, in
    half a cosine, or in a line over the last `decay` (warm-up, stable, decay).
    onecycle: up from 1/25 to 1 over `warmup` (or 30 %), down to `floor`, each in half a cosine (Smith and Topin 2017),
    with the steps of torch.optim.lr_scheduler.OneCycleLR, whose last rate is a `floor` of 4e-6.
    warmuplr: WeNet's WarmupLR (wenet/utils/scheduler.py): W^0.5 * min(s^-0.5, s * W^-1.5) with s = max(1, step),
    because WeNet's first two updates share their rate.
    noam: d_model^-0.5 * min(s^-0.5, s * W^-1.5), s = step + 1 (Vaswani et al. 2017, equation 3); lr is its scale.
    """
    warmup = schedule.warmup.in_steps(steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    if schedule.name in ("warmuplr", "noam"):
        if warmup < 1:
            raise RecipeError(
                f"the schedule {schedule.name} needs a warm-up",
                where=schedule.where("warmup"),
                fix="e.g. warmup: 1000 steps",
            )
        if schedule.name == "warmuplr":
            s = max(1, step)
            return float(warmup**0.5 * min(s**-0.5, s * warmup**-1.5))
        s = step + 1
        return float(schedule.d_model**-0.5 * min(s**-0.5, s * warmup**-1.5))
    if schedule.name == "onecycle":
        return _one_cycle(0.04, 1.0, schedule.floor, step, warmup=warmup, total_steps=total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.name == "constant":
        return 1.0
    start = warmup
    if schedule.name == "wsd":
        start = total_steps - schedule.decay.in_steps(steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    share = min(1.0, max(0.0, (step - start) / max(1, total_steps - start)))
    if schedule.name == "cosine":
        return _cosine(1.0, schedule.floor, share)
    return 1.0 + (schedule.floor - 1.0) * share


def momentum(schedule: ScheduleSettings, step: int, *, total_steps: int, steps_per_epoch: int) -> float | None:
    """Momentum (Adam: the first beta) of the update after `step` finished ones; None where the schedule leaves it.

    onecycle: from the greatest down to the least while the rate rises, and back up while it falls, as OneCycleLR does.
    """
    if schedule.name != "onecycle" or schedule.momentum is None:
        return None
    least, greatest = schedule.momentum
    warmup = schedule.warmup.in_steps(steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    return _one_cycle(greatest, least, greatest, step, warmup=warmup, total_steps=total_steps)


def _one_cycle(first: float, middle: float, last: float, step: int, *, warmup: int, total_steps: int) -> float:
    """From `first` to `middle` at the turn, to `last` at the run's last step, each in half a cosine."""
    turn = (warmup or 0.3 * total_steps) - 1
    if step <= turn:
        return _cosine(first, middle, step / turn if turn else 1.0)
    return _cosine(middle, last, min(1.0, (step - turn) / max(total_steps - 1 - turn, 1e-9)))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
