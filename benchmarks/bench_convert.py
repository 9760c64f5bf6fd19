"""Conversion of sharded training checkpoints: ours beside a plain copy and beside the frameworks' own tools.

    python benchmarks/bench_convert.py                       a small set, a minute
    python benchmarks/bench_convert.py --size full           609 MB of full-precision masters
    python benchmarks/bench_convert.py --size triple         three times that
    python benchmarks/bench_convert.py --peer-python PATH    an interpreter that has deepspeed (and accelerate)

Makes ZeRO-2 and ZeRO-3 sets (two ranks; masters, Adam moments, frozen bf16 layers) and torch.distributed.checkpoint
folders of the model with and without a moment, without needing DeepSpeed; runs every case in turn in processes of its
own, inputs dropped from the page cache before each; writes a table to benchmarks/results/convert.md (convert-triple.md
for the triple size). Ours reads every result again, compares digests and flushes it to the device (all of it in the
time shown); the others do neither, except one copy that is flushed too.
"""

from __future__ import annotations

import argparse
import enum
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

WIDTH, FORWARD, VOCABULARY = 768, 3072, 32000
SIZES = {"small": (2, 1), "full": (18, 6), "triple": (61, 20)}
"""Trained and frozen layers."""

RESULTS = Path(__file__).parent / "results"


@dataclass
class fragment_address:  # DeepSpeed's spelling
    numel: int
    start: int


class LossScaler:
    def __init__(self) -> None:
        self.cur_scale = 1.0
        self.dynamic = False


class ZeroStageEnum(int, enum.Enum):
    optimizer_states = 1
    gradients = 2
    weights = 3


def stand_in() -> None:
    """Let our three classes be pickled under DeepSpeed's names, which is all that its files have of them."""
    for path, cls in (
        ("deepspeed.utils.tensor_fragment", fragment_address),
        ("deepspeed.runtime.fp16.loss_scaler", LossScaler),
        ("deepspeed.runtime.zero.config", ZeroStageEnum),
    ):
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth])))
        setattr(sys.modules[path], cls.__name__, cls)
        cls.__module__ = path


def weights(layers: int, frozen: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(trained in fp32, frozen in bf16) of a transformer without ties."""
    g = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype).uniform_(-1, 1, generator=g)

    trained = {"embed.weight": draw((VOCABULARY, WIDTH), torch.float32)}
    cold: dict[str, Tensor] = {}
    for i in range(frozen + layers):
        where, dtype = (cold, torch.bfloat16) if i < frozen else (trained, torch.float32)
        for name, shape in (
            ("norm1.weight", (WIDTH,)), ("qkv.weight", (3 * WIDTH, WIDTH)), ("qkv.bias", (3 * WIDTH,)),
            ("proj.weight", (WIDTH, WIDTH)), ("proj.bias", (WIDTH,)), ("norm2.weight", (WIDTH,)),
            ("up.weight", (FORWARD, WIDTH)), ("up.bias", (FORWARD,)), ("down.weight", (WIDTH, FORWARD)),
            ("down.bias", (WIDTH,)),
        ):  # fmt: skip
            where[f"layers.{i}.{name}"] = draw(shape, dtype)
    trained["final.weight"] = draw((WIDTH + 1,), torch.float32)  # odd on purpose: padding
    return trained, cold


def make_zero(folder: Path, stage: int, layers: int, frozen: int, world: int = 2) -> None:
    """A ZeRO checkpoint in the layout that DeepSpeed 0.19 writes."""
    trained, cold = weights(layers, frozen)
    groups = [
        OrderedDict((n, t) for n, t in trained.items() if (t.dim() > 1) == matrices) for matrices in (True, False)
    ]
    tag = folder / "global_step1"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step1")
    states: dict[str, object] = {
        "buffer_names": [],
        "param_shapes": [OrderedDict((n, t.shape) for n, t in group.items()) for group in groups],
        "frozen_param_shapes": OrderedDict((n, t.shape) for n, t in cold.items()),
        "shared_params": {}, "optimizer": None, "lr_scheduler": None, "skipped_steps": 0, "global_steps": 1,
        "global_samples": 4, "dp_world_size": world, "mp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": stage}}, "ds_version": "0.19.8",
    }  # fmt: skip
    if stage < 3:
        module = OrderedDict((n, t.bfloat16()) for n, t in trained.items()) | cold
        fragments = OrderedDict((n, t.clone()) for n, t in cold.items())
        torch.save(
            {"module": module, "frozen_param_fragments": fragments, **states}, tag / "mp_rank_00_model_states.pt"
        )
        del module, fragments
    for rank in range(world):
        parts, mappings = [], []
        for group in groups:
            if stage == 3:
                parts.append(torch.cat([piece(t, rank, world) for t in group.values()]))
                continue
            flat = torch.cat([t.reshape(-1) for t in group.values()])
            size = -(-flat.numel() // (2 * world)) * 2
            low, high = rank * size, min((rank + 1) * size, flat.numel())
            parts.append(flat[low:high].clone())
            mapping, position = OrderedDict(), 0
            for name, tensor in group.items():
                start, stop = max(position, low), min(position + tensor.numel(), high)
                if start < stop:
                    mapping[name] = fragment_address(numel=stop - start, start=start - low)
                position += tensor.numel()
            mappings.append(mapping)
        moments = {
            i: {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            for i, p in enumerate(parts)
        }
        base = {"state": moments, "param_groups": [{"lr": 1e-4, "params": [i]} for i in range(2)]}
        optimizer: dict[str, object] = {"loss_scaler": LossScaler(), "zero_stage": ZeroStageEnum(stage)}
        if stage == 3:
            placeholders = OrderedDict((n, torch.empty(0, dtype=torch.bfloat16)) for n in (*trained, *cold))
            fragments = OrderedDict((n, piece(t, rank, world)) for n, t in cold.items())
            torch.save(
                {"module": placeholders, "frozen_param_fragments": fragments, **states},
                tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt",
            )
            optimizer |= {"partition_count": world, "optimizer_state_dict": base, "fp32_flat_groups": parts}
        else:
            optimizer |= {
                "base_optimizer_state": base, "single_partition_of_fp32_groups": parts,
                "partition_count": [world] * 2, "param_slice_mappings": mappings, "ds_version": "0.19.8",
            }  # fmt: skip
        torch.save(
            {"optimizer_state_dict": optimizer, "ds_config": states["ds_config"], "ds_version": "0.19.8"},
            tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )


def piece(tensor: Tensor, rank: int, world: int) -> Tensor:
    """A rank's ceil(n / world) elements under stage 3."""
    size = -(-tensor.numel() // world)
    own = tensor.reshape(-1)[rank * size : (rank + 1) * size]
    return torch.cat([own, torch.zeros(size - own.numel(), dtype=tensor.dtype)])


def make_dcp(folder: Path, layers: int, *, moments: bool) -> None:
    """A torch.distributed.checkpoint of the model, with an Adam moment or without."""
    import torch.distributed.checkpoint as dcp

    trained, _ = weights(layers, 0)
    state: dict[str, object] = {"model": trained}
    if moments:
        state["optim"] = {"state": {n: {"exp_avg": torch.zeros_like(t)} for n, t in trained.items()}}
    dcp.save(state, checkpoint_id=folder, no_dist=True)


# --- measuring ---

OURS = "import sys\nfrom thawline.ckpt.convert import convert\nconvert(sys.argv[1], sys.argv[2], to=sys.argv[3])"
COPY = "plain copy of our result (cp)"
FLUSHED = "copy of our result, flushed to the device (dd conv=fsync)"
DCP_TO_TORCH = ["-m", "torch.distributed.checkpoint.format_utils", "dcp_to_torch"]
ACCELERATE = "import sys\nfrom accelerate.utils import merge_fsdp_weights\nmerge_fsdp_weights(sys.argv[1], sys.argv[2])"


@dataclass
class Run:
    wall_s: float
    cpu_s: float
    anonymous: int
    read: int
    written: int
    disk: int


def drop_caches(folder: Path) -> None:
    """Ask the system to forget the files' pages."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure(command: list[str]) -> Run | None:
    """Run a command; None if it fails."""
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    anonymous = 0
    while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        anonymous = max(anonymous, *status(child.pid, "status", "RssAnon:", 1024))
        time.sleep(0.01)
    wall = time.perf_counter() - started
    read, written, disk = (max(status(child.pid, "io", key, 1)) for key in ("rchar:", "wchar:", "read_bytes:"))
    _, code, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(code)
    return None if child.returncode else Run(wall, usage.ru_utime + usage.ru_stime, anonymous, read, written, disk)


def status(pid: int, file: str, key: str, unit: int) -> Iterator[int]:
    """A number of the process, and zero so that there is always one."""
    yield 0
    try:
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            if line.startswith(key):
                yield int(line.split()[1]) * unit
    except OSError:
        return


def cases(work: Path, peer: str) -> dict[str, tuple[str, list[str]]]:
    """Name -> (input, command); {out} is a new folder, {copy} a file of as many bytes as ours writes."""
    python = sys.executable

    def ours(source: str, to: str, name: str) -> tuple[str, list[str]]:
        return source, [python, "-c", OURS, str(work / source), f"{{out}}/{name}", to]

    found = {
        COPY: ("copy", ["cp", str(work / "copy/m.safetensors"), "{out}/m"]),
        FLUSHED: (
            "copy", ["dd", f"if={work / 'copy/m.safetensors'}", "of={out}/m", "bs=256K", "conv=fsync"]
        ),
        "ours, ZeRO-2 -> safetensors": ours("z2", "safetensors", "m.safetensors"),
        "ours, ZeRO-2 -> torch": ours("z2", "torch", "m.pt"),
        "ours, ZeRO-3 -> safetensors": ours("z3", "safetensors", "m.safetensors"),
        "ours, ZeRO-3 -> torch": ours("z3", "torch", "m.pt"),
        "ours, DCP (model and moment) -> torch": ours("dcp", "torch", "m.pt"),
        "dcp_to_torch_save (model and moment, writes both)": (
            "dcp", [python, *DCP_TO_TORCH, str(work / "dcp"), "{out}/m.pt"]
        ),
        "ours, DCP (model only) -> torch": ours("dcp_model", "torch", "m.pt"),
        "dcp_to_torch_save (model only)": (
            "dcp_model", [python, *DCP_TO_TORCH, str(work / "dcp_model"), "{out}/m.pt"]
        ),
        "ours, DCP (model only) -> safetensors": ours("dcp_model", "safetensors", "m.safetensors"),
    }  # fmt: skip
    if importlib.util.find_spec("accelerate"):
        merge = [python, "-c", ACCELERATE, str(work / "dcp_model"), "{out}"]
        found["accelerate merge_fsdp_weights (model only) -> safetensors"] = ("dcp_model", merge)
    if peer:
        zero = [peer, "-m", "deepspeed.utils.zero_to_fp32"]
        for key in ("z2", "z3"):
            name = f"zero_to_fp32, ZeRO-{key[1]}"
            found[f"{name} -> safetensors"] = (key, [*zero, str(work / key), "{out}", "--safe_serialization"])
            found[f"{name} -> torch"] = (key, [*zero, str(work / key), "{out}"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for the sets; kept, and used again if they are there")
    parser.add_argument("--peer-python", default=sys.executable if importlib.util.find_spec("deepspeed") else "")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    layers, frozen = SIZES[options.size]
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        stand_in()
        for key, make in (
            ("z2", lambda path: make_zero(path, 2, layers, frozen)),
            ("z3", lambda path: make_zero(path, 3, layers, frozen)),
            ("dcp", lambda path: make_dcp(path, layers, moments=True)),
            ("dcp_model", lambda path: make_dcp(path, layers, moments=False)),
        ):
            if not (work / key).is_dir():
                make(work / key)
        (work / "copy").mkdir(exist_ok=True)
        again = OURS.replace("to=", "force=True, to=")
        once = [sys.executable, "-c", again, work / "z2", work / "copy/m.safetensors", "safetensors"]
        subprocess.run(once, check=True)
        size = (work / "copy/m.safetensors").stat().st_size
        table = cases(work, options.peer_python)
        runs: dict[str, list[Run]] = {name: [] for name in table}
        for _ in range(options.repeat):  # in turn, so that a busy moment of the machine hits all alike
            for name, (source, command) in table.items():
                out = work / "out"
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                drop_caches(work / source)
                run = measure([part.replace("{out}", str(out)) for part in command])
                shutil.rmtree(out, ignore_errors=True)
                if run is not None:
                    runs[name].append(run)
    text = report(options, runs, size)
    out = options.out or RESULTS / ("convert-triple.md" if options.size == "triple" else "convert.md")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    print(text)
    print(json.dumps({name: [run.__dict__ for run in each] for name, each in runs.items()}), file=sys.stderr)


def report(options: argparse.Namespace, runs: dict[str, list[Run]], size: int) -> str:
    """The table as Markdown."""
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    command = f"python benchmarks/bench_convert.py --size {options.size} --repeat {options.repeat}"
    machine = (
        f"Machine: {len(os.sched_getaffinity(0))} cores, {memory_gb:.0f} GB memory, {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__.partition('+')[0]}. "
        f"Load average while measuring: {os.getloadavg()[1]:.1f}."
    )
    conditions = (
        "Inputs are cold. Ours verifies each result by reading it again and flushes it to the device within the time "
        "shown; the other tools and cp do neither. Medians; every wall time is listed."
    )
    lines = [
        "# Conversion of sharded checkpoints",
        "",
        f"`{command}`: {size / 1e6:.0f} MB written by us per run.",
        machine,
        conditions,
        "",
        "| case | wall s | each | CPU s | peak anonymous MB | read calls MB | read from disk MB | written MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, each in runs.items():
        if not each:
            lines.append(f"| {name} | failed | | | | | | |")
            continue

        def middle(field: str, each: list[Run] = each) -> float:
            return statistics.median(getattr(run, field) for run in each)

        walls = ", ".join(f"{run.wall_s:.2f}" for run in each)
        sizes = " | ".join(f"{middle(field) / 1e6:.0f}" for field in ("anonymous", "read", "disk", "written"))
        lines.append(f"| {name} | {middle('wall_s'):.2f} | {walls} | {middle('cpu_s'):.2f} | {sizes} |")
    return "\n".join([*lines, *ratios(runs)]) + "\n"


def ratios(runs: dict[str, list[Run]]) -> list[str]:
    """Ours against the peers and the copy, by the medians of one run of this script."""

    def wall(name: str) -> float:
        return statistics.median(run.wall_s for run in runs[name])

    peers = {
        "ours, ZeRO-2 -> safetensors": "zero_to_fp32, ZeRO-2 -> safetensors",
        "ours, ZeRO-2 -> torch": "zero_to_fp32, ZeRO-2 -> torch",
        "ours, ZeRO-3 -> safetensors": "zero_to_fp32, ZeRO-3 -> safetensors",
        "ours, ZeRO-3 -> torch": "zero_to_fp32, ZeRO-3 -> torch",
        "ours, DCP (model only) -> torch": "dcp_to_torch_save (model only)",
        "ours, DCP (model only) -> safetensors": "accelerate merge_fsdp_weights (model only) -> safetensors",
    }
    lines = ["", "| case | times as fast as the peer | times the copy's time | times the flushed copy's |"]
    lines.append("|---|---|---|---|")
    for name, peer in peers.items():
        faster = f"{wall(peer) / wall(name):.1f}" if runs.get(peer) else "-"
        lines.append(f"| {name} | {faster} | {wall(name) / wall(COPY):.1f} | {wall(name) / wall(FLUSHED):.1f} |")
    return lines


if __name__ == "__main__":
    main()
