"""The header of a safetensors file, read and checked without the safetensors package.

The same rules as the reference reader (safetensors/src/tensor.rs): the header is at most 100 MB, the data that it lists
cover the rest of the file without gaps and without overlap, and sizes fit shapes and element types.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from thawline.ckpt.formats.mapped import MappedFile, Region
from thawline.ckpt.formats.pieces import ITEM_BYTES, Linear, Planned, TensorInfo, elements
from thawline.errors import CheckpointError

MAX_HEADER: Final = 100_000_000
DIGESTS: Final = "thawline.digests"
"""Metadata entry of the safetensors files that `convert` writes: name -> digest, as JSON."""


_OFFSETS: Final = "DCP_SHARDING_INFO"  # torch/distributed/checkpoint/_hf_utils.py
_PIECES = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")


def read_header(file: MappedFile, origin: str = "") -> tuple[dict[str, Planned], dict[str, str]]:
    """The tensors of a safetensors file in file order, and its metadata; sealed with the digests that it records.

    Raises CheckpointError naming the file, the tensor and what is wrong.
    """
    where = str(file.path)

    def damaged(what: str) -> CheckpointError:
        return CheckpointError(what, where=where, fix="copy the file again, or use another checkpoint")

    if file.size < 8:
        raise damaged(f"is no safetensors file: it has {file.size} bytes")
    (length,) = struct.unpack("<Q", file.view(0, 8))
    if length > MAX_HEADER or 8 + length > file.size:
        raise damaged(f"states a header of {length} bytes; the file has {file.size}")
    try:
        header = json.loads(bytes(file.view(8, 8 + length)), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as exc:
        raise damaged(f"has a header that is no JSON: {exc}") from exc
    if not isinstance(header, dict):
        raise damaged("has a header that is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged("has metadata that are not text")
    data = Region(file, 8 + length, file.size - 8 - length, None, "the data")
    spans: list[tuple[int, int, str]] = []
    planned: dict[str, Planned] = {}
    for name, entry in header.items():
        dtype, shape, start, stop = _entry(entry, name, where)
        if stop - start != elements(shape, where=where) * ITEM_BYTES[dtype]:
            raise damaged(f"tensor {name!r}: {stop - start} bytes do not hold {dtype} of shape {shape}")
        spans.append((start, stop, name))
        info = TensorInfo(name=name, dtype=dtype, shape=shape, origin=origin)
        planned[name] = Planned(info=info, parts=(Linear(data, start, info.elements),))
    position = 0
    for start, stop, name in sorted(spans):
        if start != position:
            raise damaged(f"tensor {name!r} begins at byte {start} of the data instead of {position}")
        position = stop
    if position != data.nbytes:
        raise damaged(f"lists {position} bytes of data; the file has {data.nbytes}")
    ordered = {name: planned[name] for _, _, name in sorted(spans)}
    if _holds_pieces(file.path.name, metadata.get(_OFFSETS, "")):
        raise CheckpointError(
            "holds pieces of tensors (HuggingFaceStorageWriter with save_distributed); no file says how many there "
            "are, so a missing one would not show",
            where=where,
            fix="consolidate them with the tool that wrote them (enable_consolidation=True), or save with "
            "torch.distributed.checkpoint's own writer",
        )
    if DIGESTS not in metadata:
        return ordered, metadata
    try:
        return sealed(ordered, json.loads(metadata[DIGESTS]), where=where), metadata
    except (ValueError, RecursionError) as exc:
        raise damaged(f"its record of digests is damaged: {exc}") from exc


def _holds_pieces(name: str, offsets: str) -> bool:
    """Whether a file that torch.distributed.checkpoint wrote holds parts of tensors: one of several by its name, or
    by where its tensors begin in the whole. Its writer of whole tensors notes offsets too, all of them zero."""
    try:
        places = json.loads(offsets).values() if offsets else ()
        return any(_PIECES.fullmatch(name) or any(place["saved_offsets"]) for place in places)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return True  # whatever it says, it does not say that the tensors are whole


def sealed(tensors: Mapping[str, Planned], digests: Any, *, where: str) -> dict[str, Planned]:
    """Tensors of a safetensors file, each to be compared with the digest recorded for it before its bytes are used.

    Raises CheckpointError if a tensor with a recorded digest is not there, ValueError if `digests` is no record of any.
    """
    if not isinstance(digests, dict) or not all(isinstance(value, str) for value in digests.values()):
        raise ValueError("not names and digests")
    missing = sorted(digests.keys() - tensors.keys())
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors are missing, first {missing[0]!r}", where=where, fix="copy the file again"
        )
    return {name: _seal(tensor, digests.get(name)) for name, tensor in tensors.items()}


def _seal(tensor: Planned, digest: str | None) -> Planned:
    (part,) = tensor.parts
    if digest is None or not isinstance(part, Linear):
        return tensor
    info, data = tensor.info, part.region
    head = f"{info.dtype}[{','.join(map(str, info.shape))}]".encode() + b"\0"
    own = Region(data.file, data.offset + part.offset, info.nbytes, None, f"tensor {info.name!r}", (head, digest))
    return replace(tensor, parts=(Linear(own, 0, part.count),))


def make_header(infos: Sequence[TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a safetensors file and where the data of each tensor begin, from the start of the file.

    Data are ordered as the reference writer orders them: wide element types first, so that all are aligned, then by
    name. Raises CheckpointError if the header would be larger than readers accept.
    """
    ordered = sorted(infos, key=lambda info: (-ITEM_BYTES[info.dtype], info.name))
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    places: dict[str, int] = {}
    position = 0
    for info in ordered:
        if info.name == "__metadata__":
            raise CheckpointError(
                "a tensor is called '__metadata__', a name that safetensors keeps for itself",
                fix="write torch's format (--to torch), or change the name (--rename)",
            )
        entries[info.name] = {
            "dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, position + info.nbytes]
        }  # fmt: skip
        places[info.name] = position
        position += info.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise CheckpointError(
            f"the header would have {len(text)} bytes; readers accept {MAX_HEADER}",
            fix="write torch's format (--to torch)",
        )
    head = struct.pack("<Q", len(text)) + text
    return head, {name: len(head) + place for name, place in places.items()}


def _entry(entry: Any, name: str, where: str) -> tuple[str, tuple[int, ...], int, int]:
    if isinstance(entry, Mapping):
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if isinstance(dtype, str) and dtype not in ITEM_BYTES:
            raise CheckpointError(f"tensor {name!r} has the unknown element type {dtype!r}", where=where)
        if (
            isinstance(dtype, str)
            and isinstance(shape, list)
            and isinstance(offsets, list)
            and len(offsets) == 2
            and all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in offsets + shape)
        ):
            return dtype, tuple(shape), offsets[0], offsets[1]
    raise CheckpointError(f"tensor {name!r} has a damaged entry in the header", where=where, fix="copy the file again")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found
