"""Head-only and head-then-thaw fine-tuning: Thawline beside a plain PyTorch loop on the same batches, in one run.

    python benchmarks/bench_vision.py [--epochs 2] [--images 256] [--size 64]

The plain loop is what one would write by hand: set requires_grad, hold the frozen BatchNorm in eval mode, fused AdamW
over what trains, cosine rate, clipping. It reads the same batches through the same loader and seeds torch before each
step as Thawline does, so that dropout and augmentation are equal; then the losses must be equal to the last bit, and
are checked to be. Thawline's time includes what the plain loop does not do: checkpoints, and the proof that what is
frozen did not change. The images are made on the spot; the network is EfficientNet-lite0 with random weights (speed
does not depend on them). The result is written to benchmarks/results/vision.md.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from thawline.core.rng import derive
from thawline.data.loader import BatchRequest, Loader
from thawline.data.sampler import BatchPlan, Cursor
from thawline.models.vision import efficientnet_lite
from thawline.tasks.runs import train
from thawline.tasks.vision import VisionTask
from thawline.train.monitor import SilentMonitor
from thawline.train.recipe import Recipe, read_recipe
from thawline.train.rundir import read_rows
from thawline.train.schedule import lr_factor
from thawline.train.seeding import seed_all

RECIPE = """\
task: vision
model: base.safetensors
data: {{train: images.npz, batch: {{size: 32}}, conf: {{size: {size}}}}}
plan:
  train: [_fc]
  norms: pinned
{thaw}optim: {{name: adamw, lr: 1e-3, schedule: {{name: cosine, warmup: 2 steps}}}}
run: {{epochs: {epochs}, seed: 7, workers: 0}}
options: {{head: replace}}
"""
THAW = '  thaw: [{after: 1 epoch, train: ["_blocks[-2:]", _conv_head, _bn1], lr: 0.1}]\n'
THAWED = ("_blocks.14.", "_blocks.15.", "_conv_head.", "_bn1.")


class Timed(SilentMonitor):
    """Notes when the first step began to be prepared and when the last was done."""

    begun = 0.0

    def begin(self, *, step: int, total_steps: int) -> None:
        self.begun = time.perf_counter()


def write_case(folder: Path, images: int, side: int = 48) -> None:
    """A base with random weights, and random images of ten classes."""
    torch.manual_seed(0)
    save_file(efficientnet_lite.build("efficientnet-lite0").state_dict(), folder / "base.safetensors")
    chance = np.random.RandomState(0)
    pixels = chance.randint(0, 256, (images, side, side, 3)).astype(np.uint8)
    np.savez(folder / "images.npz", images=pixels, labels=np.arange(images) % 10)


def plain_loop(recipe: Recipe, *, thaw_at: int | None) -> tuple[list[float], float]:
    """The loss of every step and the seconds that all of them took, without Thawline's loop, plan or engine."""
    task = VisionTask()
    model = task.build(recipe)
    samples = task.samples(recipe, model, "train")
    size = recipe.data.batch.size
    assert size is not None
    seed, epochs = recipe.run.seed, recipe.run.epochs
    plan = BatchPlan(len(samples), seed=seed, batching=recipe.data.batch, length=samples.length)
    per_epoch = plan.batches_in_epoch(0)
    losses: list[float] = []
    begin = time.perf_counter()
    optimizer: torch.optim.Optimizer | None = None
    with Loader[Any, Any](samples, seed=seed) as loader:
        for epoch in range(epochs):
            if epoch == 0 or epoch == thaw_at:
                optimizer = _optimizer(model, optimizer, thawed=epoch == thaw_at, lr=recipe.optim.lr)
            assert optimizer is not None
            requests: Iterator[BatchRequest] = (
                BatchRequest(epoch=epoch, cursor=cursor, ids=ids) for cursor, ids in plan.batches(Cursor(epoch))
            )
            for loaded in loader.iterate(requests):
                batch = loaded.batch
                factor = lr_factor(
                    recipe.optim.schedule, len(losses), total_steps=per_epoch * epochs, steps_per_epoch=per_epoch
                )
                for group in optimizer.param_groups:
                    group["lr"] = recipe.optim.lr * group["share"] * factor
                seed_all(derive(seed, "step", len(losses), 0))
                loss = F.cross_entropy(model(batch.images), batch.labels, reduction="sum") / len(batch.keys)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
                optimizer.step()
                losses.append(loss.item())
    return losses, time.perf_counter() - begin


def _optimizer(
    model: nn.Module, before: torch.optim.Optimizer | None, *, thawed: bool, lr: float
) -> torch.optim.Optimizer:
    """AdamW over the head, or over the head and the thawed blocks at a tenth; the head's moments go on."""
    names = dict(model.named_parameters())
    body = [p for n, p in names.items() if thawed and n.startswith(THAWED)]
    head = [p for n, p in names.items() if n.startswith("_fc.")]
    for param in names.values():
        param.requires_grad_(False)
    for param in [*body, *head]:
        param.requires_grad_(True)
    model.eval()
    for name, module in model.named_modules():
        module.training = name == "" or f"{name}.".startswith(("_fc.", "_dropout.", *(THAWED if thawed else ())))
    # In the model's order, as Thawline has them: the norm that clips is a sum over them.
    groups = ([{"params": body, "share": 0.1}] if body else []) + [{"params": head, "share": 1.0}]
    made = torch.optim.AdamW(groups, lr=lr, weight_decay=0.01, fused=True)
    if before is not None:
        for param, state in before.state.items():
            made.state[param] = state
    return made


def compare(folder: Path, name: str, text: str, *, thaw_at: int | None) -> dict[str, Any]:
    """Both ways over one recipe, by turns so that a busy machine is busy for both; the faster of two times counts."""
    (folder / f"{name}.yaml").write_text(text)
    recipe = read_recipe(folder / f"{name}.yaml")
    theirs_s = ours_s = float("inf")
    equal = True
    for turn in range(2):
        theirs, seconds = plain_loop(recipe, thaw_at=thaw_at)
        theirs_s = min(theirs_s, seconds)
        clock = Timed()
        run = train(folder / f"{name}.yaml", run=folder / f"{name}-{turn}", monitor=clock)
        ours_s = min(ours_s, time.perf_counter() - clock.begun)
        ours = [row["loss"] for row in read_rows(run.dir / "metrics.jsonl") if "loss" in row]
        equal = equal and ours == theirs
    return {
        "name": name,
        "steps": len(theirs),
        "plain": theirs_s,
        "thawline": ours_s,
        "equal": equal,
        "last": theirs[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_case(folder, given.images)
        rows = [
            compare(
                folder,
                name,
                RECIPE.format(size=given.size, epochs=given.epochs, thaw=thaw),
                thaw_at=1 if thaw else None,
            )
            for name, thaw in (("head only", ""), ("head, then thaw", THAW))
        ]
    command = f"python benchmarks/bench_vision.py --epochs {given.epochs} --images {given.images} --size {given.size}"
    lines = [
        "# Fine-tuning a classifier beside a plain loop",
        "",
        f"`{command}`, {platform.machine()}, {given.threads} thread(s), torch {torch.__version__}:",
        "EfficientNet-lite0 on the CPU, batches of 32, the faster of two turns.",
        "",
        "| plan | steps | plain loop, s | Thawline, s | ratio | losses equal bit for bit | last loss |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['name']} | {r['steps']} | {r['plain']:.2f} | {r['thawline']:.2f} | {r['thawline'] / r['plain']:.2f} | "
        f"{'yes' if r['equal'] else 'NO'} | {r['last']:.6f} |"
        for r in rows
    ]
    lines += [
        "",
        "Thawline's time includes its checkpoints, its audits and the export; the plain loop does none of them.",
        "Building the model is counted for neither. On a shared machine, differences below a fifth say nothing.",
    ]
    text = "\n".join(lines) + "\n"
    target = Path(__file__).parent / "results" / "vision.md"
    target.parent.mkdir(exist_ok=True)
    target.write_text(text)
    print(text)
    if not all(r["equal"] for r in rows):
        raise SystemExit("the losses differ")


if __name__ == "__main__":
    main()
