"""A first recipe for an image classifier, with a comment on every key that people change."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from torch import nn

from thawline.core.config import scalar_text
from thawline.errors import CheckpointError
from thawline.tasks.vision_home import VisionHome, describes, find_head_of

_LAYER = re.compile(r"^(.*?)\.\d+\.")

_TEMPLATE = """\
# thawline plan {name}     shows what this would train, and which rows of the head are kept
# thawline train {name}    trains it; the same command goes on after a stop
task: vision
model: {model}             # a directory, a weights file, a run, timm:NAME or torchvision:NAME
data:
  train: {train}           # one folder a class (DIR/CLASS/x.jpg), a .csv with path,label, or arrays (.npz ...)
  valid: {valid}
  batch: {{size: 32}}        # images a step (or of each of run.accumulate parts of it)
  conf:
    size: {size}             # pixels a side; smaller is faster
    augment: {{scale: [0.5, 1.0], flip: 0.5, jitter: 0.2}}   # null: none; kornia: [...] adds its classes
plan:
  train: [{head}]          # the head; everything else is frozen, and proved to be
  norms: pinned            # frozen BatchNorm keeps its statistics; tracking lets them adapt, groupnorm replaces it
  # lr: {{"{layers}": 0.1}}   # multiples of optim.lr
  # thaw:                  # what trains from later on
  #   - {{after: 5 epochs, train: ["{layers}[-1]", "!@norm"], lr: 0.1}}
  #   - {{when: "plateau(valid/accuracy, patience=2)", train: ["**"], lr: 0.01}}
optim:
  name: adamw
  lr: 1.0e-3               # a tenth of it where the whole network trains
  weight_decay: 0.01
  clip: 1.0                # largest norm of the gradient; null leaves it alone
  schedule: {{name: cosine, warmup: 20 steps}}
run:
  epochs: 8
  seed: 7
  precision: fp32          # bf16 on a GPU
  accumulate: 1            # micro-batches a step
  workers: 2               # loader processes; change nothing but speed
  checkpoint: {{every: 500 steps, keep: 2, best: valid/accuracy}}
options:
  head: replace            # replace: the head gets the classes of data.train; keep: they must be the model's own
  label_smoothing: 0.0
"""


def is_classifier(model: Path) -> bool:
    """Whether an image classifier lies at `model`; the names of tensors may tell."""
    if model.is_dir() and describes(model):
        return True
    try:
        VisionHome.of(model)
    except CheckpointError:
        return False
    return True


def vision_recipe(model: Path, *, train: str, valid: str, name: str) -> str:
    """The text of a recipe that fits a new head to the classifier at `model`; train, valid and name stand in it as they
    are given. Raises CheckpointError for a damaged one."""
    home = VisionHome.of(model)
    network = home.load()
    home = find_head_of(home, network, "")
    return _TEMPLATE.format(
        name=name,
        model=scalar_text(model),
        train=train,
        valid=valid,
        size=home.input.size,
        head=scalar_text(home.head),
        layers=_layer_list(network),
    )


def _layer_list(network: nn.Module) -> str:
    """The list of layers that holds most tensors, of those nearest to the surface."""
    found = Counter(match[1] for name, _ in network.named_parameters() if (match := _LAYER.match(name)))
    return found.most_common(1)[0][0] if found else "**"
