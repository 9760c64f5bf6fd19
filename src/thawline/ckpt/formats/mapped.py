"""Files open for reading by memory map, stretches of them with checksums, and names that must stay in a folder."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Final

from blake3 import blake3

from thawline.ckpt.formats.checksum import combined, crc32
from thawline.errors import CheckpointError

CHUNK_BYTES: Final = 512 << 10  # stays in the processor's cache
_RELEASED: Final = 16 << 20  # each release interrupts the other cores
_RELEASED_LAST: Final = 256 << 10
_STREAMED: Final = 64 << 10
_SPARE: Final = 64  # descriptors for what is open a short while: streams, folders, results
_ENOUGH: Final = "this process may not open enough files for its shards: raise the limit (ulimit -n)"


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
                fix=_ENOUGH if exc.errno == errno.EMFILE else "bring the file back, or use another checkpoint",
            ) from exc
        try:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise CheckpointError("is not a regular file", where=str(path), fix="give a file")
            self.size = info.st_size
            self._identity = info.st_dev, info.st_ino
            if self.size:
                _make_room(descriptor)
                self._map = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
                # Headers and probes are a few bytes in far places: with read-ahead, opening a cold ZeRO checkpoint of
                # 2.3 GB read 880 MB of it, without 2.
                self._advise("MADV_RANDOM", 0, self.size)
        except OSError as exc:
            fix = _ENOUGH if exc.errno == errno.EMFILE else ""
            raise CheckpointError(f"cannot be mapped: {exc.strerror}", where=str(path), fix=fix) from exc
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

    def soon(self, start: int, stop: int) -> None:
        """Bytes [start, stop) will be looked at: the system may fetch them while we do something else."""
        if 0 <= start < stop <= self.size:
            self._advise("MADV_WILLNEED", start, stop)

    def stream(self, start: int, stop: int, step: int) -> Iterator[memoryview]:
        """Bytes [start, stop) from beginning to end, at most `step` at a time, without keeping them in memory.

        A view given out is valid until the next one is asked for. Raises CheckpointError if the file has shrunk, was
        replaced or cannot be read.
        """
        self.view(start, stop).release()
        # Little, or in small pieces: a look at a few elements, which is not worth an opening.
        if self._unnamed or min(step, stop - start) < _STREAMED:
            yield from self._from_map(start, stop, step)
        else:
            yield from self._from_file(start, stop, step)

    def _from_map(self, start: int, stop: int, step: int) -> Iterator[memoryview]:
        """For what is small, or was just written and lies in the system's cache: nothing is copied."""
        if min(step, stop - start) >= _STREAMED:
            self._advise("MADV_SEQUENTIAL", start, stop)
        released = start
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            yield self.view(begin, end)
            if end - released >= _RELEASED or (end == stop and end - released >= _RELEASED_LAST):
                self._release(released, end)
                released = end

    def _from_file(self, start: int, stop: int, step: int) -> Iterator[memoryview]:
        """For what may have to come from the disk: read calls ask for it further ahead than page faults do, and each
        opening has a read-ahead of its own."""
        buffer = memoryview(bytearray(min(step, stop - start)))
        descriptor = self._open_again()
        try:
            for begin in range(start, stop, step):
                wanted = buffer[: min(step, stop - begin)]
                self._fill(wanted, descriptor, begin)
                yield wanted
        finally:
            os.close(descriptor)

    def _fill(self, wanted: memoryview, descriptor: int, place: int) -> None:
        while len(wanted):
            try:
                taken = os.preadv(descriptor, [wanted], place)
            except OSError as exc:
                raise CheckpointError(
                    f"bytes from {place} on cannot be read: {exc.strerror}",
                    where=str(self.path),
                    fix="the storage may be failing: copy the file from elsewhere, or use another checkpoint",
                ) from exc
            if not taken:
                self.check_size()
                raise CheckpointError(f"ends at byte {place} while it is read", where=str(self.path))
            wanted = wanted[taken:]
            place += taken

    def _open_again(self) -> int:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as exc:
            what = "cannot be opened again" if exc.errno == errno.EMFILE else "vanished while it was read"
            fix = _ENOUGH if exc.errno == errno.EMFILE else ""
            raise CheckpointError(f"{what}: {exc.strerror}", where=str(self.path), fix=fix) from exc
        info = os.fstat(descriptor)
        if (info.st_dev, info.st_ino) != self._identity:
            os.close(descriptor)
            raise CheckpointError(
                "was replaced by another file while it was read",
                where=str(self.path),
                fix="wait until whoever writes it is done",
            )
        return descriptor

    def _release(self, start: int, stop: int) -> None:
        """Let go of the pages that lie whole in bytes [start, stop): they stay in the system's cache, not in ours."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = stop // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            self._advise("MADV_DONTNEED", first, last)

    def _advise(self, advice: str, start: int, stop: int) -> None:
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        if self._map is not None and hasattr(self._map, "madvise") and hasattr(mmap, advice):
            self._map.madvise(getattr(mmap, advice), first, stop - first)

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


def _make_room(descriptor: int) -> None:
    """Allow this process more open files, as far as it may, before there are as many as it is allowed.

    A map keeps a duplicate of its descriptor until it is closed, a checkpoint may have thousands of shards, and the
    usual limit is 1024 (256 on macOS).
    """
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.dup(descriptor)  # the lowest number that is free
    os.close(probe)
    if allowed == resource.RLIM_INFINITY or probe < allowed - _SPARE:
        return
    more = 4 * allowed if most == resource.RLIM_INFINITY else min(4 * allowed, most)
    if more > allowed:
        with suppress(OSError, ValueError):  # then the limit stays, and opening says so when it is reached
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, most))


@dataclass(slots=True, eq=False)
class Region:
    """A stretch of a file that holds tensor data and, where the format has one, its checksum.

    crc:   CRC-32 of the stretch; None if the format keeps no checksum
    label: what the stretch is called in messages, e.g. "optim.pt: record data/3"
    seal:  (what is hashed before the stretch, BLAKE3 digest of both) where the file records one; None elsewhere
    """

    file: MappedFile
    offset: int
    nbytes: int
    crc: int | None = None
    label: str = ""
    seal: tuple[bytes, str] | None = None
    _checked: bool = False
    _seen: dict[int, tuple[int, int]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def view(self, start: int, stop: int) -> memoryview:
        if not 0 <= start <= stop <= self.nbytes:
            raise CheckpointError(
                f"bytes {start} to {stop} are wanted, {self.label or 'the data'} has {self.nbytes}",
                where=str(self.file.path),
                fix="the checkpoint is damaged: use another one",
            )
        return self.file.view(self.offset + start, self.offset + stop)

    def stream(self, start: int, stop: int, step: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """Bytes [start, stop) of the stretch from beginning to end, as `MappedFile.stream` gives them."""
        self.view(start, stop).release()
        return self.file.stream(self.offset + start, self.offset + stop, step)

    def soon(self, start: int, stop: int) -> None:
        """Bytes [start, stop) of the stretch will be looked at."""
        self.file.soon(self.offset + start, self.offset + stop)

    def saw(self, start: int, stop: int, crc: int) -> None:
        """Bytes [start, stop) went by and have this CRC-32: `check` need not read them again."""
        if stop > start:
            with self._lock:
                self._seen[start] = stop, crc

    def check(self) -> None:
        """Compare the stretch with its checksum, once. Raises CheckpointError naming it."""
        with self._lock:
            if self._checked:
                return
            self.file.check_size()
            if self.crc is not None:
                found = self._crc()
                if found != self.crc:
                    raise self._altered(f"CRC-32 {found:08x} instead of {self.crc:08x}")
            if self.seal is not None:
                hasher = blake3(self.seal[0])
                for piece in self.stream(0, self.nbytes):
                    hasher.update(piece)
                if hasher.hexdigest() != self.seal[1]:
                    raise self._altered(f"digest {hasher.hexdigest()[:16]} instead of {self.seal[1][:16]}")
            self._checked = True

    def _crc(self) -> int:
        """CRC-32 of the whole, reading only what did not go by."""
        found = position = 0
        for start, (stop, crc) in (*sorted(self._seen.items()), (self.nbytes, (self.nbytes, 0))):
            if start < position:
                continue  # an overlap: what it has beyond is read below
            for piece in self.stream(position, start):
                found = crc32(piece, found)
            found = combined(found, crc, stop - start)
            position = stop
        return found

    def _altered(self, how: str) -> CheckpointError:
        return CheckpointError(
            f"{self.label} is altered: {how}",
            where=str(self.file.path),
            fix="copy the file again from where it was written, or use another checkpoint",
        )


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
