"""Our own tensor files: safetensors bytes of named tensors, the same bytes for the same tensors, read back verified.

Only what checkpoints and deltas need. Files of others are read in `formats/`. Unlike the safetensors package this hands
out the bytes piece by piece (so that they are hashed and written in one pass, through the store) and reads each tensor
into memory of its own, aligned as torch aligns it: views at odd addresses can change the last bits of later sums.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from thawline.ckpt.manifest import FileEntry
from thawline.ckpt.store import file_hasher
from thawline.core.digest import DTYPES
from thawline.errors import CheckpointError

Buffer = bytes | bytearray | memoryview

_TORCH: Final[Mapping[str, torch.dtype]] = {name: getattr(torch, ours) for ours, name in DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # the safetensors package's own limit
_PIECE = 8 << 20
_USE_ANOTHER = "use another checkpoint of the run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """Where one tensor lies: `dtype` in the safetensors spelling, `start` and `end` in bytes after the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, tuple[Slot, ...]]:
    """The file's first bytes and the place of each tensor, ordered as the safetensors package orders them: wider
    element types first, then by name. Raises CheckpointError for a tensor without plain bytes (sparse, meta, foreign).
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    slots: list[Slot] = []
    start = 0
    for name in order:
        tensor = tensors[name]
        spelling = DTYPES.get(str(tensor.dtype).removeprefix("torch."))
        if spelling is None or tensor.layout is not torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"a {tensor.layout} tensor of {tensor.dtype} on {tensor.device} has no plain bytes to save",
                where=name,
                fix="make it dense, of a plain element type, and materialised; or leave it out of the state",
            )
        end = start + tensor.numel() * tensor.element_size()
        slots.append(Slot(name=name, dtype=spelling, shape=tuple(tensor.shape), start=start, end=end))
        start = end
    fields: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for slot in slots:
        fields[slot.name] = {"dtype": slot.dtype, "shape": slot.shape, "data_offsets": (slot.start, slot.end)}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, tuple(slots)


def pieces(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[Buffer]:
    """The bytes of a safetensors file that holds `tensors`, without a copy for those that are dense and on the CPU."""
    head, slots = header(tensors, metadata)
    yield head
    for slot in slots:
        yield raw_bytes(tensors[slot.name])


def untied(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What has to be stored, sorted by name: of several names of one tensor the first, which the others lead to."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    places: dict[object, str] = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in places:
            aliases[name] = places[place]
        else:
            places[place] = name
            stored[name] = tensor
    return stored, aliases


def size_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
    """How many bytes `pieces` will give."""
    head, slots = header(tensors, metadata)
    return len(head) + (slots[-1].end if slots else 0)


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes, row major, little endian."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def read(path: Path, entry: FileEntry | None = None) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and tensors of a file, read once.

    entry: size and digest that the bytes must have; checked while they are read.
    Raises CheckpointError if the file is damaged, not a safetensors file, or not the one that `entry` describes.
    """
    hasher = file_hasher()
    tensors: dict[str, Tensor] = {}
    try:
        with open(path, "rb", buffering=0) as file:
            size = file.seek(0, 2)
            file.seek(0)
            if entry is not None and size != entry.size:
                raise _damaged(path, f"{size} bytes instead of {entry.size}")
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(_LARGEST_HEADER, size - 8):
                raise _damaged(path, "cut short, or not a safetensors file")
            text = file.read(length)
            hasher.update(head)
            hasher.update(text)
            metadata, slots = parse_header(text, size - 8 - length, where=path)
            for slot in slots:
                flat = torch.empty(prod(slot.shape), dtype=_TORCH[slot.dtype])
                view = raw_bytes(flat)
                for start in range(0, len(view), _PIECE):
                    part = view[start : start + _PIECE]
                    filled = 0
                    while filled < len(part):
                        count = file.readinto(part[filled:])
                        if not count:
                            raise _damaged(path, f"ends inside {slot.name!r}")
                        filled += count
                    hasher.update(part)
                tensors[slot.name] = flat.reshape(slot.shape)
    except OSError as exc:
        raise CheckpointError(f"cannot be read: {exc.strerror or exc}", where=str(path), fix=_USE_ANOTHER) from exc
    if entry is not None and hasher.hexdigest() != entry.digest:
        raise _damaged(path, f"digest {hasher.hexdigest()[:12]} instead of {entry.digest[:12]}")
    return metadata, tensors


def parse_header(text: bytes, data_bytes: int, *, where: Path) -> tuple[dict[str, str], tuple[Slot, ...]]:
    """Metadata and slots, in the order of the bytes. Raises CheckpointError unless they tile `data_bytes` exactly."""
    try:
        fields = json.loads(text, object_pairs_hook=_no_repeats)
        metadata = {str(key): str(value) for key, value in fields.pop("__metadata__", {}).items()}
        slots = sorted(
            (
                Slot(
                    name=name,
                    dtype=field["dtype"],
                    shape=tuple(int(n) for n in field["shape"]),
                    start=int(field["data_offsets"][0]),
                    end=int(field["data_offsets"][1]),
                )
                for name, field in fields.items()
            ),
            key=lambda slot: (slot.start, slot.end),
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as exc:
        raise _damaged(where, f"its header does not parse: {exc}") from exc
    position = 0
    for slot in slots:
        if slot.dtype not in _TORCH or min(slot.shape, default=0) < 0:
            raise _damaged(where, f"{slot.name!r} is {slot.dtype} of shape {slot.shape}")
        if slot.start != position or slot.end - slot.start != prod(slot.shape) * _TORCH[slot.dtype].itemsize:
            raise _damaged(where, f"{slot.name!r} does not fill the place its header gives it")
        position = slot.end
    if position != data_bytes:
        raise _damaged(where, f"its tensors fill {position} bytes of {data_bytes}")
    return metadata, tuple(slots)


def _no_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"damaged: {reason}", where=str(path), fix=_USE_ANOTHER)
