"""The system calls that change something on disk, one method each, so that a test can stand between."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Final

Buffer = bytes | bytearray | memoryview

UNSUPPORTED: Final = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What a system says of a call that it, or this file system, does not have."""

_AT_FDCWD, _RENAME_NOREPLACE, _RENAME_EXCHANGE = -100, 1, 2


class FileSystem:
    """The system calls that change something on disk, one method each. A shim overrides what it wants to disturb."""

    def make_dir(self, path: Path) -> None:
        os.mkdir(path)

    def create(self, path: Path) -> int:
        """A new file, open for reading and writing; an existing one is refused. Returns the descriptor."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, data: Buffer) -> int:
        """Write at the descriptor's position; returns how many bytes were taken, which may be fewer than given."""
        return os.write(descriptor, data)

    def write_at(self, descriptor: int, data: Buffer, place: int) -> int:
        """The same at a place of the file, from any thread; the descriptor's position stays."""
        return os.pwrite(descriptor, data, place)

    def flush(self, descriptor: int) -> None:
        """Flush an open file's content to the device."""
        os.fsync(descriptor)

    def sync(self, path: Path) -> None:
        """Flush a file's content, or a directory's entries, to the device."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone stops at the drive's cache
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            else:
                os.fsync(descriptor)
        except OSError as exc:
            # Some network file systems cannot flush a directory and say EINVAL; for a file that is a failure.
            if exc.errno not in UNSUPPORTED or not stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise
        finally:
            os.close(descriptor)

    def rename_new(self, old: Path, new: Path) -> None:
        """Rename; FileExistsError where `new` exists (plain rename(2) would replace an empty directory)."""
        try:
            _renameat2(old, new, _RENAME_NOREPLACE)
        except OSError as exc:
            if exc.errno not in UNSUPPORTED:
                raise
            if os.path.lexists(new):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new)) from None
            os.rename(old, new)

    def replace(self, old: Path, new: Path) -> None:
        """Rename a file over another in one step."""
        os.replace(old, new)

    def exchange(self, one: Path, other: Path) -> None:
        """Swap two names in one step; OSError with ENOSYS or EINVAL where the system cannot."""
        _renameat2(one, other, _RENAME_EXCHANGE)

    def link(self, old: Path, new: Path) -> None:
        """A second name for a file."""
        os.link(old, new)

    def remove(self, path: Path) -> None:
        os.unlink(path)

    def remove_dir(self, path: Path) -> None:
        os.rmdir(path)


def _renameat2(old: Path, new: Path, flags: int) -> None:
    call = getattr(_libc(), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(new))
    if call(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(new))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
