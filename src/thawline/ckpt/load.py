"""Reading checkpoints back, whole or not at all, and putting tensors into a model with every one accounted for.

`newest_whole` passes over damaged checkpoints and says why. `load_strict_` compares the names itself: torch's own
strict loading swallows the keys of a submodule that is None, and `strict=False` everything else.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
from blake3 import blake3
from torch import Tensor, nn

from thawline.ckpt import manifest, store, tensorfile
from thawline.ckpt.delta import NAME as DELTA
from thawline.ckpt.delta import BaseRef, Delta, read_delta
from thawline.ckpt.manifest import FileEntry
from thawline.ckpt.save import EMA, OPTIMIZER, PARKED, STATE
from thawline.errors import CheckpointError

T = TypeVar("T")

_STEP = re.compile(r"step-(\d{8,})")
_SHOWN = 5
_USE_ANOTHER = "use another checkpoint of the run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What was saved at a step, every byte verified.

    path:       its directory
    step:       optimizer updates done
    difference: the delta with its base, its digests and what it adds and removes
    optimizer:  tensors by "<parameter name>/<state key>"
    state:      counters and metrics
    ema:        averages of weights by the weights' names (every name of tied ones); empty for a run without
    """

    path: Path
    step: int
    difference: Delta
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]
    ema: Mapping[str, Tensor]

    @property
    def delta(self) -> Mapping[str, Tensor]:
        """The changed and new tensors by name; everything else is as in the base."""
        return self.difference.tensors

    @property
    def base(self) -> BaseRef:
        """The base it belongs to."""
        return self.difference.base


def checkpoints(root: Path) -> list[tuple[int, Path]]:
    """The checkpoints in `root` by their names, newest first, whole or not: (step, path). Empty without a `root`."""
    try:
        entries = os.listdir(root)
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise CheckpointError(
            f"cannot be read: {exc.strerror}", where=str(root), fix="check the permissions of the directory"
        ) from exc
    found = [(int(match[1]), root / entry) for entry in entries if (match := _STEP.fullmatch(entry))]
    return sorted(found, reverse=True)


def newest_whole(root: Path, *, report: Callable[[str], object]) -> Path:
    """The newest checkpoint in `root` that is whole, every digest checked.

    report: called with one line for each damaged one that is passed over
    Raises CheckpointError if none is whole, naming each and what is wrong with it.
    """

    def check(path: Path) -> Path:
        problems = manifest.verify(path)
        if problems:
            raise CheckpointError("; ".join(problems), where=str(path))
        _check_step(path, manifest.read(path).step)
        return path

    return _newest(root, check, report)


def read_newest(root: Path, *, report: Callable[[str], object]) -> Checkpoint:
    """The newest whole checkpoint in `root`: `newest_whole` and `read_checkpoint` with a single reading."""
    return _newest(root, read_checkpoint, report)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; each file's digest is checked while it is read. Raises CheckpointError if it is not whole."""
    listed = manifest.read(path)
    _check_step(path, listed.step)
    for name in (DELTA, OPTIMIZER, STATE):
        if name not in listed.files:
            raise CheckpointError(f"its manifest lists no {name}", where=str(path), fix=_USE_ANOTHER)
    for name, entry in listed.files.items():
        problem = manifest.check_size(path / name, entry)
        if problem:
            raise CheckpointError(problem, where=str(path), fix=_USE_ANOTHER)
    state = _read_state(path / STATE, listed.files[STATE])
    difference = read_delta(path / DELTA, listed.files[DELTA])
    if difference.base.fingerprint != listed.base:
        raise CheckpointError(
            f"its delta belongs to the base {difference.base.fingerprint}, its manifest to {listed.base}",
            where=str(path),
            fix=_USE_ANOTHER,
        )
    optimizer: dict[str, Tensor] = {}
    for name in (OPTIMIZER, PARKED):
        if name in listed.files:
            optimizer |= tensorfile.read(path / name, listed.files[name])[1]
    ema = _read_ema(path / EMA, listed.files[EMA]) if EMA in listed.files else {}
    return Checkpoint(path=path, step=listed.step, difference=difference, optimizer=optimizer, state=state, ema=ema)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What `load_strict_` did, by name.

    loaded:     filled from the source
    tied:       filled through another name of the same tensor, which the source has
    missing:    in the model, not in the source, allowed: as they were
    unexpected: in the source, not in the model, allowed: left out
    cast:       filled from another element type, allowed
    """

    source: str
    loaded: tuple[str, ...]
    tied: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.loaded)} tensors loaded"]
        for what, names in (
            ("through a tied name", self.tied),
            ("missing there and allowed to be", self.missing),
            ("left out as allowed", self.unexpected),
            ("cast as allowed", self.cast),
        ):
            if names:
                lines.append(f"  {len(names)} {what}: {', '.join(names)}")
        return "\n".join(lines)


def load_strict_(
    model: nn.Module,
    tensors: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor],
    *,
    source: str,
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    allow_cast: bool = False,
) -> LoadReport:
    """Fill a model from named tensors. Either every name, shape and element type fits, or the model stays as it was.

    source: the file or directory they come from; for messages
    allow_missing, allow_unexpected: names or globs of what may differ; used ones are in the report
    allow_cast: accept another element type and convert

    A name missing in the source is fine if it is tied in the model to one that is there.
    Raises CheckpointError that names the tensors, the source and the remedy.
    """
    given = dict(tensors.items() if isinstance(tensors, Mapping) else tensors)
    wanted = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    first_names: dict[object, str] = {}
    for name in wanted:
        if name in given:
            first_names.setdefault(_place(wanted[name]), name)
    absent = [name for name in wanted if name not in given]
    tied = tuple(name for name in absent if _place(wanted[name]) in first_names)
    missing, allowed_missing = _split([name for name in absent if name not in tied], allow_missing)
    surplus, allowed_surplus = _split([name for name in given if name not in wanted], allow_unexpected)
    empty = _empty_parts(model)
    swallowed = [name for name in surplus if any(name == part or name.startswith(part + ".") for part in empty)]
    unexpected = [name for name in surplus if name not in swallowed]
    common = [name for name in wanted if name in given]
    shapes = [name for name in common if wanted[name].shape != given[name].shape]
    dtypes = [name for name in common if wanted[name].dtype != given[name].dtype]
    meta = [name for name in common if wanted[name].is_meta or given[name].is_meta]
    torn = [
        f"{name} and {first}"
        for name in common
        if (first := first_names[_place(wanted[name])]) != name
        and wanted[name].shape == given[name].shape == given[first].shape
        and not _same_bits(given[name], given[first])
    ]
    _refuse(
        source,
        total=len(wanted),
        findings=[
            ("missing in it", missing, "is it the right file, or a delta that needs its base (--base)?"),
            ("unknown to the model", unexpected, "build the model that the file was saved from"),
            (
                "of a part that this model has not (it is None there)",
                swallowed,
                "build the model with that part; torch would drop them silently",
            ),
            (
                "of another shape",
                [f"{n} {tuple(given[n].shape)} in the file, {tuple(wanted[n].shape)} in the model" for n in shapes],
                "build the model with the file's sizes",
            ),
            (
                "of another element type",
                [] if allow_cast else [f"{n} {given[n].dtype}, {wanted[n].dtype} in the model" for n in dtypes],
                "convert the file (--dtype), or allow the cast",
            ),
            ("without memory (on the meta device)", meta, "call model.to_empty(device=...) first"),
            ("tied in the model but different in it", torn, "untie them in the model's configuration"),
        ],
    )
    with torch.no_grad():
        for name in common:
            wanted[name].copy_(given[name])
    return LoadReport(
        source=source,
        loaded=tuple(common),
        tied=tied,
        missing=tuple(allowed_missing),
        unexpected=tuple(allowed_surplus),
        cast=tuple(dtypes),
    )


def _newest(root: Path, take: Callable[[Path], T], report: Callable[[str], object]) -> T:
    store.give_back(root)
    refusals: list[str] = []
    for _, path in checkpoints(root):
        try:
            return take(path)
        except CheckpointError as exc:
            refusals.append(f"{path.name}: {exc.what}")
            report(f"{exc.where or path}: {exc.what}; this checkpoint is passed over")
    if not refusals:
        raise CheckpointError("there is no checkpoint", where=str(root), fix="start the run from its base")
    raise CheckpointError(
        "no checkpoint is whole:\n  " + "\n  ".join(refusals),
        where=str(root),
        fix="restore one from a copy, or start the run from its base",
    )


def _check_step(path: Path, step: int) -> None:
    match = _STEP.fullmatch(path.name)
    if match is not None and int(match[1]) != step:
        raise CheckpointError(f"its manifest is of step {step}", where=str(path), fix=_USE_ANOTHER)


def _read_state(path: Path, entry: FileEntry) -> Mapping[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise CheckpointError(f"cannot be read: {exc.strerror}", where=str(path), fix=_USE_ANOTHER) from exc
    if blake3(data).hexdigest() != entry.digest:
        raise CheckpointError("damaged: its digest differs", where=str(path), fix=_USE_ANOTHER)
    found: Mapping[str, Any] = json.loads(data)
    return found


def _read_ema(path: Path, entry: FileEntry) -> dict[str, Tensor]:
    metadata, stored = tensorfile.read(path, entry)
    aliases: dict[str, str] = json.loads(metadata["aliases"])
    return stored | {name: stored[kept] for name, kept in aliases.items()}


def _place(tensor: Tensor) -> object:
    """Equal for two names of one tensor."""
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return bool(one.dtype == other.dtype and tensorfile.raw_bytes(one) == tensorfile.raw_bytes(other))


def _split(names: list[str], allowed: Sequence[str]) -> tuple[list[str], list[str]]:
    fine = [name for name in names if any(name == glob or fnmatchcase(name, glob) for glob in allowed)]
    return [name for name in names if name not in fine], fine


def _empty_parts(model: nn.Module) -> list[str]:
    """Names under which the model has registered None: submodules, parameters and buffers that it does without."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for members in (module._modules, module._parameters, module._buffers)
        for name, member in members.items()
        if member is None
    ]


def _refuse(source: str, *, total: int, findings: Sequence[tuple[str, list[str], str]]) -> None:
    lines = []
    fixes = []
    for what, names, fix in findings:
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"  {len(names)} {what}: {', '.join(names[:_SHOWN])}{more}")
            fixes.append(fix)
    if lines:
        raise CheckpointError(
            f"does not fit the model of {total} tensors; nothing was loaded\n" + "\n".join(lines),
            where=source,
            fix="; ".join(fixes),
        )
