"""What is in a checkpoint: its files with sizes and digests, the step, and the base it belongs to.

`MANIFEST.json` is written last, so a directory without one is not a checkpoint. It carries a digest of itself, so that
a flipped bit in it is found like one in any other file. This module never imports torch and never writes.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from blake3 import blake3

from thawline.ckpt.store import file_hasher
from thawline.errors import CheckpointError

NAME: Final = "MANIFEST.json"
FORMAT: Final = 1
"""Version of the layout of a checkpoint directory; raised when an older Thawline could not read it rightly."""

_PIECE = 8 << 20
_LARGEST_MANIFEST = 16 << 20  # a manifest lists a handful of files; anything larger is not one


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint.

    size:   bytes
    digest: BLAKE3 of its bytes, 64 hexadecimal digits (what `b3sum` prints)
    """

    size: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The contents of a checkpoint directory.

    step:     optimizer updates done when it was taken
    base:     fingerprint of the base that its delta belongs to
    files:    file name -> size and digest
    thawline: version that wrote it
    format:   version of the layout
    """

    step: int
    base: str
    files: Mapping[str, FileEntry]
    thawline: str
    format: int = FORMAT

    def to_json(self) -> bytes:
        """The file's bytes; the same manifest always gives the same bytes."""
        body: dict[str, object] = {
            "format": self.format,
            "thawline": self.thawline,
            "step": self.step,
            "base": self.base,
            "files": {name: {"size": entry.size, "digest": entry.digest} for name, entry in sorted(self.files.items())},
        }
        return (json.dumps(body | {"self": _digest_of(body)}, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, *, where: str = "") -> Manifest:
        """Read `to_json`'s bytes. Raises CheckpointError if they are damaged or of a later format."""
        try:
            body = json.loads(data)
            claimed = body.pop("self")
            if claimed != _digest_of(body):
                raise ValueError("its digest of itself does not fit")
            found = cls(
                step=_whole(body["step"]),
                base=str(body["base"]),
                files={
                    _inner_name(name): FileEntry(size=_whole(entry["size"]), digest=str(entry["digest"]))
                    for name, entry in body["files"].items()
                },
                thawline=str(body["thawline"]),
                format=_whole(body["format"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            raise CheckpointError(
                f"the manifest is damaged: {exc}", where=where, fix="use another checkpoint of the run"
            ) from exc
        if found.format > FORMAT:
            raise CheckpointError(
                f"written by Thawline {found.thawline} in format {found.format}; this one reads up to {FORMAT}",
                where=where,
                fix="update Thawline",
            )
        return found


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint directory. Raises CheckpointError if absent, unreadable, damaged or too new."""
    path = folder / NAME
    try:
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            raise CheckpointError("is not a directory", where=str(folder), fix="use another checkpoint of the run")
        size = _regular_size(path)
        if size > _LARGEST_MANIFEST:
            raise CheckpointError(f"{size} bytes are no manifest", where=str(path), fix="use another checkpoint")
        data = path.read_bytes()
    except OSError as exc:
        raise CheckpointError(_reason(exc), where=str(path), fix="use another checkpoint of the run") from exc
    return Manifest.from_json(data, where=str(path))


def verify(folder: Path, *, digests: bool = True) -> tuple[str, ...]:
    """What is wrong with a checkpoint directory, one sentence each with the file's name; empty if it is whole.

    digests: read every file and compare its digest; False compares only what the directory says (presence and size).
    """
    try:
        manifest = read(folder)
    except CheckpointError as exc:
        return (f"{NAME}: {exc.what}" if exc.where.endswith(NAME) else exc.what,)
    return tuple(_problems(folder, manifest, digests))


def check(path: Path, entry: FileEntry) -> str:
    """What is wrong with a file, every byte read; empty if nothing."""
    return check_size(path, entry) or _check_digest(path, entry)


def check_size(path: Path, entry: FileEntry) -> str:
    """What presence and size say is wrong with a file; empty if nothing."""
    try:
        size = _regular_size(path)
    except OSError as exc:
        return f"{path.name}: {_reason(exc)}"
    if size != entry.size:
        kind = "emptied" if size == 0 else "cut short" if size < entry.size else "too long"
        return f"{path.name}: {kind}: {size} bytes instead of {entry.size}"
    return ""


def _problems(folder: Path, manifest: Manifest, digests: bool) -> Iterator[str]:
    for name, entry in manifest.files.items():
        problem = check(folder / name, entry) if digests else check_size(folder / name, entry)
        if problem:
            yield problem


def _check_digest(path: Path, entry: FileEntry) -> str:
    hasher = file_hasher()
    try:
        with open(path, "rb", buffering=0) as file:
            piece = bytearray(min(_PIECE, max(entry.size, 1)))
            while count := file.readinto(piece):
                hasher.update(memoryview(piece)[:count])
    except OSError as exc:
        return f"{path.name}: {_reason(exc)}"
    found = hasher.hexdigest()
    return "" if found == entry.digest else f"{path.name}: altered: digest {found[:12]} instead of {entry.digest[:12]}"


def _regular_size(path: Path) -> int:
    # Opened, because only that shows whether it may be read; not blocking, because a pipe would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        info = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return info.st_size


def _reason(exc: OSError) -> str:
    if isinstance(exc, FileNotFoundError):
        return "missing"
    return f"cannot be read: {exc.strerror or exc}"


def _digest_of(body: Mapping[str, object]) -> str:
    return str(blake3(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest())


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


def _inner_name(name: str) -> str:
    """A file's name relative to the folder, which it must not leave."""
    parts = name.split("/")
    if name == NAME or "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{name!r} is not a file name")
    return name
