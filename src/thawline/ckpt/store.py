"""Files that appear whole or not at all. Every checkpoint and every exported file is written through here.

`atomic_dir` and `atomic_file` give a temporary sibling of the target to write into (same directory, hence the same file
system; never $TMPDIR), flush every file and directory to the device, rename, and flush the parent. So at every moment,
also after a power loss, the target's name leads to nothing, to the whole old content or to the whole new one.

Every system call that changes the disk goes through `SYSTEM`, a value of type `FileSystem`: a test puts a shim there
which counts, fails, kills at or records the calls. This module does not know what is in the files.

A temporary carries a lock (flock) for as long as its process lives; one whose lock is free was left by a dead process
and is removed by the next writer beside it. Where a file system has no such locks, only leftovers older than a day are.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, cast

from blake3 import blake3

from thawline.ckpt.filesystem import UNSUPPORTED, Buffer
from thawline.ckpt.filesystem import FileSystem as FileSystem
from thawline.ckpt.refusal import StorageError as StorageError
from thawline.ckpt.refusal import free_bytes, naming, refused
from thawline.errors import CheckpointError

_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old)-\d+-[0-9a-f]{8}")
_UNLOCKABLE_AGE_S: Final = 24 * 3600.0
_DIGEST_PIECE = 8 << 20  # bytes hashed and written at a time, so that the second touch finds them in the cache
_PARALLEL_BYTES = 1 << 20
_WRITE_SIDE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


SYSTEM: FileSystem = FileSystem()
"""The calls in force; tests put a shim here."""


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_note_fork)


@contextmanager
def atomic_dir(target: Path, *, force: bool = False, need_bytes: int = 0) -> Iterator[Path]:
    """A directory that appears whole or not at all: yields a temporary sibling to fill.

    force: replace an existing target; old and new are swapped in one step and the old one is removed afterwards.
    need_bytes: what will be written, if known; checked against the free space before anything is, and named in errors.

    Raises CheckpointError if the target exists and `force` is not given, StorageError (cause kept) if the storage
    refuses. On any error the temporary is removed and the target is as it was.
    """
    target = Path(os.path.abspath(target))
    with _guard(target, force, need_bytes, SYSTEM.make_dir) as temporary:
        yield temporary
        with storage(target, need_bytes, temporary):
            _sync_tree(temporary)
            _swap_in(temporary, target, force=force)


@contextmanager
def atomic_file(target: Path, *, force: bool = False, need_bytes: int = 0) -> Iterator[BinaryIO]:
    """A file that appears whole or not at all: yields it open for writing, seekable, with a descriptor (`fileno`).

    Arguments and errors as for `atomic_dir`.
    """
    target = Path(os.path.abspath(target))
    with _guard(target, force, need_bytes, _create_empty) as temporary:
        raw = _SeamFile(temporary)
        try:
            with io.BufferedWriter(cast(io.RawIOBase, raw), buffer_size=1 << 20) as file:
                yield cast(BinaryIO, file)
        finally:
            raw.close()
        with storage(target, need_bytes, temporary):
            SYSTEM.sync(temporary)
            if force and not target.is_dir():
                SYSTEM.replace(temporary, target)
            else:
                SYSTEM.rename_new(temporary, target)


def file_hasher() -> blake3:
    """A BLAKE3 over bytes to come, on all cores.

    In a forked child on one only: the threads that share the work live in the parent, and the child would wait for them
    for ever (measured: 8 of 8).
    """
    return blake3(max_threads=1 if _forked else blake3.AUTO)


def write_file(path: Path, pieces: Iterable[Buffer]) -> tuple[int, str]:
    """Write a new file inside a directory given by `atomic_dir`, which flushes it on leaving.

    Returns its size in bytes and the BLAKE3 digest of its bytes (64 hexadecimal digits, what `b3sum` prints).
    """
    hasher = file_hasher()
    size = 0
    with naming(path):
        descriptor = SYSTEM.create(path)
        try:
            for piece in _gathered(pieces):
                view = memoryview(piece).cast("B")
                for start in range(0, len(view), _DIGEST_PIECE):
                    part = view[start : start + _DIGEST_PIECE]
                    hasher.update(part)
                    _write_all(descriptor, part)
                size += len(view)
        finally:
            os.close(descriptor)
    return size, str(hasher.hexdigest())


@dataclass(frozen=True, slots=True)
class Direct:
    """An open file that several threads fill, each at places of its own; every call goes through SYSTEM."""

    path: Path
    descriptor: int

    @classmethod
    def of(cls, file: BinaryIO) -> Direct:
        """Of a file that `atomic_file` gave."""
        return cls(Path(file.name), file.fileno())

    def write_at(self, data: memoryview, place: int) -> None:
        """Write all of `data` from byte `place`."""
        with naming(self.path):
            while len(data):
                taken = SYSTEM.write_at(self.descriptor, data, place)
                data = data[taken:]
                place += taken

    def flush(self) -> None:
        """Bring what was written to the device."""
        with naming(self.path):
            SYSTEM.flush(self.descriptor)


@contextmanager
def new_file(path: Path) -> Iterator[Direct]:
    """A new file inside a directory given by `atomic_dir`, to be filled out of order."""
    with naming(path):
        descriptor = SYSTEM.create(path)
    try:
        yield Direct(path, descriptor)
    finally:
        os.close(descriptor)


def link(old: Path, new: Path) -> bool:
    """Give a file a second name; False where the file system cannot. For files that nobody changes in place."""
    try:
        SYSTEM.link(old, new)
    except OSError as exc:
        if exc.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, *UNSUPPORTED):
            return False
        raise
    return True


def remove_tree(path: Path) -> None:
    """Remove a file or a directory with all below it; symbolic links are removed, not followed."""
    if stat.S_ISDIR(os.lstat(path).st_mode):
        for entry in sorted(os.listdir(path)):
            remove_tree(path / entry)
        SYSTEM.remove_dir(path)
    else:
        SYSTEM.remove(path)


def retire(path: Path) -> None:
    """Remove a whole directory so that a half-removed one is never seen under its name: hidden first, then deleted."""
    hidden = _sibling(path, "tmp")
    with storage(path):
        SYSTEM.rename_new(path, hidden)
        SYSTEM.sync(path.parent)
        remove_tree(hidden)


def clean_leftovers(parent: Path, name: str | None = None) -> tuple[Path, ...]:
    """Remove what dead writers left in `parent` (of the target `name`, or of all), after `give_back`.

    Returns what was removed. Never touches a temporary in use.
    """
    give_back(parent, name)

    def remove(path: Path, target: Path, kind: str) -> bool:
        if kind == "old" and not os.path.lexists(target):
            return False
        remove_tree(path)
        return True

    return _treat(parent, name, remove)


def give_back(parent: Path, name: str | None = None) -> tuple[Path, ...]:
    """Put back old versions that a dead writer had moved aside and not replaced yet; for readers too, removes nothing.

    It happens only where the system cannot swap two names and the writer died between two renames.
    """

    def put_back(path: Path, target: Path, kind: str) -> bool:
        if kind != "old" or os.path.lexists(target):
            return False
        SYSTEM.rename_new(path, target)
        SYSTEM.sync(parent)
        return True

    return _treat(parent, name, put_back)


class _SeamFile(io.RawIOBase):
    """A raw file whose writes go through SYSTEM; everything else is the descriptor's own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    @property
    def name(self) -> str:
        return str(self._path)

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return os.lseek(self._descriptor, offset, whence)

    def truncate(self, size: int | None = None) -> int:
        length = self.tell() if size is None else size
        os.ftruncate(self._descriptor, length)
        return length

    def write(self, data: Buffer) -> int:  # type: ignore[override]  # typeshed's ReadableBuffer is wider than we need
        with naming(self._path):
            return SYSTEM.write(self._descriptor, data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._descriptor)


@contextmanager
def _guard(target: Path, force: bool, need: int, make: Callable[[Path], None]) -> Iterator[Path]:
    """Yield a locked temporary of `target`; flush the parent on success, remove what is left over on failure."""
    with storage(target, need):
        clean_leftovers(target.parent, target.name)
        _refuse_existing(target, force)
        _make_parents(target.parent)
        _refuse_without_room(target, need)
        temporary, lock = _claim(target, make)
    renamed = False
    try:
        with _callers(target, need, temporary):
            yield temporary
        renamed = True
        with storage(target, need, temporary):
            SYSTEM.sync(target.parent)
        renamed = False
    finally:
        try:
            # If the rename is done but not known to be durable, the old content must outlive it: it stays hidden.
            if not renamed:
                _discard(temporary)
        finally:
            if lock >= 0:
                os.close(lock)


@contextmanager
def storage(target: Path, need: int = 0, temporary: Path | None = None) -> Iterator[None]:
    """Turn every error of the system in the calls inside into StorageError about `target`; FileExistsError says so."""
    try:
        yield
    except FileExistsError as exc:
        raise _exists(target) from exc
    except OSError as exc:
        raise refused(exc, target, need, temporary) from exc


@contextmanager
def _callers(target: Path, need: int, temporary: Path) -> Iterator[None]:
    """The same for the caller's calls, if they were writing the target; errors of other files pass unchanged."""
    try:
        yield
    except OSError as exc:
        named = os.fspath(exc.filename) if isinstance(exc.filename, str | os.PathLike) else ""
        if exc.errno in _WRITE_SIDE or str(named).startswith(str(temporary)):
            raise refused(exc, target, need, temporary) from exc
        raise


def _exists(target: Path) -> CheckpointError:
    return CheckpointError(
        "exists already", where=str(target), fix="choose another name, or say that it may be replaced (--force)"
    )


def _refuse_existing(target: Path, force: bool) -> None:
    if os.path.lexists(target) and not force:
        raise _exists(target)


def _refuse_without_room(target: Path, need: int) -> None:
    free = free_bytes(target.parent)
    if need and 0 <= free < need:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))


def _make_parents(parent: Path) -> None:
    missing = [place for place in (parent, *parent.parents) if not os.path.lexists(place)]
    for place in reversed(missing):
        try:
            SYSTEM.make_dir(place)
        except FileExistsError:
            continue  # another writer was quicker
        SYSTEM.sync(place.parent)


def _sibling(target: Path, kind: str) -> Path:
    # The pid is for people who look; what decides whether a leftover is dead is its lock.
    name = os.fsdecode(os.fsencode(target.name)[:200])
    return target.parent / f".{name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}"


def _claim(target: Path, make: Callable[[Path], None]) -> tuple[Path, int]:
    """A new temporary and the descriptor that holds its lock (-1 where the file system has no locks)."""
    while True:
        temporary = _sibling(target, "tmp")
        make(temporary)
        try:
            lock = _try_lock(temporary)
        except BlockingIOError:
            continue  # a cleaner took it for a leftover in the instant before, and is about to remove it
        if lock is not None:
            return temporary, lock
        if os.path.lexists(temporary):
            return temporary, -1  # no locks here; a cleaner leaves young ones alone


def _try_lock(path: Path) -> int | None:
    """Lock `path`; None if it is gone, or too young to judge without locks. BlockingIOError if somebody else has it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        still_there = os.path.lexists(path) and os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # a file system without locks
        still_there = time.time() - os.fstat(descriptor).st_mtime > _UNLOCKABLE_AGE_S
    if still_there:
        return descriptor
    os.close(descriptor)
    return None


def _treat(parent: Path, name: str | None, act: Callable[[Path, Path, str], bool]) -> tuple[Path, ...]:
    """The leftovers on which `act(path, its target, kind)` did something; each is locked meanwhile."""
    treated: list[Path] = []
    for path, target, kind in _leftovers(parent, name):
        try:
            lock = _try_lock(path)
        except BlockingIOError:
            continue  # in use
        if lock is None:
            continue
        try:
            if act(path, target, kind):
                treated.append(path)
        except OSError:
            continue  # not ours to touch (permissions, a writer beside us): it stays hidden and harmless
        finally:
            os.close(lock)
    return tuple(treated)


def _leftovers(parent: Path, name: str | None) -> list[tuple[Path, Path, str]]:
    try:
        entries = sorted(os.listdir(parent))
    except OSError:
        return []
    found = []
    for entry in entries:
        match = _LEFTOVER.fullmatch(entry)
        if match is not None and (name is None or match["name"] == os.fsdecode(os.fsencode(name)[:200])):
            found.append((parent / entry, parent / (name or match["name"]), match["kind"]))
    return found


def _sync_tree(path: Path) -> None:
    for entry in sorted(os.listdir(path)):
        mode = os.lstat(path / entry).st_mode
        if stat.S_ISDIR(mode):
            _sync_tree(path / entry)
        elif stat.S_ISREG(mode):
            SYSTEM.sync(path / entry)
    SYSTEM.sync(path)


def _swap_in(temporary: Path, target: Path, *, force: bool) -> None:
    """Put a finished temporary in the target's place; an old target ends up under the temporary's name."""
    if not (force and os.path.lexists(target)):
        SYSTEM.rename_new(temporary, target)
        return
    try:
        SYSTEM.exchange(temporary, target)
    except OSError as exc:
        if exc.errno not in UNSUPPORTED:
            raise
        # Two steps: between them the old one is whole under a name that clean_leftovers gives back.
        aside = _sibling(target, "old")
        SYSTEM.rename_new(target, aside)
        try:
            SYSTEM.rename_new(temporary, target)
        except OSError:
            SYSTEM.rename_new(aside, target)
            raise
        SYSTEM.sync(target.parent)
        remove_tree(aside)


def _discard(temporary: Path) -> None:
    try:
        if os.path.lexists(temporary):
            remove_tree(temporary)
    except OSError:
        return  # the error that brought us here is the one to report; the next writer cleans up


def _create_empty(path: Path) -> None:
    os.close(SYSTEM.create(path))


def _write_all(descriptor: int, view: memoryview) -> None:
    while len(view):
        taken = SYSTEM.write(descriptor, view)
        view = view[taken:]


def _gathered(pieces: Iterable[Buffer]) -> Iterator[Buffer]:
    """The same bytes with runs of small pieces joined, so that a thousand biases do not cost a thousand calls."""
    small = bytearray()
    for piece in pieces:
        if memoryview(piece).nbytes < _PARALLEL_BYTES:
            small += memoryview(piece).cast("B")
            if len(small) < _PARALLEL_BYTES:
                continue
            piece = b""
        if small:
            yield bytes(small)
            small.clear()
        yield piece
    yield bytes(small)
