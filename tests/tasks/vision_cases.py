"""Small classifiers and small images: four classes that are told apart by colour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from thawline.tasks.runs import train
from thawline.train.loop import Run

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40), "yellow": (210, 200, 40)}


class TinyNet(nn.Module):
    """Two convolutions with BatchNorm, dropout, and a head."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.layer = nn.Sequential(nn.Conv2d(width, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        y: Tensor = self.head(self.drop(self.layer(self.stem(images)).mean((-2, -1))))
        return y


def tiny(classes: int = 6, width: int = 8) -> TinyNet:
    return TinyNet(classes, width)


def not_a_network() -> int:
    return 3


def write_folder(folder: Path, *, each: int = 10, side: int = 12, names: Sequence[str] = tuple(COLOURS)) -> Path:
    """DIR/CLASS/n.png: noisy squares of each class's colour."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        chance = np.random.RandomState(number)
        for i in range(each):
            noise = chance.randint(-30, 31, (side, side + i % 3, 3))
            pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02}.png")
    return folder


def write_base(folder: Path) -> Path:
    """A weights file of `tiny`, with BatchNorm statistics that are not the ones at birth."""
    torch.manual_seed(0)
    model = tiny()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(100)
    save_file(model.state_dict(), folder / "base.safetensors")
    return folder / "base.safetensors"


RECIPE = """\
task: vision
model: base.safetensors
data:
  train: train
  valid: valid
  batch: {size: 8}
  conf: {size: 10, augment: {scale: [0.6, 1.0]}}
plan:
  train: [head]
  norms: pinned
  thaw:
    - {after: 2 epochs, train: [layer], lr: 0.1}
optim: {name: adamw, lr: 2e-2, schedule: {name: cosine, warmup: 3 steps}}
run: {epochs: 4, seed: 5, workers: 0, checkpoint: {every: 3 steps, keep: 2, best: valid/accuracy}}
options:
  head: replace
  model_fn: tests.tasks.vision_cases:tiny
"""


def write_case(folder: Path, recipe: str = RECIPE) -> Path:
    """Base, images and recipe in `folder`; the recipe's path."""
    write_base(folder)
    write_folder(folder / "train")
    write_folder(folder / "valid", each=4)
    (folder / "tiny.yaml").write_text(recipe)
    return folder / "tiny.yaml"


def run_case(folder: Path, name: str = "run", overrides: Any = ()) -> Run:
    return train(folder / "tiny.yaml", overrides, run=folder / name)
