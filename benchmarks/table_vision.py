"""The table of docs/vision.md: every vision recipe as it is shipped, and the BatchNorm policies, side by side.

    python benchmarks/table_vision.py runs/vision_table

What is finished there is not run again. Needs ../shared (weights and images); an hour and a half on an idle core.
"""

from __future__ import annotations

import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from thawline.tasks.runs import train
from thawline.tasks.vision_classifier import Classifier
from thawline.train.rundir import read_rows

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: the recipe, what is different from it, and what it is to show."""

    recipe: str
    what: str
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "-".join([self.recipe, *(re.sub(r"[^\w.=-]+", "_", o) for o in self.overrides)])


SMALL = ("data.batch.size=4", "optim.lr=1e-3")

ROWS = (
    Row("vision_head", "head only, BatchNorm pinned"),
    Row("vision_head", "head only, BatchNorm tracking", ("plan.norms=tracking",)),
    Row("vision_head", "head only, GroupNorm in place of BatchNorm", ("plan.norms=groupnorm",)),
    Row("vision_thaw", "head, the last blocks at 0.1 from epoch 5, BatchNorm pinned"),
    Row(
        "vision_thaw",
        "the same, BatchNorm of those blocks trains too",
        ('plan.thaw.0.train=["_blocks[-4:]", _conv_head]',),
    ),
    Row("vision_full", "everything at one rate"),
    Row("vision_full", "everything but BatchNorm, pinned", ('plan.train=["**", "!@norm"]',)),
    Row("vision_layerwise", "everything, 0.8 of the rate a block down"),
    Row("vision_plateau", "head, the last blocks at a plateau, BatchNorm pinned"),
    Row("vision_full", "everything, from random weights", ("init=random", "model=efficientnet-lite0")),
    Row("vision_head", "head only, tracking, batches of 4", ("plan.norms=tracking", *SMALL)),
    Row("vision_head", "head only, pinned, batches of 4", SMALL),
)


def measured(row: Row, folder: Path) -> dict[str, float]:
    """Train the row (or take what an earlier call left) and score its last and best state."""
    note = folder / f"{row.name}.json"
    if note.exists():
        known: dict[str, float] = json.loads(note.read_text())
        return known
    begin = time.perf_counter()
    run = train(ROOT / "recipes" / f"{row.recipe}.yaml", list(row.overrides), run=folder / row.name)
    seconds = time.perf_counter() - begin
    history = [r for r in read_rows(run.dir / "metrics.jsonl") if "valid/accuracy" in r]
    best = max(history, key=lambda r: r["valid/accuracy"])
    learned = Classifier.open(run.dir).evaluate(ROOT.parent / "shared/data/cifar10-subset/train", workers=1)
    made = {
        "best": best["valid/accuracy"],
        "best_epoch": best["epoch"],
        "last": history[-1]["valid/accuracy"],
        "last_loss": history[-1]["valid/loss"],
        "train": learned.metrics["accuracy"],
        "seconds": seconds,
    }
    note.write_text(json.dumps(made))
    return made


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/vision_table")
    folder.mkdir(parents=True, exist_ok=True)
    print("| run | best valid | at epoch | last valid | last valid loss | train (best) | gap | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for row in ROWS:
        m = measured(row, folder)
        print(
            f"| {row.what} | {m['best']:.3f} | {m['best_epoch']:.0f} | {m['last']:.3f} | {m['last_loss']:.2f} "
            f"| {m['train']:.3f} | {m['train'] - m['best']:.3f} | {m['seconds']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
