"""Where the bytes of a tensor lie in files, and how to read them in bounded memory. Nothing is decided here.

A format reads metadata and states, for every tensor, an ordered sequence of parts: a contiguous range of a file, a
strided view, a box of the tensor, zeros, or what arithmetic makes of other tensors. `chunks` then gives the tensor's
bytes in row-major order, straight from the memory map where they are contiguous there, through a small buffer where
they are not. Little endian throughout.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from thawline.ckpt.formats.casting import cast
from thawline.ckpt.formats.checksum import crc32
from thawline.ckpt.formats.mapped import CHUNK_BYTES, MappedFile, Region
from thawline.errors import CheckpointError

ITEM_BYTES: Final[Mapping[str, int]] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
}  # fmt: skip
"""Bytes per element by the element type's name in the safetensors spelling."""

_GATHER: Final = 1 << 15  # elements gathered at a time from a non-contiguous view: its index table stays in the cache
_MAX_ELEMENTS: Final = 1 << 60  # products of shapes stay inside 64 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor of a checkpoint, without its data.

    name:    as the source spells it
    dtype:   element type in the safetensors spelling, e.g. "BF16"
    shape:   elements per dimension, outermost first
    origin:  where the values come from, e.g. "master weights", "module", "frozen fragment", "base"
    tied_to: the name of the tensor that this one is tied to; None if it is not, or is the first of its kin
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    origin: str = ""
    tied_to: str | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Linear:
    """`count` elements that lie one after another, from byte `offset` of `region`."""

    region: Region
    offset: int
    count: int


@dataclass(frozen=True, slots=True)
class Strided:
    """A view that is not row-major in its file: `strides` in elements, first element at byte `offset`."""

    region: Region
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Boxes:
    """A whole tensor of `shape` cut into boxes, each row-major in its own place: (start, size, data)."""

    shape: tuple[int, ...]
    boxes: tuple[tuple[tuple[int, ...], tuple[int, ...], Linear], ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Zeros:
    """`count` elements of value zero, for a tensor whose absence means zero."""

    count: int


@dataclass(frozen=True, slots=True)
class Computed:
    """A whole tensor that arithmetic makes of others when it is asked for: a mean, a merged adapter.

    sources: the tensors it is made of
    make:    gives all its bytes, in pieces of at most about so many
    """

    sources: tuple[Planned, ...]
    make: Callable[[int], Iterator[memoryview]]


Part = Linear | Strided | Boxes | Zeros | Computed


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A tensor and the parts that hold it, in order.

    stored: element type in the file; "" if it is the tensor's own, else values are given in the tensor's
    """

    info: TensorInfo
    parts: tuple[Part, ...]
    stored: str = ""

    def renamed(self, name: str, **changes: object) -> Planned:
        """The same data under another name; `changes` are fields of TensorInfo."""
        return replace(self, info=replace(self.info, name=name, **changes))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a checkpoint holds: the answer of every format.

    format:   e.g. "deepspeed zero-2", in words for people
    tensors:  by name, in the source's order
    files:    the mapped files behind the tensors, to be closed after use
    notes:    what a reader should know, one sentence each (tag recovered, names skipped)
    not_held: names that the source mentions and cannot give, with the reason
    sidecars: files that belong to the weights and travel with them: file name at the target -> path
    config:   the model's configuration if one lies beside the weights, as parsed
    widen:    True where half-precision tensors are roundings of a full-precision model (training checkpoints)
    metadata: text the file itself carries
    """

    format: str
    tensors: Mapping[str, Planned]
    files: tuple[MappedFile, ...] = ()
    notes: tuple[str, ...] = ()
    not_held: Mapping[str, str] = field(default_factory=dict)
    sidecars: Mapping[str, Path] = field(default_factory=dict)
    config: Mapping[str, object] | None = None
    widen: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)


def regions(tensor: Planned) -> Iterator[Region]:
    """The stretches of files that a tensor's data lies in, in order, with repetitions."""
    for part in tensor.parts:
        if isinstance(part, Linear | Strided):
            yield part.region
        elif isinstance(part, Boxes):
            for _, _, data in part.boxes:
                yield data.region
        elif isinstance(part, Computed):
            for source in part.sources:
                yield from regions(source)


def chunks(tensor: Planned, chunk_bytes: int = CHUNK_BYTES, *, note: bool = False) -> Iterator[memoryview]:
    """The tensor's bytes in row-major order, at most `chunk_bytes` (at least one element) at a time.

    A view given out is valid until the next one is asked for. Checksums are the caller's concern (`Region.check`).

    note: tell the regions the checksums of what goes by, so that a check afterwards need not read it again
    """
    if tensor.stored in ("", tensor.info.dtype):
        yield from _stored_chunks(tensor.parts, ITEM_BYTES[tensor.info.dtype], chunk_bytes, note)
        return
    for chunk in _stored_chunks(tensor.parts, ITEM_BYTES[tensor.stored], chunk_bytes, note):
        yield cast(chunk, tensor.stored, tensor.info.dtype)


def _stored_chunks(parts: Sequence[Part], item: int, chunk_bytes: int, note: bool) -> Iterator[memoryview]:
    step = max(chunk_bytes // item, 1)
    for part in parts:
        if isinstance(part, Linear):
            yield from _linear(part, item, step, note)
        elif isinstance(part, Zeros):
            zeros = memoryview(bytes(min(step, part.count) * item))
            for start in range(0, part.count, step):
                yield zeros[: (min(start + step, part.count) - start) * item]
        elif isinstance(part, Strided):
            yield from _gathered(part, item, min(step, _GATHER))
        elif isinstance(part, Computed):
            yield from part.make(chunk_bytes)
        else:
            yield from _assembled(part, item, step)


def _linear(part: Linear, item: int, step: int, note: bool) -> Iterator[memoryview]:
    region, stop = part.region, part.offset + part.count * item
    noted = note and region.crc is not None
    crc = 0
    for view in region.stream(part.offset, stop, step * item):
        if noted:
            crc = crc32(view, crc)
        yield view
    if noted:
        region.saw(part.offset, stop, crc)


def read(tensor: Planned) -> memoryview:
    """All bytes of a tensor, checksums checked; straight from the memory map where they are contiguous there."""
    for region in regions(tensor):
        region.check()
    if len(tensor.parts) == 1 and isinstance(tensor.parts[0], Linear) and not tensor.stored:
        part = tensor.parts[0]
        return part.region.view(part.offset, part.offset + part.count * ITEM_BYTES[tensor.info.dtype])
    out = bytearray(tensor.info.nbytes)
    position = 0
    for chunk in chunks(tensor):
        out[position : position + len(chunk)] = chunk
        position += len(chunk)
    return memoryview(out)


def elements(shape: Sequence[int], *, where: str) -> int:
    """Number of elements of a shape from a file. Raises CheckpointError if it is no shape."""
    count = 1
    for size in shape:
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise CheckpointError(f"{tuple(shape)!r} is not a shape", where=where, fix="the file is damaged")
        count *= size
        if count > _MAX_ELEMENTS:
            raise CheckpointError(f"shape {tuple(shape)} is too large to exist", where=where, fix="the file is damaged")
    return count


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides in elements of a row-major tensor.

    >>> row_major((2, 3, 4))
    (12, 4, 1)
    """
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return tuple(strides)


def is_row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a view is contiguous; axes of size one may have any stride, and an empty view always is."""
    if 0 in shape:
        return True
    return all(size == 1 or have == want for size, have, want in zip(shape, strides, row_major(shape), strict=True))


def _gathered(part: Strided, item: int, step: int) -> Iterator[memoryview]:
    import numpy as np

    # Only the elements that the view spans are touched.
    span = 1 + sum((size - 1) * stride for size, stride in zip(part.shape, part.strides, strict=True))
    kind = {1: "u1", 2: "<u2", 4: "<u4", 8: "<u8"}[item]
    data = np.frombuffer(part.region.view(part.offset, part.offset + span * item), dtype=kind)
    for start in range(0, part.count, step):
        index = np.arange(start, min(start + step, part.count), dtype=np.int64)
        source = np.zeros_like(index)
        for size, stride in zip(reversed(part.shape), reversed(part.strides), strict=True):
            index, place = np.divmod(index, size)
            source += place * stride
        yield data[source].view(np.uint8).data


def _assembled(part: Boxes, item: int, step: int) -> Iterator[memoryview]:
    buffer = bytearray(min(step, part.count) * item)
    runs = [_Runs(part.shape, start, size, data) for start, size, data in part.boxes if 0 not in size]
    for start in range(0, part.count, step):
        stop = min(start + step, part.count)
        for run in runs:
            run.copy(buffer, start, stop, item)
        yield memoryview(buffer)[: (stop - start) * item]


class _Runs:
    """A box as runs that are contiguous both in the tensor and in the file, found by arithmetic and not listed."""

    def __init__(self, shape: tuple[int, ...], start: tuple[int, ...], size: tuple[int, ...], data: Linear) -> None:
        # Trailing axes that the box covers whole belong to one run, together with the axis before them.
        axis = len(shape)
        while axis > 0 and size[axis - 1] == shape[axis - 1]:
            axis -= 1
        axis = max(axis - 1, 0)
        strides = row_major(shape)
        self._outer = size[:axis]
        self._strides = strides[:axis]
        self._length = math.prod(size[axis:])
        self._base = sum(at * stride for at, stride in zip(start, strides, strict=True))
        self._count = math.prod(self._outer)
        self._data = data

    def _place(self, run: int) -> int:
        """Where run number `run` begins in the tensor; grows with `run`."""
        place = self._base
        for size, stride in zip(reversed(self._outer), reversed(self._strides), strict=True):
            run, index = divmod(run, size)
            place += index * stride
        return place

    def copy(self, out: bytearray, start: int, stop: int, item: int) -> None:
        """Copy what lies in elements [start, stop) of the tensor to its place in `out`."""
        first = bisect_left(range(self._count), start - self._length + 1, key=self._place)
        for run in range(first, self._count):
            place = self._place(run)
            if place >= stop:
                return
            begin, end = max(place, start), min(place + self._length, stop)
            source = self._data.offset + (run * self._length + begin - place) * item
            out[(begin - start) * item : (end - start) * item] = self._data.region.view(
                source, source + (end - begin) * item
            )
