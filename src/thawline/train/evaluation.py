"""Scoring held-back samples while a run goes on, and which of the scores is the best so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from thawline.data.loader import BadSample, BatchRequest, Loader
from thawline.data.sampler import Batching, BatchPlan, Cursor
from thawline.train.recipe import Recipe
from thawline.train.task import Samples, Task


def evaluate(
    task: Task, model: nn.Module, samples: Samples, recipe: Recipe, device: torch.device
) -> tuple[Mapping[str, float], tuple[BadSample, ...]]:
    """Metrics of `model` on `samples`, in their own order, in eval mode, without gradients; and the unreadable ones."""
    batching = recipe.data.batch
    if batching.bucket_boundaries:
        batching = Batching(size=max(batching.bucket_sizes))
    plan = BatchPlan(len(samples), seed=recipe.run.seed, batching=batching, length=samples.length, shuffle=False)
    requests = (BatchRequest(epoch=0, cursor=cursor, ids=ids) for cursor, ids in plan.batches(Cursor()))
    bad: list[BadSample] = []

    def batches(loader: Loader[Any, Any]) -> Iterator[Any]:
        for loaded in loader.iterate(requests):
            bad.extend(loaded.bad)
            if loaded.batch is not None:
                yield loaded.batch.to(device)

    was_training = model.training
    model.eval()
    try:
        with Loader(samples, seed=recipe.run.seed, workers=recipe.run.workers) as loader, torch.no_grad():
            metrics = task.evaluate(model, samples, batches(loader)).metrics
    finally:
        model.train(was_training)
    return metrics, tuple(bad)


def better_sign(recipe: Recipe) -> int:
    """1 where a smaller value of `run.checkpoint.best` is better, -1 where a larger one is."""
    settings = recipe.run.checkpoint
    larger = settings.mode == "max" or (settings.mode == "auto" and "acc" in (settings.best or ""))
    return -1 if larger else 1


def best_step(recipe: Recipe, history: Sequence[Mapping[str, float]]) -> int | None:
    """The step of the best evaluation so far by `run.checkpoint.best`; the later of equals, as retention keeps it."""
    best = recipe.run.checkpoint.best
    if best is None or not history:
        return None
    sign = better_sign(recipe)
    return int(min(history, key=lambda row: (sign * row[best], -row["step"]))["step"])
