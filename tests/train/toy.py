"""A task small enough to train hundreds of times: points on a line in noise, a net with BatchNorm and dropout."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from thawline.errors import DataError
from thawline.train.recipe import Recipe
from thawline.train.task import Evaluation, PlainSums, SumTerm


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x))
        return y


@dataclass
class ToyBatch:
    keys: tuple[str, ...]
    x: Tensor
    y: Tensor

    def rows(self, start: int, stop: int) -> ToyBatch:
        return ToyBatch(self.keys[start:stop], self.x[start:stop], self.y[start:stop])

    def to(self, device: Any) -> ToyBatch:
        return ToyBatch(self.keys, self.x.to(device), self.y.to(device))


class Points:
    """`n` points; those in `bad` cannot be read. Each is shaken by all three global generators, as user code may."""

    def __init__(self, n: int, *, noisy: bool, bad: tuple[int, ...] = (), poison: tuple[int, ...] = ()) -> None:
        self.n, self.noisy, self.bad, self.poison = n, noisy, bad, poison

    def __len__(self) -> int:
        return self.n

    def read(self, id: int, epoch: int) -> tuple[str, Tensor, Tensor]:
        if id in self.bad:
            raise DataError("cannot be read", where=f"point {id}")
        x = torch.from_numpy(np.random.RandomState(id).randn(6).astype("float32"))
        y = x.sum() * 0.5
        if self.noisy:
            x = x + 0.05 * torch.randn(6) + 0.05 * float(np.random.rand()) + 0.05 * random.random()
        if id in self.poison:
            y = y * float("nan")
        return f"p{id}", x, y

    def key(self, id: int) -> str:
        return f"p{id}"

    @property
    def left_out(self) -> tuple[()]:
        return ()

    def collate(self, samples: Sequence[tuple[str, Tensor, Tensor]]) -> ToyBatch:
        keys, xs, ys = zip(*samples, strict=True)
        return ToyBatch(keys, torch.stack(xs), torch.stack(ys))

    def length(self, id: int) -> float:
        return float(id % 7 + 1)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.n}".encode()).hexdigest()


class ToyTask:
    """The task `toy`; `n`, `bad` and `poison` come from the recipe's options."""

    name = "toy"

    def build(self, recipe: Recipe) -> nn.Module:
        model = Net()
        if recipe.init == "pretrained":
            model.load_state_dict(load_file(recipe.path("model") / "weights.safetensors"))
        return model

    def samples(self, recipe: Recipe, model: nn.Module, split: str) -> Points:
        options = recipe.options
        if split == "valid":
            return Points(10, noisy=False)
        return Points(
            options.get("n", 50),
            noisy=True,
            bad=tuple(options.get("bad", ())),
            poison=tuple(options.get("poison", ())),
        )

    def weights(self, model: nn.Module, batch: ToyBatch) -> Mapping[str, float]:
        return {"points": float(len(batch.y))}

    def loss(self, model: nn.Module, batch: ToyBatch) -> PlainSums:
        error = (model(batch.x).squeeze(-1) - batch.y).square().sum()
        return PlainSums({"square": SumTerm(error, "points")}, {})

    def evaluate(self, model: nn.Module, samples: Any, batches: Iterator[ToyBatch]) -> Evaluation:
        total, count = 0.0, 0
        for batch in batches:
            total += float((model(batch.x).squeeze(-1) - batch.y).square().sum())
            count += len(batch.y)
        random.random(), torch.rand(3), np.random.rand()  # a spoiler: evaluation draws from the global generators
        return Evaluation({"loss": total / count})

    def export(self, model: nn.Module, folder: Path) -> None:
        save_file(model.state_dict(), folder / "weights.safetensors")


def write_base(folder: Path) -> Path:
    """A base model on disk."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(Net().state_dict(), folder / "weights.safetensors")
    return folder


RECIPE = """\
task: toy
model: base
data: {train: nothing, valid: nothing, batch: {size: 4}}
plan:
  train: [head]
  norms: pinned
  thaw:
    - {after: 1 epochs, train: ["body.0"], lr: 0.1}
optim: {name: adamw, lr: 1e-2, schedule: {name: cosine, warmup: 5 steps}}
run: {epochs: 3, seed: 3, workers: 0, accumulate: 2, checkpoint: {every: 3 steps, keep: 2, best: valid/loss}}
"""


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    write_base(folder / "base")
    path = folder / "toy.yaml"
    path.write_text(text)
    return path
