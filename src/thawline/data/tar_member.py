"""Reading one member of a tar by its offset, from a file or over the network.

The member's header, which lies before it, is read along and compared: a tar that was written again after it was indexed
is noticed, not decoded as somebody else's words.
"""

from __future__ import annotations

import os
import tarfile

from thawline.data import byte_range
from thawline.data.utterance import TarRef, is_url
from thawline.errors import DataError

_BLOCK = tarfile.BLOCKSIZE
_NAME_BYTES = 100  # of a header's name; longer ones and those outside ASCII stand elsewhere
_CHANGED = "the tar changed after it was indexed, or is cut short; write the shard again"


def read_member(ref: TarRef) -> bytes:
    """The bytes of the member. Raises DataError naming it; an OSError of local storage is passed on, and one is raised
    for a server that cannot be reached."""
    if ref.offset < _BLOCK:
        raise DataError(f"no tar member begins at byte {ref.offset}", where=str(ref))
    begin, size = ref.offset - _BLOCK, ref.size + _BLOCK
    try:
        body = byte_range.read(ref.tar, begin, size) if is_url(ref.tar) else _local(ref.tar, begin, size)
    except DataError as error:
        if (unreachable := byte_range.away(error)) is not None:
            raise unreachable from error
        raise DataError(error.what, where=str(ref), fix=error.fix) from error
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise DataError("there is no such tar", where=str(ref), fix="check the path in the list") from exc
    except (PermissionError, IsADirectoryError) as exc:
        raise DataError(f"cannot be read: {exc.strerror}", where=str(ref)) from exc
    if len(body) < size:
        raise DataError(
            f"the tar ends inside this member: {max(0, len(body) - _BLOCK)} of {ref.size} bytes",
            where=str(ref),
            fix=_CHANGED,
        )
    _check_header(body[:_BLOCK], ref)
    return body[_BLOCK:]


def _local(tar: str, begin: int, size: int) -> bytes:
    with open(tar, "rb") as file:
        if begin + size > os.fstat(file.fileno()).st_size:
            size = max(0, os.fstat(file.fileno()).st_size - begin)  # a read makes room for what it was asked
        file.seek(begin)
        return file.read(size)


def _check_header(header: bytes, ref: TarRef) -> None:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as exc:
        raise DataError("no member's header lies before this place in the tar", where=str(ref), fix=_CHANGED) from exc
    short = ref.member.isascii() and len(ref.member) <= _NAME_BYTES
    if info.size != ref.size or (short and info.name != ref.member):
        raise DataError(f"another member lies here: {info.name!r} of {info.size} bytes", where=str(ref), fix=_CHANGED)
