"""A finished model over a data set, outside any run: every sample once, in order, what cannot be read counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from thawline.data.loader import BatchRequest, Loader
from thawline.data.sampler import Batching, BatchPlan, Cursor
from thawline.train.task import Evaluation, Samples


def evaluate_samples(
    samples: Samples,
    judge: Callable[[Iterator[Any]], Evaluation],
    *,
    batch_size: int,
    workers: int = 0,
    limit: int | None = None,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """What `judge` makes of the batches, with the number of samples that could not be read as `unreadable`.

    limit: only the first so many samples
    """
    count = len(samples) if limit is None else min(limit, len(samples))
    plan = BatchPlan(count, seed=0, batching=Batching(size=batch_size), length=samples.length, shuffle=False)
    unreadable = 0

    def batches() -> Iterator[Any]:
        nonlocal unreadable
        requests = (BatchRequest(epoch=0, cursor=c, ids=ids) for c, ids in plan.batches(Cursor()))
        loader: Loader[Any, Any]
        with Loader(samples, seed=0, workers=workers) as loader:
            for loaded in loader.iterate(requests):
                unreadable += len(loaded.bad)
                if loaded.batch is not None:
                    yield loaded.batch.to(device)

    with torch.inference_mode():
        result = judge(batches())
    return Evaluation({**result.metrics, "unreadable": float(unreadable)}, result.rows)
