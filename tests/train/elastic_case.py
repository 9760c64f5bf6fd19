"""A few steps of the toy task taken by several ranks: one process and thread at a time, or processes under gloo.

Run as a program, this is one rank: `python -m tests.train.elastic_case RANK WORLD COUNT STORE` prints its digest.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tests.train.toy import Net, Points, ToyTask
from torch import Tensor, nn

from thawline.core.digest import digest_tensor
from thawline.data.loader import Loader
from thawline.data.sampler import Batching, BatchPlan, Cursor
from thawline.freeze.apply import apply_
from thawline.freeze.plan import FreezePlan
from thawline.train.engine import Engine, Rate
from thawline.train.law import shape_
from thawline.train.microbatch import planned_steps
from thawline.train.recipe import OptimSettings
from thawline.train.step import train_step

T = TypeVar("T")
SAMPLES, GLOBAL_BATCH, SEED = 130, 60, 5
"""Two steps of 60 rows, which 8 micro-batches share unevenly, and one of 10 rows, which leaves micro-batches empty."""
EVERYTHING = ("**",)  # in two steps: BatchNorm in training refuses a micro-batch of one row
ALL_BUT_NORM = ("**", "!body.1")


class Circle:
    """Ranks as threads of which one runs at a time: each has its turn from one `gather` to the next."""

    def __init__(self, world: int) -> None:
        self.world, self.turn, self.rounds = world, 0, 0
        self.values: dict[tuple[int, int], Any] = {}
        self.moved = threading.Condition()

    @contextmanager
    def turns_of(self, rank: int) -> Iterator[None]:
        self._wait(rank)
        try:
            yield
        finally:
            self._pass_on()

    def gather(self, rank: int, round_: int, value: T) -> list[T]:
        self.values[rank, round_] = value
        self._pass_on()
        self._wait(rank)
        return [copy.deepcopy(self.values[r, round_]) for r in range(self.world)]

    def _wait(self, rank: int) -> None:
        with self.moved:
            assert self.moved.wait_for(lambda: self.turn == rank, timeout=60)

    def _pass_on(self) -> None:
        with self.moved:
            self.turn = (self.turn + 1) % self.world
            self.moved.notify_all()


@dataclass(slots=True)
class Ranked(Engine):
    """An engine of one rank; `exchange` is given the number of the gather and the value."""

    exchange: Callable[[int, Any], list[Any]] = field(kw_only=True)
    gathers: int = field(init=False, default=0)

    def gather(self, value: T) -> list[T]:
        self.gathers += 1
        return self.exchange(self.gathers, value)


def rank_steps(
    rank: int,
    world: int,
    count: int,
    exchange: Callable[[int, Any], list[Any]],
    *,
    train: tuple[str, ...] = EVERYTHING,
    split: int = 1,
    elastic: bool = True,
    dropout: bool = True,
) -> dict[str, Tensor]:
    """Weights, statistics, moments and losses after some steps of one rank."""
    torch.manual_seed(0)
    model = Net()
    if not dropout:
        model.body[3] = nn.Identity()
    resolution = shape_(model, FreezePlan(train=train), seed=SEED)[0]
    apply_(model, resolution)
    optim = OptimSettings(lr=0.05)
    engine = Ranked(model, resolution, optim, torch.device("cpu"), "fp32", rank, world, exchange=exchange)
    samples = Points(SAMPLES, noisy=True)
    plan = BatchPlan(SAMPLES, seed=SEED, batching=Batching(size=GLOBAL_BATCH), length=samples.length)
    losses = []
    with Loader(samples, seed=SEED) as loader:
        steps = planned_steps(plan, Cursor(), 1, count, rank, world)
        for number, planned in enumerate(islice(steps, 2) if train == EVERYTHING else steps):
            loaded = loader.iterate(planned.requests.values())
            batches = {n: b.batch for n, b in zip(planned.requests, loaded, strict=True)}
            result = train_step(
                engine,
                ToyTask(),
                batches,
                seed=SEED,
                step=number,
                rate=Rate(1.0),
                split=split,
                elastic=count if elastic else None,
            )
            losses.append(result.loss)
    return {**model.state_dict(), **engine.optimizer_state(), "losses": torch.tensor(losses, dtype=torch.float64)}


def digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: digest_tensor(tensor) for name, tensor in tensors.items()}


def alone(number: int, value: Any) -> list[Any]:
    """The exchange of a world of one."""
    return [value]


def simulated(world: int, count: int, **options: Any) -> list[dict[str, Tensor]]:
    """What every rank of `world` ends with, all in this process."""
    circle = Circle(world)
    ends: dict[int, dict[str, Tensor]] = {}

    def one(rank: int) -> None:
        with circle.turns_of(rank):
            exchange = lambda number, value: circle.gather(rank, number, value)  # noqa: E731
            ends[rank] = rank_steps(rank, world, count, exchange, **options)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [ends[rank] for rank in range(world)]


def main() -> None:
    rank, world, count = map(int, sys.argv[1:4])
    store = dist.FileStore(sys.argv[4], world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)

    def exchange(number: int, value: Any) -> list[Any]:
        every: list[Any] = [None] * world
        dist.all_gather_object(every, value)
        return every

    ends = digests(rank_steps(rank, world, count, exchange))
    dist.barrier()
    print(json.dumps(ends), flush=True)
    os._exit(0)  # gloo's threads abort now and then when the interpreter ends


if __name__ == "__main__":
    main()
