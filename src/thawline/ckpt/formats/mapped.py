"""Files open for reading by memory map, stretches of them with checksums, and names that must stay in a folder."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Final

from blake3 import blake3

from thawline.ckpt.formats.checksum import crc32
from thawline.errors import CheckpointError

CHUNK_BYTES: Final = 4 << 20
_RELEASED: Final = 16 << 20  # each release interrupts the other cores
_RELEASED_LAST: Final = 256 << 10
_AHEAD: Final = 64 << 10


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
                # Headers and probes are a few bytes in far places: with read-ahead, opening a cold ZeRO checkpoint of
                # 2.3 GB read 880 MB of it, without 2.
                self._advise("MADV_RANDOM", 0, self.size)
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

    def expect(self, start: int, stop: int) -> None:
        """Bytes [start, stop) will be read from beginning to end: the system may read ahead there."""
        self._advise("MADV_SEQUENTIAL", start, stop)

    def release(self, start: int, stop: int) -> None:
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
    _lock: Lock = field(default_factory=Lock)

    def view(self, start: int, stop: int) -> memoryview:
        if not 0 <= start <= stop <= self.nbytes:
            raise CheckpointError(
                f"bytes {start} to {stop} are wanted, {self.label or 'the data'} has {self.nbytes}",
                where=str(self.file.path),
                fix="the checkpoint is damaged: use another one",
            )
        return self.file.view(self.offset + start, self.offset + stop)

    def expect(self, start: int, stop: int) -> None:
        """Bytes [start, stop) will be read from beginning to end; little is not worth a call."""
        if stop - start >= _AHEAD:
            self.file.expect(self.offset + start, self.offset + stop)

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
                for piece in self._pieces():
                    found = crc32(piece, found)
                if found != self.crc:
                    raise self._altered(f"CRC-32 {found:08x} instead of {self.crc:08x}")
            if self.seal is not None:
                hasher = blake3(self.seal[0])
                for piece in self._pieces():
                    hasher.update(piece)
                if hasher.hexdigest() != self.seal[1]:
                    raise self._altered(f"digest {hasher.hexdigest()[:16]} instead of {self.seal[1][:16]}")
            self._checked = True

    def _pieces(self) -> Iterator[memoryview]:
        released = 0
        self.expect(0, self.nbytes)
        for start in range(0, self.nbytes, CHUNK_BYTES):
            stop = min(start + CHUNK_BYTES, self.nbytes)
            yield self.view(start, stop)
            released = self.release(released, stop, last=stop == self.nbytes)

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
