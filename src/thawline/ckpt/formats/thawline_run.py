"""Thawline's own runs, checkpoints and deltas, read without torch.

A delta names its base by fingerprint and by the digest of each of its tensors; which tensors come out is in its
metadata. Putting base and delta together is the caller's, because it needs the base's bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from blake3 import blake3

from thawline.ckpt import manifest
from thawline.ckpt.formats.mapped import MappedFile
from thawline.ckpt.formats.pieces import Plan, Planned
from thawline.ckpt.formats.safetensors_header import MAX_HEADER, read_header, sealed
from thawline.core.adapter import Adapter, factors
from thawline.errors import CheckpointError

DELTA: Final = "delta.safetensors"
AVERAGES: Final = "ema.safetensors"
BASE: Final = "base.json"
KIND: Final = "delta/1"
ALONE: Final = "thawline delta"
"""The format of a delta that is opened without its base."""
ADAPTERS: Final = "adapters"
"""Metadata entry of a delta that adds LoRA adapters: path of the layer -> what their factors do not say."""
_STEP = re.compile(r"step-\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaPlan:
    """A delta, not yet put over its base.

    tensors: the changed and the new ones, tied names included
    digests: name -> digest of each of them
    base:    name -> digest of every tensor of the base
    fingerprint, base_path: of the base; the path is where it was, for messages and for finding it
    below:   fingerprints of what the base was itself made over, lowest first
    made:    names of the base that are not in its files: the run that built the model made them
    copied:  new name -> name in the base that holds the same bytes
    removed: names of the base that are no more
    adapters: the LoRA adapters that it adds, by the path of the layer
    """

    tensors: Mapping[str, Planned]
    digests: Mapping[str, str]
    base: Mapping[str, str]
    fingerprint: str
    base_path: str
    below: tuple[str, ...]
    made: tuple[str, ...]
    copied: Mapping[str, str]
    removed: tuple[str, ...]
    adapters: Mapping[str, Adapter]
    file: MappedFile

    @property
    def from_base(self) -> frozenset[str]:
        """Names of the base's tensors whose bytes are needed; the others are held here, or are no more."""
        return frozenset(set(self.base) - set(self.tensors) - set(self.removed)) | set(self.copied.values())


def is_delta(path: Path) -> bool:
    """Whether a file is one of our deltas, whatever it is called."""
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            head = file.read(9)
            length = int.from_bytes(head[:8], "little")
            return head[8:] == b"{" and length <= MAX_HEADER and b'"thawline":"delta/' in file.read(length)
    except OSError:
        return False


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is one checkpoint of a run."""
    return path.is_dir() and (path / manifest.NAME).is_file() and (path / DELTA).is_file()


def is_run(path: Path) -> bool:
    """Whether a folder is a run directory."""
    return path.is_dir() and not is_checkpoint(path) and ((path / BASE).is_file() or bool(_steps(path)))


def checkpoint_called(path: Path, name: str) -> Path:
    """The checkpoint of a run that has this name. Raises CheckpointError that lists those there are."""
    steps = _steps(path)
    if name not in steps:
        listed = ", ".join(sorted(steps)) or "none"
        raise CheckpointError(f"has no checkpoint {name!r}", where=str(path), fix=f"choose one of: {listed}")
    return path / "checkpoints" / name


def _steps(run: Path) -> list[str]:
    folder = run / "checkpoints"
    return [entry.name for entry in folder.iterdir() if _STEP.fullmatch(entry.name)] if folder.is_dir() else []


def newest_checkpoint(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The newest whole checkpoint of a run, and a note for each damaged one that was passed over.

    Raises CheckpointError if there is none.
    """
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = sorted((entry.name for entry in folder.iterdir() if _STEP.fullmatch(entry.name)), reverse=True)
    notes: list[str] = []
    for name in steps:
        problems = manifest.verify(folder / name)
        if not problems:
            return folder / name, tuple(notes)
        notes.append(f"{name} is damaged and was passed over: {problems[0]}")
    raise CheckpointError(
        "has no whole checkpoint", where=str(folder), fix="; ".join(notes) or "has the run written one yet?"
    )


def checked(path: Path) -> Path:
    """The delta of a checkpoint after its manifest was compared. Raises CheckpointError naming the first problem."""
    problems = manifest.verify(path)
    if problems:
        raise CheckpointError("; ".join(problems), where=str(path), fix="use another checkpoint of the run")
    return path / DELTA


def read_delta(path: Path) -> DeltaPlan:
    """Read a delta's header and metadata. Raises CheckpointError if it is damaged or of a later version."""
    file = MappedFile(path)
    stored, metadata = read_header(file, "delta")
    if metadata.get("thawline") != KIND:
        raise CheckpointError(
            f"is not a delta that this version reads ({metadata.get('thawline')!r}, wanted {KIND!r})",
            where=str(path),
            fix="update Thawline, or give another file",
        )
    claimed = metadata.pop("check", "")
    if claimed != str(blake3(json.dumps(dict(sorted(metadata.items()))).encode()).hexdigest()):
        raise CheckpointError("its metadata are altered", where=str(path), fix="take the delta from a copy")
    try:
        base = json.loads(metadata["base"])
        aliases: dict[str, str] = json.loads(metadata["aliases"])
        digests = _texts(json.loads(metadata["digests"]))
        tensors = sealed(stored, {n: d for n, d in digests.items() if n not in aliases}, where=str(path))
        for alias, kept in aliases.items():
            tensors[alias] = tensors[kept].renamed(alias, tied_to=kept)
        plan = DeltaPlan(
            tensors=tensors,
            digests=digests,
            base=_texts(base["digests"]),
            fingerprint=str(base["fingerprint"]),
            base_path=str(base["path"]),
            below=tuple(map(str, base["below"])),
            made=tuple(map(str, base.get("made", ()))),
            copied=_texts(json.loads(metadata["copied"])),
            removed=tuple(map(str, json.loads(metadata["removed"]))),
            adapters=adapters_in(metadata, {name: tensor.info.shape for name, tensor in tensors.items()}),
            file=file,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise CheckpointError(f"damaged: {exc}", where=str(path), fix="take the delta from a copy") from exc
    if set(plan.digests) != set(tensors):
        raise CheckpointError("tensors and digests are of different names", where=str(path), fix="take it from a copy")
    return plan


def adapters_in(metadata: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Adapter]:
    """The adapters that a delta records; empty where it has none, or is older than the record.

    shapes: of the delta's tensors. Raises ValueError where a record contradicts itself or the factors.
    """
    records = json.loads(metadata.get(ADAPTERS, "{}"))
    if not isinstance(records, dict):
        raise ValueError("the record of adapters is no mapping")
    found = {str(path): Adapter.from_json(record) for path, record in records.items()}
    for path, adapter in found.items():
        ranks = {shapes[first][0] for first, _ in factors(path) if shapes.get(first)}
        if ranks - {adapter.rank}:
            raise ValueError(f"the factors of {path} have rank {min(ranks)}, its record says {adapter.rank}")
    return found


def base_of_bare_delta(path: Path) -> Path | None:
    """Where the base of a delta file, or of a checkpoint that was taken out of its run, was; None for all else.

    Raises CheckpointError if it is damaged.
    """
    alone = is_checkpoint(path) and not is_run(path.parent.parent)
    if not alone and not is_delta(path):
        return None
    delta = read_delta(path / DELTA if alone else path)
    delta.file.close()
    return Path(delta.base_path)


def made_over(path: Path) -> tuple[str, ...]:
    """Fingerprints of what a run, its result, a checkpoint or a delta was made over, lowest first; empty for a base of
    its own, and where the record is damaged, which is for the reader of it to say."""
    try:
        if is_delta(path) or is_checkpoint(path):
            delta = read_delta(path / DELTA if path.is_dir() else path)
            delta.file.close()
            return (*delta.below, delta.fingerprint)
        for run in (path, path.parent) if path.name == "model" else (path,):
            if is_run(run) and (run / BASE).is_file():
                record = json.loads((run / BASE).read_bytes())
                return (*map(str, record["below"]), str(record["fingerprint"]))
    except (CheckpointError, OSError, ValueError, KeyError, TypeError):
        return ()
    return ()


def lies_below(below: Sequence[str], given: Collection[str], base_path: str) -> list[str]:
    """What is to be said of a base that was given though deltas lie between it and the one wanted; nothing else.

    below: what the wanted base was made over, lowest first; given: fingerprints that the given one may go by
    """
    levels = [level for level, fingerprint in enumerate(below) if fingerprint in given]
    if not levels:
        return []
    between = len(below) - levels[-1]
    what = "a delta made over it has" if between == 1 else f"{between} deltas, each made over the one before, have"
    last = f"; the last of them is {base_path}" if base_path else ""
    return [f"  the given one lies below: {what} to be applied first{last}"]


def read_averages(path: Path) -> tuple[dict[str, Planned], MappedFile]:
    """The averages (EMA) that a checkpoint keeps beside its weights, every name of tied ones, and their file.

    Raises CheckpointError if the run keeps none.
    """
    place = path / AVERAGES
    if not place.is_file():
        raise CheckpointError(
            "keeps no averaged weights: the run has no run.ema",
            where=str(path),
            fix="take the weights themselves, or train with run.ema",
        )
    file = MappedFile(place)
    stored, metadata = read_header(file)
    try:
        aliases = _texts(json.loads(metadata["aliases"]))
        return stored | {name: stored[kept].renamed(name, tied_to=kept) for name, kept in aliases.items()}, file
    except (ValueError, KeyError) as exc:
        raise CheckpointError(f"damaged: {exc}", where=str(place), fix="use another checkpoint of the run") from exc


def plan_alone(delta: DeltaPlan) -> Plan:
    """The delta's own tensors, without the base."""
    unchanged = set(delta.base) - set(delta.tensors) - set(delta.removed)
    absent = dict.fromkeys(sorted(unchanged), "unchanged from the base")
    return Plan(
        format=ALONE,
        tensors=delta.tensors,
        files=(delta.file,),
        not_held=absent | {name: f"as {origin!r} of the base" for name, origin in delta.copied.items()},
    )


def _texts(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise ValueError("a record of names is damaged")
    return value
