"""A single safetensors file, as anybody writes it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from thawline.ckpt.formats.mapped import MappedFile, inside
from thawline.ckpt.formats.pieces import Plan, Planned
from thawline.ckpt.formats.safetensors_header import MAX_HEADER, read_header
from thawline.errors import CheckpointError


def looks_like(path: Path) -> bool:
    """Whether the file is called so, or begins like one: a header length, then a JSON object."""
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except OSError:
        return False
    begins = len(head) == 9 and struct.unpack("<Q", head[:8])[0] <= MAX_HEADER and head[8:] == b"{"
    return begins or path.suffix == ".safetensors"


def plan(path: Path) -> Plan:
    """What the file holds. Raises CheckpointError naming the file and the cause."""
    file = MappedFile(path)
    tensors, metadata = read_header(file, "file")
    config = None
    beside = path.parent / "config.json"
    if beside.is_file() and path.name == "model.safetensors":
        try:
            value = json.loads(inside(path.parent, "config.json").read_bytes())
        except (OSError, ValueError, RecursionError) as exc:
            raise CheckpointError(f"cannot be read: {exc}", where=str(beside), fix="copy the file again") from exc
        config = value if isinstance(value, dict) else None
    return Plan(
        format="safetensors",
        tensors=_with_ties(tensors, metadata, path),
        files=(file,),
        metadata=metadata,
        config=config,
    )


def _with_ties(tensors: dict[str, Planned], metadata: dict[str, str], path: Path) -> dict[str, Planned]:
    """Ties that this project recorded when it wrote the file; the data are stored under each name."""
    if "thawline.tied" not in metadata:
        return tensors
    try:
        ties = json.loads(metadata["thawline.tied"])
        pairs = [(str(alias), str(kept)) for alias, kept in ties.items()]
    except (ValueError, AttributeError) as exc:
        raise CheckpointError(f"has a damaged record of ties: {exc}", where=str(path), fix="convert it again") from exc
    found = dict(tensors)
    for alias, kept in pairs:
        if alias in found and kept in found:
            found[alias] = found[alias].renamed(alias, tied_to=kept)
    return found
