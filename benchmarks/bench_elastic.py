"""What bits that do not depend on the world size cost: the tree of sums beside plain accumulation, in one run.

    python benchmarks/bench_elastic.py [--width 512] [--rounds 5] [--out benchmarks/results/elastic.md]

The same step (a transformer encoder, its micro-batches, one update of AdamW) is taken both ways in turn, and the ratio
of each round's times is what counts. Memory is the highest resident size of a process that takes two such steps.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thawline.freeze.apply import apply_
from thawline.freeze.plan import FreezePlan
from thawline.train.engine import Engine, Rate
from thawline.train.law import shape_
from thawline.train.microbatch import roots
from thawline.train.recipe import OptimSettings
from thawline.train.step import train_step
from thawline.train.task import PlainSums, SumTerm

COUNTS = (2, 4, 8, 16)
ROWS = (1, 4)  # of a micro-batch: the fewer, the more the sums weigh
FRAMES = 64


@dataclass
class Frames:
    """Random vectors (rows, FRAMES, width)."""

    keys: tuple[str, ...]
    x: Tensor

    def to(self, device: Any) -> Frames:
        return self

    def rows(self, start: int, stop: int) -> Frames:
        return Frames(self.keys[start:stop], self.x[start:stop])


class Squares:
    """The mean square of the encoder's output."""

    name = "squares"

    def weights(self, model: nn.Module, batch: Frames) -> dict[str, float]:
        return {"rows": float(len(batch.keys))}

    def loss(self, model: nn.Module, batch: Frames) -> PlainSums:
        return PlainSums({"square": SumTerm(model(batch.x).square().mean((1, 2)).sum(), "rows")}, {})


def engine_of(width: int) -> Engine:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.1, batch_first=True)
    model = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    resolution = shape_(model, FreezePlan(train=("**",)), seed=0)[0]
    apply_(model, resolution)
    return Engine(model, resolution, OptimSettings(), torch.device("cpu"), "fp32")


def batches_of(count: int, rows: int, width: int) -> dict[int, Frames]:
    return {n: Frames(tuple(map(str, range(rows))), torch.randn(rows, FRAMES, width)) for n in range(count)}


def take(engine: Engine, batches: dict[int, Frames], *, elastic: bool) -> float:
    """Seconds of one step."""
    began = time.perf_counter()
    train_step(
        engine,
        Squares(),  # type: ignore[arg-type]  # a step needs no more of a task
        batches,
        seed=0,
        step=0,
        rate=Rate(1.0),
        elastic=len(batches) if elastic else None,
    )
    return time.perf_counter() - began


def ratios(count: int, rows: int, width: int, rounds: int) -> tuple[float, float]:
    """Median seconds of a plain step, and the median over rounds of elastic / plain."""
    engine, batches = engine_of(width), batches_of(count, rows, width)
    for elastic in (False, True):
        take(engine, batches, elastic=elastic)
    pairs = []
    for turn in range(rounds):
        order = (False, True) if turn % 2 else (True, False)
        taken = {elastic: take(engine, batches, elastic=elastic) for elastic in order}
        pairs.append((taken[False], taken[True]))
    return statistics.median(p for p, _ in pairs), statistics.median(e / p for p, e in pairs)


def peak_mb(count: int, width: int, *, elastic: bool) -> float:
    """The highest resident size of a process of its own that takes two steps of one row a micro-batch."""
    program = [sys.executable, __file__, "--peak", str(count), str(width), str(int(elastic))]
    return float(subprocess.run(program, capture_output=True, text=True, check=True).stdout)


def print_peak(count: int, width: int, elastic: bool) -> None:
    engine, batches = engine_of(width), batches_of(count, 1, width)
    for _ in range(2):
        take(engine, batches, elastic=elastic)
    # Not ru_maxrss, which a process inherits from the one that started it.
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) * 1024 / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "elastic.md")
    parser.add_argument("--peak", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        count, width, elastic = options.peak
        print_peak(count, width, bool(elastic))
        return
    gradient_mb = sum(p.numel() for p in engine_of(options.width).trainables.values()) * 4 / 1e6
    about = (
        f"Six transformer layers of width {options.width} ({gradient_mb:.0f} MB of gradients), {FRAMES} frames a row, "
        f"one process with {torch.get_num_threads()} of {os.cpu_count()} cores ({platform.machine()}), torch "
        f"{torch.__version__}. {date.today().isoformat()}; load average {os.getloadavg()[0]:.1f} at the beginning. "
        f"Medians of {options.rounds} rounds, plain and elastic in turn."
    )
    head = ["micro-batches"]
    for rows in ROWS:
        head += [f"plain step, rows each: {rows}", "elastic / plain"]
    lines = [
        "# What bits that do not depend on the world size cost",
        "",
        about,
        "",
        f"Command: `python benchmarks/bench_elastic.py --width {options.width} --rounds {options.rounds}`",
        "",
        "| " + " | ".join([*head, "more memory, in gradients"]) + " |",
        "|---" * (len(head) + 1) + "|",
    ]
    for count in COUNTS:
        cells = [str(count)]
        for rows in ROWS:
            plain, ratio = ratios(count, rows, options.width, options.rounds)
            cells += [f"{plain:.3f} s", f"{ratio:.2f}"]
        more = peak_mb(count, options.width, elastic=True) - peak_mb(count, options.width, elastic=False)
        lines.append("| " + " | ".join([*cells, f"{more / gradient_mb:.1f}"]) + " |")
        print(lines[-1], flush=True)
    lines += [
        "",
        "Sums that each rank sends, for V micro-batches and W ranks (one is a plain all-reduce's share):",
        "",
        "| V | W: sums |",
        "|---|---|",
    ]
    for count in (8, 12, 16, 24):
        worlds = [w for w in range(2, count + 1) if count % w == 0]
        lines.append(f"| {count} | {', '.join(f'{w}: {len(roots(count, 0, w))}' for w in worlds)} |")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
