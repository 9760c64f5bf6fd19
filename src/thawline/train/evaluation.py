"""Scoring held-back samples while a run goes on, and which of the scores is the best so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from thawline.data.loader import BadSample, BatchRequest, Loader
from thawline.data.sampler import Batching, BatchPlan, Cursor
from thawline.train.memory import OutOfMemory, is_out_of_memory, pieces, until_it_fits
from thawline.train.recipe import Recipe
from thawline.train.task import Evaluation, Samples, Task


def evaluate(
    task: Task,
    model: nn.Module,
    samples: Samples,
    recipe: Recipe,
    device: torch.device,
    *,
    split: int,
    tell: Callable[[int], None],
    waits: Callable[[str], None],
) -> tuple[Evaluation, tuple[BadSample, ...]]:
    """What `model` makes of `samples`, in their own order, in eval mode, without gradients; and the unreadable ones.

    split: pieces that each batch is cut into; where an evaluation does not fit into memory it is begun anew with twice
           as many, and `tell` is told
    waits: told in a line why data are waited for
    """
    batching = recipe.data.batch
    if batching.bucket_boundaries:
        batching = Batching(size=max(batching.bucket_sizes))
    plan = BatchPlan(len(samples), seed=recipe.run.seed, batching=batching, length=samples.length, shuffle=False)
    requests = [BatchRequest(epoch=0, cursor=cursor, ids=ids) for cursor, ids in plan.batches(Cursor())]

    def once(split: int) -> tuple[Evaluation, tuple[BadSample, ...]]:
        bad: list[BadSample] = []

        def batches(loader: Loader[Any, Any]) -> Iterator[Any]:
            for loaded in loader.iterate(requests):
                bad.extend(loaded.bad)
                if loaded.batch is not None:
                    yield from (part.to(device) for part in pieces(loaded.batch, split))

        try:
            loader = Loader(samples, seed=recipe.run.seed, workers=recipe.run.workers, tell=waits)
            with loader, torch.no_grad():
                found = task.evaluate(model, samples, batches(loader))
        except Exception as exc:
            if is_out_of_memory(exc):
                raise OutOfMemory(str(exc)) from exc
            raise
        return found, tuple(bad)

    was_training = model.training
    model.eval()
    try:
        largest = max(len(request.ids) for request in requests)
        where = str(recipe.path("data", "valid"))
        return until_it_fits(once, split, largest=largest, what="the evaluation", where=where, tell=tell)
    finally:
        model.train(was_training)


def scores(recipe: Recipe, history: Sequence[Mapping[str, float]]) -> dict[int, float]:
    """Each evaluation's step -> its figure by `run.checkpoint.best`, negated where the larger is the better; empty
    where the recipe names none."""
    settings = recipe.run.checkpoint
    if settings.best is None:
        return {}
    larger = settings.mode == "max" or (settings.mode == "auto" and "acc" in settings.best)
    return {int(row["step"]): -row[settings.best] if larger else row[settings.best] for row in history}


def best_step(recipe: Recipe, history: Sequence[Mapping[str, float]]) -> int | None:
    """The step of the best evaluation so far by `run.checkpoint.best`; the later of equals, as retention keeps it."""
    found = scores(recipe, history)
    return min(found, key=lambda step: (found[step], -step)) if found else None
