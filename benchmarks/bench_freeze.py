"""Resolving a plan and taking digests, beside a plain memory copy of the same bytes in the same run.

    python benchmarks/bench_freeze.py [--megabytes 1000] [--write]

Prints a table; --write puts it into benchmarks/results/freeze.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from thawline.core.index import ModelIndex, ParamInfo
from thawline.freeze.audit import digests
from thawline.freeze.plan import FreezePlan
from thawline.freeze.resolve import resolve

RESULTS = Path(__file__).resolve().parent / "results" / "freeze.md"


def timed(run: Callable[[], object], rounds: int = 7) -> float:
    """Median wall seconds of one call."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def index_of(tensors: int) -> ModelIndex:
    """A transformer's names: ten tensors a layer."""
    kinds = (
        "q.weight",
        "k.weight",
        "v.weight",
        "o.weight",
        "q.bias",
        "k.bias",
        "v.bias",
        "o.bias",
        "norm.weight",
        "norm.bias",
    )
    infos = [
        ParamInfo(name=f"encoder.layers.{i}.{kind}", shape=(64, 64) if "weight" in kind else (64,), dtype="F32")
        for i in range(tensors // 10)
        for kind in kinds
    ]
    return ModelIndex(infos)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    index = index_of(10_000)
    _ = index.tree
    plan = FreezePlan(train=["encoder.layers[-100:]", "!**.norm"], lr={"encoder.**": 0.1}, no_decay=["@bias"])
    resolving = timed(lambda: resolve(plan, index))
    tensors = {f"t{i}": torch.randn(args.megabytes * 250_000 // 64) for i in range(64)}
    total = sum(t.numel() * 4 for t in tensors.values())
    into = {name: torch.empty_like(t) for name, t in tensors.items()}

    def copy() -> None:
        for name, tensor in tensors.items():
            into[name].copy_(tensor)

    copy()
    threads = torch.get_num_threads()

    def copy_on_one_core() -> None:
        torch.set_num_threads(1)
        copy()
        torch.set_num_threads(threads)

    rounds = [
        (timed(copy_on_one_core, 1), timed(copy, 1), timed(lambda: digests(tensors), 1)) for _ in range(args.rounds)
    ]
    one, all_cores, hashing = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(c / h for c, _, h in rounds)
    ratio_all = statistics.median(c / h for _, c, h in rounds)
    rows = [
        f"| what | median of {args.rounds} |",
        "|---|---|",
        f"| resolve a plan on 10,000 tensors | {resolving * 1e3:.0f} ms |",
        f"| memory copy of {total / 1e9:.2f} GB (memcpy, one core) | {one:.3f} s, {total / one / 1e9:.1f} GB/s |",
        f"| the same copy, torch on all cores | {all_cores:.3f} s, {total / all_cores / 1e9:.1f} GB/s |",
        f"| digests of the same bytes (BLAKE3, all cores) | {hashing:.3f} s, {total / hashing / 1e9:.1f} GB/s |",
        f"| speed of digests over memcpy, round by round | {ratio:.2f} |",
        f"| speed of digests over the copy on all cores | {ratio_all:.2f} |",
    ]
    text = "\n".join(rows)
    print(text)
    if args.write:
        head = f"# Resolving and digests\n\n`python benchmarks/bench_freeze.py --megabytes {args.megabytes} --write`, "
        head += f"{os.cpu_count()} cores, torch {torch.__version__}.\n\n"
        RESULTS.write_text(head + text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
