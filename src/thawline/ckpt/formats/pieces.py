"""Where the bytes of a tensor lie in files, and how to read them in bounded memory. Nothing is decided here.

A format reads metadata and states, for every tensor, an ordered sequence of parts: a contiguous range of a file, a
strided view, a box of the tensor, or zeros. `chunks` then gives the tensor's bytes in row-major order, straight from
the memory map where they are contiguous there, through a small buffer where they are not. Little endian throughout.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Final

from thawline.ckpt.formats.casting import cast
from thawline.errors import CheckpointError

ITEM_BYTES: Final[Mapping[str, int]] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
}  # fmt: skip
"""Bytes per element by the element type's name in the safetensors spelling."""

CHUNK_BYTES: Final = 4 << 20
_RELEASED: Final = 16 << 20  # each release interrupts the other cores
_RELEASED_LAST: Final = 256 << 10
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


class MappedFile:
    """A file open for reading by memory map: its pages are the system's to drop, not ours to hold.

    size:       bytes when it was opened
    descriptor: of the open file, where it has no name yet; it stays the caller's
    Raises CheckpointError if it cannot be opened or is not a regular file.
    """

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self.path = path
        self._map: mmap.mmap | None = None
        self._unnamed = descriptor is not None
        try:
            if descriptor is not None:
                descriptor = os.dup(descriptor)
            else:
                # Not blocking, because opening a pipe would wait for ever.
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as exc:
            raise CheckpointError(
                "is missing" if isinstance(exc, FileNotFoundError) else f"cannot be read: {exc.strerror}",
                where=str(path),
                fix="bring the file back, or use another checkpoint",
            ) from exc
        try:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise CheckpointError("is not a regular file", where=str(path), fix="give a file")
            self.size = info.st_size
            if self.size:
                self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
                if hasattr(self._map, "madvise") and hasattr(mmap, "MADV_SEQUENTIAL"):
                    self._map.madvise(mmap.MADV_SEQUENTIAL)
        except OSError as exc:
            raise CheckpointError(f"cannot be mapped: {exc.strerror}", where=str(path)) from exc
        finally:
            os.close(descriptor)

    def view(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop). Raises CheckpointError if they are not in the file or it has shrunk since."""
        if not 0 <= start <= stop <= self.size:
            raise CheckpointError(
                f"bytes {start} to {stop} are wanted, the file has {self.size}",
                where=str(self.path),
                fix="the file is cut short or its index is damaged: copy it again",
            )
        return memoryview(self._map)[start:stop] if self._map is not None else memoryview(b"")

    def release(self, start: int, stop: int) -> None:
        """Let go of the pages that lie whole in bytes [start, stop): they stay in the system's cache, not in ours."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = stop // mmap.PAGESIZE * mmap.PAGESIZE - first
        if self._map is not None and length > 0 and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED, first, length)

    def check_size(self) -> None:
        """Touching pages past the end of a file that shrank kills the process, so look before long reads."""
        if self._unnamed:
            return
        try:
            now = os.stat(self.path).st_size
        except OSError as exc:
            raise CheckpointError(f"vanished while it was read: {exc.strerror}", where=str(self.path)) from exc
        if now < self.size:
            raise CheckpointError(
                f"shrank from {self.size} to {now} bytes while it was read",
                where=str(self.path),
                fix="wait until whoever writes it is done",
            )

    def close(self) -> None:
        if self._map is None:
            return
        try:
            self._map.close()
        except BufferError:
            return  # a caller still holds bytes of it; the map goes when the last of them does


@dataclass(slots=True, eq=False)
class Region:
    """A stretch of a file that holds tensor data and, where the format has one, its checksum.

    crc:   CRC-32 of the stretch; None if the format keeps no checksum
    label: what the stretch is called in messages, e.g. "optim.pt: record data/3"
    """

    file: MappedFile
    offset: int
    nbytes: int
    crc: int | None = None
    label: str = ""
    _checked: bool = False
    _lock: Lock = field(default_factory=Lock)

    def view(self, start: int, stop: int) -> memoryview:
        if not 0 <= start <= stop <= self.nbytes:
            raise CheckpointError(
                f"bytes {start} to {stop} are wanted, {self.label or 'the data'} has {self.nbytes}",
                where=str(self.file.path),
                fix="the checkpoint is damaged: use another one",
            )
        return self.file.view(self.offset + start, self.offset + stop)

    def release(self, start: int, stop: int, *, last: bool) -> int:
        """Let go of the pages of bytes [start, stop) if they are worth a call; returns what is still to be let go.

        last: nothing follows, so little is worth it too
        """
        if stop - start >= _RELEASED or (last and stop - start >= _RELEASED_LAST):
            self.file.release(self.offset + start, self.offset + stop)
            return stop
        return start

    def check(self) -> None:
        """Compare the stretch with its checksum, once. Raises CheckpointError naming it."""
        with self._lock:
            if self._checked:
                return
            self.file.check_size()
            if self.crc is not None:
                found = 0
                released = 0
                for start in range(0, self.nbytes, CHUNK_BYTES):
                    stop = min(start + CHUNK_BYTES, self.nbytes)
                    found = zlib.crc32(self.view(start, stop), found)
                    released = self.release(released, stop, last=stop == self.nbytes)
                if found != self.crc:
                    raise CheckpointError(
                        f"{self.label} is altered: CRC-32 {found:08x} instead of {self.crc:08x}",
                        where=str(self.file.path),
                        fix="copy the file again from where it was written, or use another checkpoint",
                    )
            self._checked = True


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


Part = Linear | Strided | Boxes | Zeros


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


def chunks(tensor: Planned, chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
    """The tensor's bytes in row-major order, at most `chunk_bytes` (at least one element) at a time.

    A view given out is valid until the next one is asked for. Checksums are the caller's concern (`Region.check`).
    """
    if tensor.stored in ("", tensor.info.dtype):
        yield from _stored_chunks(tensor.parts, ITEM_BYTES[tensor.info.dtype], chunk_bytes)
        return
    for chunk in _stored_chunks(tensor.parts, ITEM_BYTES[tensor.stored], chunk_bytes):
        yield cast(chunk, tensor.stored, tensor.info.dtype)


def _stored_chunks(parts: Sequence[Part], item: int, chunk_bytes: int) -> Iterator[memoryview]:
    step = max(chunk_bytes // item, 1)
    for part in parts:
        if isinstance(part, Linear):
            released = part.offset
            for start in range(0, part.count, step):
                stop = min(start + step, part.count)
                begin, end = part.offset + start * item, part.offset + stop * item
                yield part.region.view(begin, end)
                released = part.region.release(released, end, last=stop == part.count)
        elif isinstance(part, Zeros):
            zeros = memoryview(bytes(min(step, part.count) * item))
            for start in range(0, part.count, step):
                yield zeros[: (min(start + step, part.count) - start) * item]
        elif isinstance(part, Strided):
            yield from _gathered(part, item, min(step, _GATHER))
        else:
            yield from _assembled(part, item, step)


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


def inside(root: Path, name: object) -> Path:
    """The path of file `name`, which an index or a listing mentions, under the folder `root`.

    Raises CheckpointError where it would lead outside: absolute, through `..`, or by a symbolic link. The one kind of
    link out of the folder that is accepted is the Hugging Face hub cache's own (snapshots/X/f -> blobs/...).
    """
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name:
        raise CheckpointError(f"{name!r} is not a file name", where=str(root), fix="the index is damaged")
    relative = Path(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise CheckpointError(
            f"its index leads outside the checkpoint: {name!r}", where=str(root), fix="do not trust this checkpoint"
        )
    path = root / relative
    try:
        home, real = root.resolve(), path.resolve()
    except (OSError, RuntimeError) as exc:
        raise CheckpointError(f"{name!r} cannot be resolved: {exc}", where=str(root)) from exc
    blobs = home.parent.parent / "blobs"
    if real.is_relative_to(home) or (home.parent.name == "snapshots" and real.is_relative_to(blobs)):
        return path
    raise CheckpointError(
        f"{name!r} is a link that leads outside the checkpoint, to {real}",
        where=str(root),
        fix="copy the file itself into the folder",
    )


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
