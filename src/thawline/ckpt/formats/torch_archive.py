"""A file that `torch.save` wrote, of today's kind (a zip of records) or of before torch 1.6 (pickles, then data).

`open_archive` reads only the pickle; tensors become `TensorRef`s, and `place` says where the bytes of one lie. Torch is
not imported. Formats: torch/serialization.py, `_save` and `_legacy_save`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from thawline.ckpt.formats.mapped import MappedFile, Region
from thawline.ckpt.formats.pickle_names import StorageRef, TensorRef
from thawline.ckpt.formats.pieces import ITEM_BYTES, Linear, Part, Planned, Strided, TensorInfo, elements, is_row_major
from thawline.ckpt.formats.unpickle import unpickle
from thawline.ckpt.formats.zip_records import read_records
from thawline.errors import CheckpointError

_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL: Final = 1001
_MAX_DEPTH: Final = 8
_MOST_EXPANDED: Final = 4096
_SMALL_BYTES: Final = 64 << 20
"""A view may repeat its data (stride zero): up to this size always, beyond it only so many times over."""


@dataclass(frozen=True, slots=True)
class TorchArchive:
    """A torch file, opened.

    value:    what was saved, with TensorRef in place of tensors
    storages: key of a StorageRef -> where its bytes lie
    """

    file: MappedFile
    value: Any
    storages: Mapping[str, Region]

    @property
    def where(self) -> str:
        return str(self.file.path)

    def place(self, tensor: TensorRef) -> Part:
        """Where the bytes of a tensor lie. Raises CheckpointError if they are not all in the file."""
        storage = tensor.storage
        region = self.storages.get(storage.key)
        if region is None:
            raise CheckpointError(
                f"a tensor's data (storage {storage.key!r}) is not in the file", where=self.where, fix="copy it again"
            )
        item = ITEM_BYTES[tensor.dtype]
        stated = storage.count * (ITEM_BYTES[storage.dtype] if storage.dtype else 1)
        if stated != region.nbytes:
            raise CheckpointError(
                f"{region.label} has {region.nbytes} bytes, its tensors expect {stated}",
                where=self.where,
                fix="the file is damaged: copy it again",
            )
        first = storage.view[0] if storage.view else 0
        count = elements(tensor.shape, where=self.where)
        reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.strides, strict=True)) + 1
        if count and (first + tensor.offset + reach) * item > stated:
            raise CheckpointError(
                f"a tensor of shape {tensor.shape} reaches past the end of {region.label}",
                where=self.where,
                fix="the file is damaged: copy it again",
            )
        if count * item > max(stated * _MOST_EXPANDED, _SMALL_BYTES):
            raise CheckpointError(
                f"a tensor of shape {tensor.shape} repeats the {stated} bytes of {region.label} without end",
                where=self.where,
                fix="do not trust this file; an expanded tensor has to be saved dense",
            )
        offset = (first + tensor.offset) * item
        if count == 0:
            return Linear(region, 0, 0)
        if is_row_major(tensor.shape, tensor.strides):
            return Linear(region, offset, count)
        return Strided(region, offset, tensor.shape, tensor.strides)

    def plan(self, name: str, tensor: TensorRef, origin: str = "") -> Planned:
        """One tensor as a value of the plan."""
        info = TensorInfo(name=name, dtype=tensor.dtype, shape=tensor.shape, origin=origin)
        return Planned(info=info, parts=(self.place(tensor),))

    def plan_state_dict(self, state: Mapping[Any, Any], origin: str = "") -> dict[str, Planned]:
        """The tensors of a flat mapping from names to tensors, ties recorded. Other values are left out."""
        first: dict[object, str] = {}
        planned: dict[str, Planned] = {}
        for name, value in state.items():
            if not isinstance(name, str) or not isinstance(value, TensorRef):
                continue
            tensor = self.plan(name, value, origin)
            identity = (value.storage.key, value.dtype, value.offset, value.shape, value.strides)
            kin = first.setdefault(identity, name) if tensor.info.elements else name
            planned[name] = tensor if kin == name else tensor.renamed(name, tied_to=kin)
        return planned

    def scalar(self, value: object) -> float | None:
        """The number in a tensor of one element, or the number itself; None if it is neither."""
        if isinstance(value, bool | int | float):
            return float(value)
        if not isinstance(value, TensorRef) or elements(value.shape, where=self.where) != 1:
            return None
        part = self.place(value)
        assert isinstance(part, Linear)
        kind = {"F32": "<f", "F64": "<d", "I64": "<q", "I32": "<i", "F16": "<e"}.get(value.dtype)
        if kind is None:
            return None
        part.region.check()
        data = part.region.view(part.offset, part.offset + ITEM_BYTES[value.dtype])
        return float(struct.unpack(kind, data)[0])


def open_archive(path: Path, file: MappedFile | None = None, start: int = 0, length: int | None = None) -> TorchArchive:
    """Open a torch file, or the one that fills bytes [start, start + length) of an open file.

    Raises CheckpointError naming the file and the cause; nothing of it is run.
    """
    file = file or MappedFile(path)
    length = file.size - start if length is None else length
    head = bytes(file.view(start, min(start + 4, start + length)))
    if head == b"PK\x03\x04":
        return _open_zip(file, start, length)
    if head[:1] == b"\x80" and start == 0:
        return _open_legacy(file)
    raise CheckpointError(
        f"is not a torch file: it begins with {head!r}",
        where=str(path),
        fix="give a file written by torch.save; an empty or cut file has to be copied again",
    )


def is_torch_file(head: bytes) -> bool:
    """Whether the first bytes of a file are those of a torch file.

    An old one begins with a pickled number (a frame first, from protocol 4). The third byte tells it from a safetensors
    file whose header happens to have 640 bytes, which begins 80 02 00.
    """
    old = head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and head[2:3] in (b"\x8a", b"\x95")
    return old or head[:4] == b"PK\x03\x04"


def _open_zip(file: MappedFile, start: int, length: int) -> TorchArchive:
    where = str(file.path)
    records = read_records(file, start, length)
    pickles = [name for name in records if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].count("/") > 1:
        raise CheckpointError(
            f"is a zip archive with {len(pickles)} records data.pkl, not a torch file",
            where=where,
            fix="give a file written by torch.save",
        )
    root = pickles[0].removesuffix("data.pkl")
    if any(name.startswith((f"{root}code/", f"{root}constants.pkl")) for name in records):
        raise CheckpointError(
            "is a TorchScript program, not a state dict",
            where=where,
            fix="save its state dict: torch.save(torch.jit.load(path).state_dict(), ...)",
        )
    order = records.get(f"{root}byteorder")
    if order is not None and bytes(order.view(0, order.nbytes)) not in (b"little", b""):
        raise CheckpointError("was written on a big-endian machine", where=where, fix="save it on this one")
    program = records[pickles[0]]
    program.check()
    value, _ = unpickle(program.view(0, program.nbytes), where=where)
    prefix = f"{root}data/"
    storages = {name[len(prefix) :]: record for name, record in records.items() if name.startswith(prefix)}
    return TorchArchive(file, value, storages)


def _open_legacy(file: MappedFile) -> TorchArchive:
    where = str(file.path)
    data = file.view(0, file.size)

    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f"{what}, so it is no torch file or a cut one", where=where, fix="copy the file again")

    # The pickles come first, and how long they are shows only when they are read; data may be of any size.
    magic, at = _leading(data, 0, where)
    if magic != _LEGACY_MAGIC:
        raise damaged("begins with a pickle that is not torch's")
    protocol, at = _leading(data, at, where)
    system, at = _leading(data, at, where)
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict):
        raise damaged(f"states protocol {protocol!r}")
    if system.get("little_endian") is not True:
        raise CheckpointError("was written on a big-endian machine", where=where, fix="save it on this one")
    value, at = _leading(data, at, where)
    keys, at = _leading(data, at, where)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise damaged("has no list of its storages")
    known = {storage.key: storage for storage in _storages(value, set(), 0)}
    found: dict[str, Region] = {}
    for key in keys:
        if key not in known or key in found:
            raise damaged(f"lists a storage {key!r} that no tensor has")
        if at + 8 > len(data):
            raise damaged(f"ends before storage {key!r}")
        (count,) = struct.unpack_from("<q", data, at)
        nbytes = known[key].count * ITEM_BYTES[known[key].dtype or "U8"]
        at += 8
        if count != known[key].count or at + nbytes > len(data):
            raise damaged(f"ends inside storage {key!r}")
        found[key] = Region(file, at, nbytes, None, f"storage {key!r}")
        at += nbytes
    if at != len(data):
        raise damaged(f"has {len(data) - at} bytes after its last storage")
    return TorchArchive(file, value, found)


def _leading(data: memoryview, at: int, where: str) -> tuple[Any, int]:
    window = data[at : at + (64 << 20)]
    value, end = unpickle(window, where=where)
    return value, at + end


def _storages(value: Any, seen: set[int], depth: int) -> Iterator[StorageRef]:
    if isinstance(value, TensorRef):
        yield value.storage
    elif isinstance(value, dict | list | tuple) and depth < _MAX_DEPTH and id(value) not in seen:
        seen.add(id(value))
        for item in value.values() if isinstance(value, dict) else value:
            yield from _storages(item, seen, depth + 1)
