"""What is said where the storage refuses: how much was needed, how much is free, and what to do."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thawline.errors import CheckpointError


class StorageError(CheckpointError):
    """The storage refused a write: full, over quota, not permitted, read-only, or failing.

    path:  the target that was to be written; it is as it was before
    errno: the system's reason (errno.ENOSPC, ...)
    needed_bytes: what the target needs, 0 if unknown; free_bytes: what was available for it, -1 if unknown
    """

    path: Path
    errno: int
    needed_bytes: int
    free_bytes: int


def refused(exc: OSError, target: Path, need: int, temporary: Path | None) -> StorageError:
    """An error of the system while `target` was written, as one of ours."""
    written = _tree_bytes(temporary) if temporary is not None else 0
    free = free_bytes(target.parent)
    available = free + written if free >= 0 else -1
    room = f"needs {human_bytes(need)}" if need else f"{human_bytes(written)} were written so far"
    if available >= 0:
        room += f", {human_bytes(available)} available"
    fixes = {
        errno.ENOSPC: "free space on this file system, keep fewer checkpoints, or write elsewhere",
        errno.EDQUOT: "this user's quota is used up: delete files, ask for more, or write elsewhere",
        errno.EFBIG: "a file-size limit is in force (ulimit -f, or the file system's own): raise it or write elsewhere",
        errno.EACCES: "let this user write to the directory, or write elsewhere",
        errno.EPERM: "let this user write to the directory, or write elsewhere",
        errno.EROFS: "the file system is mounted read-only: write elsewhere",
        errno.EIO: "the device reports a fault: check it (dmesg) before trusting it, and write elsewhere",
    }
    code = exc.errno or 0
    error = StorageError(
        f"cannot write: {exc.strerror or exc} ({room}); what was there before is untouched",
        where=str(target),
        fix=fixes.get(code, "see the system's message"),
    )
    error.path, error.errno, error.needed_bytes, error.free_bytes = target, code, need, available
    return error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give errors of calls on a descriptor the file's name, which the system leaves out."""
    try:
        yield
    except OSError as exc:
        if exc.filename is None:
            exc.filename = str(path)
        raise


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write where `path` lies, or will lie; -1 if the system does not say."""
    for place in (path, *path.parents):
        try:
            found = os.statvfs(place)
        except FileNotFoundError:
            continue
        except OSError:
            return -1
        return found.f_bavail * found.f_frsize
    return -1


def human_bytes(amount: int) -> str:
    """`1.5 GB`: decimal units, as disks are sold.

    >>> human_bytes(1_500_000_000)
    '1.5 GB'
    """
    value = float(amount)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def _tree_bytes(path: Path) -> int:
    try:
        info = os.lstat(path)
        if not stat.S_ISDIR(info.st_mode):
            return info.st_size
        return sum(_tree_bytes(path / entry) for entry in os.listdir(path))
    except OSError:
        return 0
