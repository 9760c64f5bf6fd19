"""How long a save stops the training thread, beside the peers, in one run. Writes results/save.md.

    python benchmarks/bench_save.py [--megabytes 1000] [--rounds 5] [--out benchmarks/results/save.md]

Every method saves the same state. The rounds go through all methods in turn, so that a busy moment of the machine does
not fall on one of them. "stall" is how long the caller is stopped; "durable" is when the bytes are on the device: for
methods that do not flush, the flush is made and counted. The forked snapshot is a sketch for comparison: why it is not
used is in docs/decisions.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from thawline.ckpt.delta import BaseRef
from thawline.ckpt.save import Saver, Staging, save_checkpoint

Timing = tuple[float, float]
BASE = BaseRef(fingerprint="0" * 64, digests={})


def flush(path: Path) -> None:
    """Flush everything below a path to the device."""
    for place in [path, *path.rglob("*")]:
        descriptor = os.open(place, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class Methods:
    """The ways to save; each returns (stall, durable) in seconds."""

    def __init__(self, state: dict[str, Tensor], root: Path) -> None:
        self.state = state
        self.root = root
        self.copy = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        half = len(state) // 3
        names = list(state)
        self.delta = {name: state[name] for name in names[:half]}
        self.optimizer = {f"{name}/exp_avg": state[name] for name in names[half:]}
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False,
                use_shared_memory=True,
                use_async_staging=False,
                use_non_blocking_copy=False,
            )
        )
        self.saver = Saver(root, base=BASE)

    def memcpy(self) -> Timing:
        began = time.perf_counter()
        for name, tensor in self.state.items():
            self.copy[name].copy_(tensor)
        return (took := time.perf_counter() - began), took

    def thawline(self) -> Timing:
        return self._ours(self.saver)

    def thawline_first(self) -> Timing:
        with Saver(self.root, base=BASE) as saver:
            return self._ours(saver)

    def _ours(self, saver: Saver) -> Timing:
        began = time.perf_counter()
        handle = saver.save(step=1, delta=self.delta, optimizer=self.optimizer, state={})
        stall = time.perf_counter() - began
        handle.wait()
        return stall, time.perf_counter() - began

    def thawline_sync(self) -> Timing:
        began = time.perf_counter()
        save_checkpoint(self.root, step=1, delta=self.delta, optimizer=self.optimizer, state={}, base=BASE)
        return (took := time.perf_counter() - began), took

    def torch_save(self) -> Timing:
        return self._sync(lambda: torch.save(self.state, self.root / "a.pt"))

    def safetensors(self) -> Timing:
        return self._sync(lambda: safetensors.torch.save_file(self.state, self.root / "a.safetensors"))

    def _sync(self, act: Callable[[], object]) -> Timing:
        began = time.perf_counter()
        act()
        stall = time.perf_counter() - began
        flush(self.root)
        return stall, time.perf_counter() - began

    def dcp_async(self) -> Timing:
        return self._dcp(None)

    def dcp_async_reused(self) -> Timing:
        return self._dcp(self.stager)

    def _dcp(self, stager: DefaultStager | None) -> Timing:
        began = time.perf_counter()
        future = dcp.async_save(self.state, checkpoint_id=str(self.root / "dcp"), async_stager=stager)
        stall = time.perf_counter() - began
        getattr(future, "upload_completion", future).result()
        return stall, time.perf_counter() - began

    def forked(self) -> Timing:
        began = time.perf_counter()
        child = os.fork()
        if child == 0:
            with open(self.root / "f", "wb", buffering=0) as file:
                for tensor in self.state.values():
                    file.write(tensor.numpy().data)
                os.fsync(file.fileno())
            os._exit(0)
        stall = time.perf_counter() - began
        os.waitpid(child, 0)
        return stall, time.perf_counter() - began


ROWS: tuple[tuple[str, str], ...] = (
    ("memcpy", "one memory copy into memory that is kept (the floor)"),
    ("thawline", "**thawline, behind the training thread**"),
    ("thawline_first", "thawline, first save of a run (fresh staging memory)"),
    ("thawline_sync", "thawline, at once (digests, flushed)"),
    ("torch_save", "torch.save"),
    ("safetensors", "safetensors.torch.save_file"),
    ("dcp_async", "DCP async_save"),
    ("dcp_async_reused", "DCP async_save, stager kept"),
    ("forked", "sketch: forked copy-on-write snapshot"),
)


def step_times(methods: Methods, act: Callable[[], object], clean: Callable[[], None]) -> float:
    """Median seconds of a training step (a matrix product, and an in-place update of the whole state) during `act`."""
    clean()
    x = torch.randn(700, 700)
    done = threading.Event()
    times: list[float] = []

    def train() -> None:
        while not done.is_set() or len(times) < 3:
            began = time.perf_counter()
            torch.mm(x, x)
            for tensor in methods.state.values():
                tensor.mul_(1.0001)
            times.append(time.perf_counter() - began)

    trainer = threading.Thread(target=train)
    trainer.start()
    act()
    done.set()
    trainer.join()
    return statistics.mean(times)


def staging_copies(state: dict[str, Tensor], rounds: int) -> list[float]:
    """Seconds of each copy into staging memory; the first is into fresh pages."""
    staging = Staging()
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        staging.copy({"all": state})
        times.append(time.perf_counter() - began)
    return times


def machine() -> str:
    with open("/proc/meminfo") as file:
        memory_gb = int(file.readline().split()[1]) / 1e6
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), {memory_gb:.0f} GB memory, no GPU used; "
        f"{platform.system()} {platform.release().split('-')[0]}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, safetensors {safetensors.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--where", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "save.md")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    tensors = 48
    state = {f"layer{n:02d}.weight": torch.randn(options.megabytes * 10**6 // 4 // tensors) for n in range(tensors)}
    root = Path(tempfile.mkdtemp(prefix="bench-save-", dir=options.where))

    def clean() -> None:
        for entry in root.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        flush(root)

    methods = Methods(state, root)
    timings: dict[str, list[Timing]] = {name: [] for name, _ in ROWS}
    methods.memcpy()
    methods.thawline()
    copies = staging_copies(state, options.rounds)
    for turn in range(options.rounds):
        # Rotated: the first write after a large file was removed meets free pages, the next one waits for them.
        for name, _ in (*ROWS[turn:-1], *ROWS[:turn]):
            clean()
            timings[name].append(getattr(methods, name)())
        print(f"round {turn + 1}: load {os.getloadavg()[0]:.1f}", flush=True)
    # Last, and not among the others: after a fork every page of the parent is copied or at least faulted in again at
    # its next write, which would be charged to whichever method comes next.
    for _ in range(options.rounds):
        clean()
        timings["forked"].append(methods.forked())

    alone = step_times(methods, lambda: time.sleep(2), clean)
    beside = step_times(methods, methods.thawline, clean)
    beside_fork = step_times(methods, methods.forked, clean)
    shutil.rmtree(root)
    dist.destroy_process_group()

    lines = [
        "# What a save costs the training thread",
        "",
        f"State: {options.megabytes} MB in {tensors} float32 tensors. {date.today().isoformat()}; {machine()}.",
        f"Load average at the end {os.getloadavg()[0]:.1f} (the machine was shared).",
        f"Command: `python benchmarks/bench_save.py --megabytes {options.megabytes} --rounds {options.rounds}`.",
        f"Seconds, median (and least) of {options.rounds} rounds.",
        "",
        "| method | stall | durable after |",
        "|---|---|---|",
    ]
    for name, label in ROWS:
        stalls, ends = zip(*timings[name], strict=True)
        lines.append(
            f"| {label} | {statistics.median(stalls):.3f} ({min(stalls):.3f}) "
            f"| {statistics.median(ends):.2f} ({min(ends):.2f}) |"
        )
    lines += [
        "",
        f"The copy into staging: {statistics.median(copies[1:]):.3f}, into fresh memory at first {copies[0]:.3f}.",
        "",
        "Mean time of a step (a 700 x 700 product and an in-place update of all the state, in another thread):",
        f"{alone:.3f} alone, {beside:.3f} while thawline saves, {beside_fork:.3f} while a forked snapshot is written.",
        "",
    ]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
