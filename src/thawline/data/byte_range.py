"""Bytes of files behind network addresses, by fsspec: a range at a time, tried again where the network fails.

Which storages there are, and with which credentials, is fsspec's matter. Every failure is a DataError that names the
address, so that one sample that cannot be had costs one sample. Where the server cannot be reached at all, `away` tells
so: then it is no sample that is bad, and whoever reads samples waits.
"""

from __future__ import annotations

import errno
import io
import socket
import sys
import time
from typing import Any

from thawline.core.extras import need
from thawline.errors import DataError, MissingExtra

PAUSES_S = (0.2, 1.0, 4.0)
"""How long is waited before each further try."""

PATIENCE_S = 60.0
"""How long one request may take."""

_AWAY = frozenset((errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH,
                   errno.ENETDOWN, errno.ENETUNREACH, errno.ETIMEDOUT))  # fmt: skip
_SETTLED = (PermissionError, IsADirectoryError, NotADirectoryError)
_LASTING_STATUS = range(400, 500)
_PASSING_STATUS = (408, 425, 429)
_STAMPS = ("ETag", "etag", "md5", "Content-MD5", "crc32c", "generation", "LastModified", "Last-Modified", "mtime",
           "last_modified", "modified", "created")  # fmt: skip


def read(url: str, start: int, size: int) -> bytes:
    """`size` bytes of the file from byte `start`. Raises DataError where they cannot be had, or are fewer or more."""
    body = _tried(url, lambda fs, path, **limit: fs.cat_file(path, start=start, end=start + size, **limit))
    if len(body) > size:
        raise DataError(
            f"the server sends {len(body)} bytes where {size} were asked for: it does not serve ranges",
            where=url,
            fix="use a server that honours Range requests, or bring the file",
        )
    if len(body) < size:
        raise DataError(
            f"the file ends early: {len(body)} of {size} bytes from byte {start}",
            where=url,
            fix="it changed after it was indexed, or is cut short; write the shard again",
        )
    return bytes(body)


def away(error: DataError) -> OSError | None:
    """What the system would say of a storage that is away, where nobody could be reached in all tries; None where
    somebody answered."""
    cause = error.__cause__
    if not isinstance(cause, _errors()):
        return None
    cause = _cause(cause)
    code = getattr(cause, "errno", None)
    botocore = sys.modules.get("botocore.exceptions")
    if code == socket.EAI_AGAIN or (botocore is not None and isinstance(cause, botocore.ConnectionError)):
        code = errno.EHOSTUNREACH  # names are not resolved, or the client does not say why
    return OSError(code, error.what, error.where) if code in _AWAY else None


def size_of(url: str) -> int:
    """Bytes of the file. Raises DataError where it is not there, or its server does not say."""
    size = _info(url).get("size")
    if size is None:
        raise DataError("the server does not say how large this file is", where=url, fix="bring the file")
    return int(size)


def stamp(url: str) -> tuple[object, ...] | None:
    """What changes when the file is written: its size with the storage's own marks of its content or time.

    None where the storage gives no such mark, so that nothing may be remembered of it. Raises DataError.
    """
    info = _info(url)
    marks = [f"{name}={info[name]}" for name in _STAMPS if info.get(name)]
    return (info.get("size"), ";".join(marks)) if marks else None


class RangeFile(io.RawIOBase):
    """A remote file to read and seek in, block by block: what lies between is never fetched.

    block: bytes fetched at a time
    """

    def __init__(self, url: str, *, block: int = 1 << 16) -> None:
        super().__init__()
        self._url, self._block = url, block
        self._size = size_of(url)
        self._at = 0
        self._begin, self._held = 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._at + size, self._size)
        if self._at >= end:
            return b""
        if not (self._begin <= self._at and end <= self._begin + len(self._held)):
            stop = min(self._size, max(end, self._at + self._block))
            self._held, self._begin = read(self._url, self._at, stop - self._at), self._at
        body = self._held[self._at - self._begin : end - self._begin]
        self._at = end
        return body


def _info(url: str) -> dict[str, Any]:
    def ask(fs: Any, path: str, **limit: float) -> Any:
        fs.invalidate_cache()
        return fs.info(path, **limit)

    found: dict[str, Any] = dict(_tried(url, ask))
    if found.get("type", "file") != "file":
        raise DataError("this is a folder, not a file", where=url)
    return found


def _tried(url: str, what: Any) -> Any:
    """`what(file system, path)`, again after pauses while the network fails. Raises DataError."""
    fs, path = _opened(url)
    # Clients of object stores give up by themselves; that of HTTP waits five minutes for a server that is silent.
    limit = {"timeout": PATIENCE_S} if isinstance(fs, need("fsspec.asyn", extra="remote").AsyncFileSystem) else {}
    for pause_s in (*PAUSES_S, None):
        try:
            return what(fs, path, **limit)
        except _errors() as exc:
            error = _cause(exc)
            if isinstance(error, FileNotFoundError):
                raise DataError("there is no such file", where=url, fix="check the address in the list") from exc
            if pause_s is None or not _may_pass(error):
                tries = f" ({len(PAUSES_S) + 1} tries)" if pause_s is None else ""
                raise DataError(
                    f"cannot be had{tries}: {_said(error)}", where=url, fix="check address, credentials and network"
                ) from exc
            time.sleep(pause_s)
    raise AssertionError("the last try returns or raises")


def _opened(url: str) -> tuple[Any, str]:
    fsspec = need("fsspec", extra="remote")
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as exc:
        raise MissingExtra(str(exc), fix="pip install 'thawline[remote]', or fsspec's package for it") from exc
    except ValueError as exc:
        raise DataError(f"is no address that is known: {exc}", where=url, fix="check the address") from exc
    return fs, str(path)


def _errors() -> tuple[type[Exception], ...]:
    """OSError, and what the clients that are loaded raise besides."""
    kinds: list[type[Exception]] = [OSError]
    for module, name in (
        ("aiohttp", "ClientError"),
        ("botocore.exceptions", "BotoCoreError"),
        ("botocore.exceptions", "ClientError"),
    ):
        loaded = sys.modules.get(module)
        if loaded is not None:
            kinds.append(getattr(loaded, name))
    return tuple(kinds)


def _cause(error: Exception) -> Exception:
    """What really happened: fsspec's HTTP calls every failure to ask about a file a file that is not there."""
    cause = error.__cause__
    web = sys.modules.get("aiohttp")
    if web is None or not isinstance(error, FileNotFoundError) or not isinstance(cause, web.ClientError):
        return error
    return error if getattr(cause, "status", None) in (404, 410) else cause


def _may_pass(error: Exception) -> bool:
    """Whether another try may end otherwise: not for what the server has decided."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status not in _LASTING_STATUS or status in _PASSING_STATUS
    return not isinstance(error, _SETTLED)


def _said(error: Exception) -> str:
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"status {status}, {getattr(error, 'message', '') or 'no reason given'}"
    return (str(error).splitlines() or [type(error).__name__])[0] or type(error).__name__
