"""Records of a zip archive as byte ranges of a memory-mapped file. Nothing is copied and nothing is decompressed.

Torch writes its archives with every record stored as it is, so a record is a byte range with a CRC-32. An archive with
compressed or encrypted records, with two records of one name, or with records that overlap or leave the file is
refused: none of that is written by torch, and all of it is how zip bombs and parser tricks are made.
Layout: APPNOTE.TXT 6.3.10, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14-16 (end records, zip64).
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Final

from thawline.ckpt.formats.mapped import MappedFile, Region
from thawline.errors import CheckpointError

_END: Final = struct.Struct("<4s4H2LH")
_END64_LOCATOR: Final = struct.Struct("<4sLQL")
_END64: Final = struct.Struct("<4sQ2H2L4Q")
_CENTRAL: Final = struct.Struct("<4s6H3L5H2L")
_LOCAL: Final = struct.Struct("<4s5H3L2H")
_MAX_COMMENT: Final = 0xFFFF
_MAX_RECORDS: Final = 4_000_000


def read_records(file: MappedFile, start: int = 0, length: int | None = None) -> dict[str, Region]:
    """The records of the archive that fills bytes [start, start + length) of `file`, by name, in directory order.

    Raises CheckpointError naming the file and what is wrong. Checksums are compared when a record is used.
    """
    length = file.size - start if length is None else length
    archive = file.view(start, start + length)
    try:
        return _Archive(file, start, archive).records()
    except (struct.error, UnicodeDecodeError) as exc:
        raise CheckpointError(
            f"the zip archive is damaged: {exc}", where=str(file.path), fix="copy the file again"
        ) from exc


class _Archive:
    def __init__(self, file: MappedFile, start: int, data: memoryview) -> None:
        self._file, self._start, self._data = file, start, data

    def _bad(self, what: str, fix: str = "copy the file again, or use another checkpoint") -> CheckpointError:
        return CheckpointError(f"the zip archive {what}", where=str(self._file.path), fix=fix)

    def _find_end(self) -> int:
        """Offset of the end record, whose comment must reach exactly to the end of the archive."""
        last = len(self._data) - _END.size
        if last >= 0 and bytes(self._data[last : last + 4]) == b"PK\x05\x06" and bytes(self._data[-2:]) == b"\0\0":
            return last  # torch writes no comment
        tail = bytes(self._data[-(_END.size + _MAX_COMMENT) :])
        at = tail.rfind(b"PK\x05\x06")
        while at >= 0:
            if at + _END.size <= len(tail):
                comment: int = _END.unpack_from(tail, at)[7]
                if at + _END.size + comment == len(tail):
                    return len(self._data) - len(tail) + at
            at = tail.rfind(b"PK\x05\x06", 0, at)
        raise self._bad("has no end: the file is cut short")

    def _directory(self) -> tuple[int, int, int]:
        """(offset, bytes, records) of the central directory."""
        end = self._find_end()
        _, disk, first_disk, _, count, size, offset, _ = _END.unpack_from(self._data, end)
        if disk or first_disk:
            raise self._bad("is one of several volumes")
        locator = end - _END64_LOCATOR.size
        if locator >= 0 and bytes(self._data[locator : locator + 4]) == b"PK\x06\x07":
            _, _, end64, _ = _END64_LOCATOR.unpack_from(self._data, locator)
            if end64 > locator - _END64.size or bytes(self._data[end64 : end64 + 4]) != b"PK\x06\x06":
                raise self._bad("has a damaged zip64 end record")
            count, size, offset = _END64.unpack_from(self._data, end64)[7:10]
            end = end64
        if offset + size > end or count > _MAX_RECORDS or count * _CENTRAL.size > size:
            raise self._bad(f"states a directory of {count} records that does not fit into it")
        return offset, size, count

    def records(self) -> dict[str, Region]:
        directory, size, count = self._directory()
        found: dict[str, Region] = {}
        spans: list[tuple[int, int, str]] = []
        at = directory
        entries = []
        for _ in range(count):
            name, header, plain, crc, at = self._entry(at, directory, directory + size)
            entries.append((name, header, plain, crc))
        for name, header, plain, crc in entries:
            region = self._region(name, header, plain, crc, directory)
            if name in found:
                raise self._bad(f"has two records named {name!r}", "do not trust this file")
            found[name] = region
            spans.append((header, region.offset + region.nbytes - self._start, name))
        spans.sort()
        for (_, stop, name), (begin, _, other) in pairwise(spans):
            if begin < stop:
                raise self._bad(f"has overlapping records {name!r} and {other!r}", "do not trust this file")
        return found

    def _entry(self, at: int, directory: int, stop: int) -> tuple[str, int, int, int, int]:
        """One entry of the directory: name, place of the local header, bytes, CRC-32, and where the next one begins."""
        fields = _CENTRAL.unpack_from(self._data, at)
        signature, flags, method, crc = fields[0], fields[3], fields[4], fields[7]
        packed, plain, name_len, extra_len, comment_len = fields[8], fields[9], fields[10], fields[11], fields[12]
        header = fields[16]
        after = at + _CENTRAL.size + name_len + extra_len + comment_len
        if signature != b"PK\x01\x02" or after > stop:
            raise self._bad("has a damaged directory")
        name = bytes(self._data[at + _CENTRAL.size : at + _CENTRAL.size + name_len]).decode()
        extra = bytes(self._data[at + _CENTRAL.size + name_len : after - comment_len])
        plain, packed, header = self._wide(extra, plain, packed, header)
        if flags & 0x1:
            raise self._bad(f"has the encrypted record {name!r}")
        if method != 0 or packed != plain:
            raise self._bad(
                f"has the compressed record {name!r}, which torch does not write",
                "unpack it and pack it again without compression, if you trust it",
            )
        if header + _LOCAL.size > directory:
            raise self._bad(f"states a place outside itself for record {name!r}")
        self._file.soon(self._start + header, self._start + header + _LOCAL.size + name_len)
        return name, header, plain, crc, after

    def _region(self, name: str, header: int, plain: int, crc: int, directory: int) -> Region:
        """The data of a record, which its local header states once more."""
        local = _LOCAL.unpack_from(self._data, header)
        begin = header + _LOCAL.size + local[9] + local[10]
        if local[0] != b"PK\x03\x04" or begin + plain > directory:
            raise self._bad(f"states a place for record {name!r} where it is not")
        if bytes(self._data[header + _LOCAL.size : header + _LOCAL.size + local[9]]) != name.encode():
            raise self._bad(f"has a record that calls itself other than {name!r}", "do not trust this file")
        return Region(self._file, self._start + begin, plain, crc, f"record {name!r}")

    def _wide(self, extra: bytes, plain: int, packed: int, header: int) -> tuple[int, int, int]:
        """Replace the fields that are all ones by their 64-bit values from the zip64 extra field."""
        values = [plain, packed, header]
        at = 0
        while at + 4 <= len(extra):
            kind, size = struct.unpack_from("<HH", extra, at)
            if kind == 0x0001:
                place = at + 4
                for i, value in enumerate(values):
                    if value == 0xFFFFFFFF:
                        if place + 8 > at + 4 + size:
                            raise self._bad("has a damaged zip64 field")
                        (values[i],) = struct.unpack_from("<Q", extra, place)
                        place += 8
            at += 4 + size
        return values[0], values[1], values[2]
