"""What it costs to begin far inside a corpus, against its beginning. Writes results/position.md.

    python benchmarks/bench_position.py [--rounds 7] [--out benchmarks/results/position.md]
    python benchmarks/bench_position.py first ROWS BATCHING WORKERS EPOCH,WINDOW,BATCH...

The corpus has no files: its rows are numbers, their lengths are computed. Each time is that of a fresh interpreter
until it has the first batch in hand (loader) or has taken its first step (whole run, resumed from a checkpoint). The
rounds take both positions in turn. The second form prints the batches at some positions, the most memory that was held,
and the time; tests/contracts/test_step_law_position.py compares the batches with those met on the way there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from thawline.data.loader import BatchRequest, Loader
from thawline.data.sampler import Batching, BatchPlan, Cursor

FAR = 100_000
BATCHINGS = {"size": Batching(size=8), "frames": Batching(frames=12_000)}
SEED = 7


class Rows:
    """`n` samples that exist nowhere: id and three draws, as augmentation makes them."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.fingerprint = str(n)
        self.left_out = ()

    def __len__(self) -> int:
        return self.n

    def length(self, id: int) -> float:
        """Frames, between 50 and 1549."""
        return 50.0 + (id * 2_654_435_761 >> 7) % 1500

    def read(self, id: int, epoch: int) -> tuple[int, list[float]]:
        return id, np.random.rand(3).tolist()

    def collate(self, samples: Sequence[tuple[int, list[float]]]) -> Any:
        return samples

    def plan(self, batching: str) -> BatchPlan:
        return BatchPlan(self.n, seed=SEED, batching=BATCHINGS[batching], length=self.length)


def first_batches(rows: Rows, batching: str, workers: int, cursors: Sequence[Cursor]) -> dict[str, Any]:
    """The batch at each cursor, each found by a plan and a loader that know nothing of the others."""
    batches, held_mb = [], []
    for cursor in cursors:
        at, ids = next(rows.plan(batching).batches(cursor))
        with Loader(rows, seed=SEED, workers=workers) as loader:
            request = BatchRequest(epoch=at.epoch, cursor=at, ids=ids)
            batches.append(next(iter(loader.iterate([request]))).batch)
            held_mb.append(memory_mb())
    return {"batches": batches, "memory_mb": max(held_mb), **seconds()}


def memory_mb() -> float:
    """What this process held at most (of its own: getrusage would count the parent it was forked from), and what its
    loader workers hold now."""
    status = Path("/proc/self/status").read_text()
    own_kb = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    workers = psutil.Process().children(recursive=True)
    return own_kb * 1024 / 1e6 + sum(worker.memory_info().rss for worker in workers) / 1e6


def seconds() -> dict[str, float]:
    """Since this interpreter was asked for (by the clock that all processes share), and of CPU."""
    now = time.clock_gettime(time.CLOCK_MONOTONIC)
    return {"wall_s": now - float(os.environ.get("BEGAN", now)), "cpu_s": time.process_time()}


# --- a whole run ------------------------------------------------------------------------------------------------------


def begin_run(folder: Path, rows: int) -> None:
    """A run over the rows with a checkpoint after its first step and one that says it was the 100,000th."""
    from thawline.ckpt.load import read_checkpoint
    from thawline.ckpt.save import save_checkpoint, step_name

    (folder / "recipe.yaml").write_text(_RECIPE.format(rows=rows), encoding="utf-8")
    _train(folder, "near", steps=1)
    shutil.copytree(folder / "near", folder / "far")
    checkpoints = folder / "far" / "checkpoints"
    near = read_checkpoint(checkpoints / step_name(1))
    at = Rows(rows).plan("size").cursor_at(0, FAR)
    state = {**near.state["run"], "step": FAR, "cursor": [at.epoch, at.window, at.batch], "index": FAR}
    save_checkpoint(
        checkpoints,
        step=FAR,
        delta=near.delta,
        optimizer=near.optimizer,
        state={**near.state, "run": state},
        base=near.base,
    )


_RECIPE = """\
task: rows
model: nothing
data: {{train: nothing, batch: {{size: 8}}}}
plan: {{train: ["**"]}}
run: {{epochs: 1, seed: 7, workers: 0}}
options: {{rows: {rows}}}
"""


def _train(folder: Path, name: str, *, steps: int | None = None, monitor: Any = None) -> None:
    from thawline.train.loop import train
    from thawline.train.recipe import read_recipe

    overrides = [] if steps is None else [f"run.steps={steps}"]
    train(read_recipe(folder / "recipe.yaml", overrides), _task(), folder / name, monitor=monitor, allow=["run.steps"])


def _task() -> Any:
    import torch
    from torch import nn

    from thawline.train.task import Evaluation, PlainSums, SumTerm

    class Batch:
        def __init__(self, samples: Sequence[tuple[int, list[float]]]) -> None:
            self.keys = tuple(str(id) for id, _ in samples)
            self.x = torch.tensor([draws for _, draws in samples])

        def to(self, device: Any) -> Batch:
            return self

    class Collated(Rows):
        def collate(self, samples: Sequence[tuple[int, list[float]]]) -> Batch:
            return Batch(samples)

    class RowsTask:
        name = "rows"

        def build(self, recipe: Any) -> nn.Module:
            torch.manual_seed(0)
            return nn.Linear(3, 1)

        def samples(self, recipe: Any, model: nn.Module, split: str) -> Rows:
            return Collated(recipe.options["rows"])

        def weights(self, model: nn.Module, batch: Batch) -> Mapping[str, float]:
            return {"rows": float(len(batch.keys))}

        def loss(self, model: nn.Module, batch: Batch) -> PlainSums:
            return PlainSums({"square": SumTerm(model(batch.x).square().sum(), "rows")}, {})

        def evaluate(self, model: nn.Module, samples: Any, batches: Iterator[Any]) -> Evaluation:
            return Evaluation({})

        def export(self, model: nn.Module, folder: Path) -> None:
            torch.save(model.state_dict(), folder / "model.pt")

    return RowsTask()


class _FirstStep:
    """Says when the first step is done, and that is all that was wanted."""

    def begin(self, **_: Any) -> None: ...
    def note(self, text: str) -> None: ...
    def evaluation(self, row: Any) -> None: ...
    def end(self) -> None: ...
    def step(self, row: Any, speed: Any) -> None:
        print(json.dumps(seconds()), flush=True)
        os._exit(0)  # before it saves: the next round finds the run as it was


# --- the table --------------------------------------------------------------------------------------------------------


def timed(*argv: str) -> dict[str, Any]:
    """One life of this program."""
    done = subprocess.run(
        [sys.executable, __file__, *argv],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"BEGAN": str(time.clock_gettime(time.CLOCK_MONOTONIC)), "OMP_NUM_THREADS": "1"},
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def table(rounds: int, folder: Path) -> list[str]:
    begin_run(folder, 10_000_000)
    corpus = Rows(100_000_000)
    far = corpus.plan("size").cursor_at(0, FAR)
    # Batches of varying length are counted only by passing them; a checkpoint's cursor says the window at once.
    places = (("size", 0, far), ("size", 2, far), ("frames", 0, Cursor(0, 400, 0)))
    rows = [
        (
            f"loader, 100 million rows, {batching}, {workers} workers",
            *(
                ("first", str(corpus.n), batching, str(workers), f"{c.epoch},{c.window},{c.batch}")
                for c in (Cursor(), place)
            ),
        )
        for batching, workers, place in places
    ]
    rows.append(
        (
            "whole run, 10 million rows, to the end of its first step",
            ("run", str(folder), "near"),
            ("run", str(folder), "far"),
        )
    )
    times: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {name: [] for name, _, _ in rows}
    for turn in range(rounds):
        for name, near, far in rows:
            first, second = ((near, far), (far, near))[turn % 2]
            pair = timed(*first), timed(*second)
            times[name].append(pair if turn % 2 == 0 else pair[::-1])
        print(f"round {turn + 1}: load {os.getloadavg()[0]:.1f}", flush=True)
    lines = []
    for name, pairs in times.items():
        cells = [name]
        for unit in ("wall_s", "cpu_s"):
            near_s, far_s = (statistics.median(pair[i][unit] for pair in pairs) for i in (0, 1))
            cells += [f"{near_s:.3f}", f"{far_s:.3f}", f"{far_s / near_s:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "position.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-position-") as folder:
        body = table(options.rounds, Path(folder))
    command = f"python benchmarks/bench_position.py --rounds {options.rounds}"
    machine = f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}"
    text = [
        "# Beginning far inside a corpus",
        "",
        f"`{command}`, {date.today().isoformat()}; {machine}. Load average at the end {os.getloadavg()[0]:.1f}.",
        "",
        f"Seconds from the start of a fresh interpreter at batch 0 and at batch {FAR:,}; medians of {options.rounds}.",
        "",
        f"| what | wall, 0 | wall, {FAR:,} | ratio | CPU, 0 | CPU, {FAR:,} | ratio |",
        "|---|---|---|---|---|---|---|",
        *body,
        "",
    ]
    options.out.write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["first", n, batching, workers, *cursors]:
            places = [Cursor(*map(int, cursor.split(","))) for cursor in cursors]
            print(json.dumps(first_batches(Rows(int(n)), batching, int(workers), places)))
        case ["run", folder, name]:
            _train(Path(folder), name, monitor=_FirstStep())
        case _:
            main()
