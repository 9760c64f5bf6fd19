"""Two processes over gloo: what a plan does where a hand-written freeze goes wrong under DistributedDataParallel.

Run as `python ddp_cases.py RANK STORE`; rank 0 prints one JSON object. A program, not a test: test_failure_modes.py
starts it, once for all cases.
"""

from __future__ import annotations

import json
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from thawline.errors import RecipeError
from thawline.freeze import doctor
from thawline.freeze.plan import FreezePlan


class Net(nn.Module):
    def __init__(self, use_b: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.bn = nn.BatchNorm1d(4)
        self.use_b = use_b

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.bn(self.a(x))
        return self.c(self.b(h) if self.use_b else h)


def diverged(model: nn.Module) -> list[str]:
    """Names of the tensors that differ between the ranks."""
    found = []
    for name, tensor in model.state_dict().items():
        other = tensor.detach().clone()
        dist.broadcast(other, 0)
        differs = torch.tensor(float(not torch.equal(other, tensor)))
        dist.all_reduce(differs)
        if differs:
            found.append(name)
    return found


def run(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: int = 2) -> None:
    model.train()
    for i in range(steps):
        torch.manual_seed(100 * rank + i)
        optimizer.zero_grad()
        model(torch.randn(6, 4) + rank).square().sum().backward()
        optimizer.step()


def thaw_and_freeze_with_wrap(rank: int) -> dict[str, object]:
    model = Net()
    thaw = [{"after": "1 epoch", "train": "a"}, {"after": "2 epochs", "freeze": ["a", "c"], "train": "b"}]
    frozen = FreezePlan(train="c", thaw=thaw).apply(model)
    optimizer = frozen.optimizer(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    wrapped = frozen.wrap(DistributedDataParallel)
    run(wrapped, optimizer, rank)
    moved = []
    for epoch in (1, 2):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        frozen.advance(epoch=epoch)
        run(frozen.wrapped, optimizer, rank)
        moved.append(sorted({n[0] for n, p in model.named_parameters() if not torch.equal(p, before[n])}))
    return {"diverged": diverged(model), "moved": moved, "broken": frozen.audit().broken}


def thaw_without_wrap_is_refused(rank: int) -> dict[str, object]:
    model = Net()
    frozen = FreezePlan(train="c", thaw=[{"after": "1 epoch", "train": "a"}]).apply(model)
    DistributedDataParallel(model)
    try:
        frozen.advance(epoch=1)
    except RecipeError as error:
        return {"error": error.what, "phase": frozen.phase, "a": model.a.weight.requires_grad}
    return {"error": ""}


def unused_but_frozen(rank: int) -> dict[str, object]:
    model = Net(use_b=False)
    frozen = FreezePlan(train=["a", "c"]).apply(model)
    run(frozen.wrap(DistributedDataParallel), frozen.optimizer(torch.optim.SGD, lr=0.1), rank)
    return {"diverged": diverged(model)}


def unused_trainables_are_named(rank: int) -> dict[str, object]:
    model = Net(use_b=False)
    frozen = FreezePlan(train=["b", "c"]).apply(model)
    with doctor.watch(model, frozen.resolution) as seen:
        model.train()(torch.randn(6, 4)).sum().backward()
    found = {f.code: list(f.names) for f in doctor.after_first_step(model, frozen.resolution, seen)}
    return {"found": found}


def pinned_statistics_agree_between_ranks(rank: int) -> dict[str, object]:
    model = Net()
    frozen = FreezePlan(train="c").apply(model)
    wrapped = frozen.wrap(lambda m: DistributedDataParallel(m, broadcast_buffers=False))
    run(wrapped, frozen.optimizer(torch.optim.SGD, lr=0.1), rank, 3)
    return {"diverged": diverged(model), "broken": frozen.audit().broken}


CASES = (
    thaw_and_freeze_with_wrap,
    thaw_without_wrap_is_refused,
    unused_but_frozen,
    unused_trainables_are_named,
    pinned_statistics_agree_between_ranks,
)


def main(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results = {case.__name__: case(rank) for case in CASES}
    if rank == 0:
        print(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()
    # gloo's threads now and then abort the interpreter's own way out; everything there is to say has been said.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
