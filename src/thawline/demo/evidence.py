"""What the demo's assertions compare: tensors and digests, read independently of the code that wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thawline.ckpt.load import read_newest
from thawline.core.digest import digest_tensor
from thawline.train.rundir import RunDirectory


def changed_names(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """Names whose tensors are not bitwise the same, or are on one side only."""
    shared = before.keys() & after.keys()
    return {n for n in before.keys() | after.keys() if n not in shared} | {
        n for n in shared if digest_tensor(before[n]) != digest_tensor(after[n])
    }


def is_statistic(name: str) -> bool:
    """Whether a buffer of a norm is meant, by its name."""
    return name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")


def frozen_statistics(state: Mapping[str, Tensor], trained: frozenset[str]) -> set[str]:
    """The running statistics of the norms whose weights do not train."""
    return {n for n in state if is_statistic(n) and f"{n.rpartition('.')[0]}.weight" not in trained}


def newest_digests(files: RunDirectory) -> dict[str, str]:
    """Digest of every tensor of the newest whole checkpoint, weights and optimizer state, by step and name."""
    checkpoint = read_newest(files.checkpoints, report=lambda text: None)
    parts = {"weights": checkpoint.delta, "optimizer": checkpoint.optimizer}
    return {
        f"step {checkpoint.step} {part}/{name}": digest_tensor(tensor)
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, read by others' code: torch's restricted loading, or safetensors' own."""
    if not path.is_file():
        return {}
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(path))
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def ctc_of(model: Any, feats: Tensor) -> Tensor:
    """What the model computes of features (1, frames, 80)."""
    out, _ = model.encode(feats, torch.tensor([feats.size(1)]))
    logp: Tensor = model.ctc_log_probs(out)  # (1, T', V)
    return logp


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Names whose digests are not the same, or are on one side only."""
    return sorted(n for n in one.keys() | other.keys() if one.get(n) != other.get(n))
