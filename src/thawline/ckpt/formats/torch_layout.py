"""The layout of a file that torch.load reads, computed before any data: its pickle, its records and their places.

Torch's archive is a zip of stored records, each beginning at a multiple of 64 bytes. All sizes are known beforehand, so
data can be written in any order; the headers need each record's CRC-32 and are made last. Tied names share one record,
so that loading ties them again. Written as torch/serialization.py `_save` does it; read by `weights_only=True`.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from thawline.ckpt.formats.pieces import ITEM_BYTES, TensorInfo, row_major
from thawline.errors import CheckpointError

_STORAGE: Final = {
    "F64": "DoubleStorage", "F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage",
    "I64": "LongStorage", "I32": "IntStorage", "I16": "ShortStorage", "I8": "CharStorage", "U8": "ByteStorage",
    "BOOL": "BoolStorage",
    "C64": "ComplexFloatStorage",
}  # fmt: skip
_NEWER: Final = {
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""Element types without a storage class of their own: untyped bytes and the type beside them."""

_ALIGN: Final = 64
_WIDE: Final = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Record:
    """A record of the archive: its name, where its header and its data begin, and its bytes.

    data: the content, where it is small and known now; None for tensor data that are written later
    """

    name: str
    header: int
    begin: int
    nbytes: int
    data: bytes | None


@dataclass(frozen=True, slots=True)
class TorchLayout:
    """Where everything of the file goes.

    places: tensor name -> (record number, first byte); tied names lead to the same record
    size:   bytes before the directory, which `directory` makes
    """

    records: tuple[Record, ...]
    places: Mapping[str, tuple[int, int]]
    size: int

    def headers(self, checksums: Mapping[int, int]) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of every record's header, and of the data known beforehand.

        checksums: record number -> CRC-32 of the data written for it
        """
        for number, record in enumerate(self.records):
            crc = zlib.crc32(record.data) if record.data is not None else checksums[number]
            yield record.header, _local_header(record, crc)
            if record.data is not None:
                yield record.begin, record.data

    def directory(self, checksums: Mapping[int, int]) -> bytes:
        """The bytes that follow the records."""
        entries = b"".join(
            _central_header(record, zlib.crc32(record.data) if record.data is not None else checksums[number])
            for number, record in enumerate(self.records)
        )
        count, begin = len(self.records), self.size
        end = b""
        if count >= 0xFFFF or begin >= _WIDE or len(entries) >= _WIDE:
            end64 = begin + len(entries)
            end = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(entries), begin)
            end += struct.pack("<4sLQL", b"PK\x06\x07", 0, end64, 1)
        narrow = min(count, 0xFFFF)
        end += struct.pack(
            "<4s4H2LH", b"PK\x05\x06", 0, 0, narrow, narrow, min(len(entries), _WIDE), min(begin, _WIDE), 0
        )
        return entries + end


def lay_out(
    infos: Sequence[TensorInfo], *, key: str = "", dims: Mapping[str, int] | None = None, root: str = "archive"
) -> TorchLayout:
    """Lay out a file that holds a flat state dict, by itself or under `key`, with OpenAI's `dims` beside it."""
    named = {info.name: info for info in infos}
    numbers: dict[str, int] = {}
    sizes: list[int] = []
    for info in infos:
        kept = info.tied_to if info.tied_to in named else info.name  # which may come after its aliases
        if kept not in numbers:
            numbers[kept] = len(sizes)
            sizes.append(named[kept].nbytes)
        numbers[info.name] = numbers[kept]
    program = _pickle(infos, numbers, key, dims)
    contents: list[tuple[str, int, bytes | None]] = [
        ("data.pkl", len(program), program),
        (".format_version", 1, b"1"),
        (".storage_alignment", 2, b"64"),
        ("byteorder", 6, b"little"),
        *((f"data/{number}", size, None) for number, size in enumerate(sizes)),
        ("version", 2, b"3\n"),
    ]
    records: list[Record] = []
    position = 0
    for name, size, data in contents:
        full = f"{root}/{name}"
        begin = position + 30 + len(full.encode()) + (20 if size >= _WIDE else 0) + 4
        begin += -begin % _ALIGN
        records.append(Record(full, position, begin, size, data))
        position = begin + size
    first = next(i for i, record in enumerate(records) if record.data is None) if sizes else 0
    places = {name: (first + number, records[first + number].begin) for name, number in numbers.items()}
    return TorchLayout(tuple(records), places, position)


def _local_header(record: Record, crc: int) -> bytes:
    name = record.name.encode()
    wide = struct.pack("<HHQQ", 1, 16, record.nbytes, record.nbytes) if record.nbytes >= _WIDE else b""
    size = _WIDE if wide else record.nbytes
    padding = record.begin - record.header - 30 - len(name) - len(wide) - 4
    extra = wide + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    version, flags, method, hour, day = (45 if wide else 20), 0x800, 0, 0, 0x21
    fields = (b"PK\x03\x04", version, flags, method, hour, day, crc, size, size, len(name), len(extra))
    return struct.pack("<4s5H3L2H", *fields) + name + extra


def _central_header(record: Record, crc: int) -> bytes:
    name = record.name.encode()
    values = b""
    size, offset = record.nbytes, record.header
    if size >= _WIDE:
        values += struct.pack("<QQ", size, size)
        size = _WIDE
    if offset >= _WIDE:
        values += struct.pack("<Q", offset)
        offset = _WIDE
    extra = struct.pack("<HH", 1, len(values)) + values if values else b""
    version, flags, method, hour, day = (45 if values else 20), 0x800, 0, 0, 0x21
    lengths = (len(name), len(extra), 0, 0, 0, 0)
    fields = (b"PK\x01\x02", version, version, flags, method, hour, day, crc, size, size, *lengths, offset)
    return struct.pack("<4s6H3L5H2L", *fields) + name + extra


# --- the pickle, protocol 2 ---


def _pickle(infos: Sequence[TensorInfo], numbers: Mapping[str, int], key: str, dims: Mapping[str, int] | None) -> bytes:
    out = bytearray(b"\x80\x02")
    if key:
        out += b"}("
        if dims is not None:
            out += _text("dims") + b"}("
            for name, value in dims.items():
                out += _text(name) + _number(value)
            out += b"u"
        out += _text(key)
    out += b"ccollections\nOrderedDict\n)R("
    for info in infos:
        out += _text(info.name) + _tensor(info, numbers[info.name])
    out += b"u"
    if key:
        out += b"u"
    return bytes(out + b".")


def _tensor(info: TensorInfo, number: int) -> bytes:
    untyped = info.dtype in _NEWER
    if not untyped and info.dtype not in _STORAGE:
        raise CheckpointError(f"torch has no storage for {info.dtype} (tensor {info.name!r})", fix="write safetensors")
    storage = b"ctorch.storage\nUntypedStorage\n" if untyped else f"ctorch\n{_STORAGE[info.dtype]}\n".encode()
    count = info.elements * ITEM_BYTES[info.dtype] if untyped else info.elements
    reference = b"(" + _text("storage") + storage + _text(str(number)) + _text("cpu") + _number(count) + b"tQ"
    shape = b"(" + b"".join(map(_number, info.shape)) + b"t"
    strides = b"(" + b"".join(map(_number, row_major(info.shape))) + b"t"
    function = b"ctorch._utils\n_rebuild_tensor_v3\n" if untyped else b"ctorch._utils\n_rebuild_tensor_v2\n"
    tail = f"ctorch\n{_NEWER[info.dtype]}\n".encode() if untyped else b""
    return (
        function + b"(" + reference + b"K\x00" + shape + strides + b"\x89ccollections\nOrderedDict\n)R" + tail + b"tR"
    )


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def _number(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data
