"""Where a run begins: at nothing, or where another program's training left off (`start` of a recipe).

A run that was begun goes on from its own checkpoints alone; what is said here counts once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from thawline.ckpt.formats import zero
from thawline.ckpt.tensors import tensor_of
from thawline.data.sampler import BatchPlan, Cursor
from thawline.train.recipe import Recipe, StartSettings
from thawline.train.state import RunState


def first_state(start: StartSettings | None, plan: BatchPlan, *, accumulate: int) -> RunState:
    """The counters before the first step.

    Where the number of whole epochs is not known, the position is the one that a run over these data with these batches
    reaches in as many steps.
    """
    if start is None:
        return RunState()
    if start.epoch is not None:
        return RunState(step=start.step, cursor=Cursor(start.epoch))
    steps = -(-plan.batches_in_epoch(0) // accumulate)
    epoch, within = divmod(start.step, steps)
    index = min(within * accumulate, plan.batches_in_epoch(epoch))
    cursor = plan.cursor_at(epoch, index)
    return RunState(step=start.step, cursor=cursor, index=index if cursor.epoch == epoch else 0)


def first_moments(recipe: Recipe) -> dict[str, Tensor]:
    """The optimizer state before the first step, by name: that of a DeepSpeed checkpoint, or none."""
    if recipe.start is None or recipe.start.optimizer is None:
        return {}
    planned, updates = zero.moments(recipe.path("start", "optimizer"))
    state = {key: tensor_of(moment) for key, moment in planned.items()}
    names = dict.fromkeys(key.rpartition("/")[0] for key in state)
    return state | {f"{name}/step": torch.tensor(float(updates)) for name in names}


def terms(start: StartSettings) -> str:
    """On what terms the run begins, for people and `events.jsonl`."""
    position = "in the middle of an epoch" if start.epoch is None else f"at the start of epoch {start.epoch}"
    moments = "with" if start.optimizer is not None else "without"
    return f"after step {start.step} of another program's training, {position}, {moments} the moments of its optimizer"
