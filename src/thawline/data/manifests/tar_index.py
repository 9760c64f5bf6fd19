"""What lies in a shard and where: one scan of a tar's headers, kept for the next time.

A remote tar is scanned by ranges: its headers and texts are fetched, the sound between them is not. Everything that
Python's tarfile would pass over in silence is looked for: a damaged header in the middle (after which it sees an end),
a missing end, a second archive behind it, a name that is there twice.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from thawline.data import byte_range
from thawline.data import cache as keeping
from thawline.data.utterance import AUDIO_SUFFIXES, is_url
from thawline.errors import DataError

_KIND = "tar-index 2"
_MOST_TEXT_BYTES = 1 << 20  # of a transcript, and of a header's extension: what is more is no such thing
_TAIL_BYTES = 1 << 16  # looked at behind the end; writers fill up to 10240
_AGAIN = "write the shard again"


@dataclass(frozen=True, slots=True)
class TarEntry:
    """One utterance of a shard: where its audio lies and what its text is (None: no .txt member)."""

    key: str
    member: str
    offset: int
    size: int
    txt: str | None


def tar_index(tar: Path | str, *, cache: Path | None = None) -> tuple[TarEntry, ...]:
    """The utterances of one shard; from its kept index where that fits the file's size and time, else by one scan.

    tar:   a path, or a URL that fsspec knows
    cache: folder for the index; None is beside the shard (`NAME.tar.index.json`), for a URL the user's cache folder

    It is written only where that is possible. Raises DataError: damaged, cut short or compressed; a member that is a
    link or names a path outside the tar; out of reach.
    """
    place = _index_place(tar, cache)
    stamp = _stamp(tar)
    kept = keeping.kept(place, _KIND) if place is not None and stamp is not None else None
    if kept is not None and kept["stamp"] == list(stamp or ()):
        return tuple(TarEntry(*row) for row in kept["rows"])
    rows = _scan(tar)
    if place is not None and stamp is not None and _stamp(tar) == stamp:
        table = [[r.key, r.member, r.offset, r.size, r.txt] for r in rows]
        keeping.keep(place, _KIND, {"stamp": stamp, "rows": table})
    return rows


def _stamp(tar: Path | str) -> tuple[object, ...] | None:
    if isinstance(tar, str):
        return byte_range.stamp(tar)
    try:
        status = tar.stat()
    except OSError as exc:
        raise DataError(f"cannot be read: {exc.strerror}", where=str(tar)) from exc
    return status.st_size, status.st_mtime_ns


def _index_place(tar: Path | str, cache: Path | None) -> Path | None:
    if cache is None and isinstance(tar, Path):
        return tar.with_name(tar.name + ".index.json")
    if cache is None:
        own = keeping.folder()
        cache = own / "shards" if own is not None else None
    # Two shards of one name in different folders must not share an index.
    return None if cache is None else cache / f"{Path(str(tar)).stem}-{keeping.name_for(tar)[:16]}.index.json"


@contextmanager
def _bytes_of(tar: Path | str) -> Iterator[IO[bytes]]:
    if isinstance(tar, str):
        assert is_url(tar)  # a local path is a Path
        yield byte_range.RangeFile(tar)  # type: ignore[misc]  # reads and seeks, which is all that is asked of it
        return
    with tar.open("rb") as file:
        yield file


class _Bounded:
    """A file of which nobody reads much at once: the size of a header's extension is whatever the header says."""

    def __init__(self, file: IO[bytes], tar: Path | str) -> None:
        self._file, self._tar = file, tar
        self.tell, self.seek = file.tell, file.seek

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MOST_TEXT_BYTES:
            raise DataError(
                f"a header or text of {size} bytes at byte {self.tell()}",
                where=str(self._tar),
                fix="do not use this file",
            )
        return self._file.read(size)


def _scan(tar: Path | str) -> tuple[TarEntry, ...]:
    try:
        with _bytes_of(tar) as whole:
            size = whole.seek(0, os.SEEK_END)
            whole.seek(0)
            head = whole.read(8)
            whole.seek(0)
            file: Any = _Bounded(whole, tar)
            found = _Found(tar, size)
            with tarfile.open(fileobj=file, mode="r:") as archive:
                last = -1
                for member in archive:
                    if member.offset <= last or member.size < 0:
                        raise DataError("this tar is damaged: a member leads back", where=str(tar), fix=_AGAIN)
                    last = member.offset
                    found.add(member, file)
                _check_end(file, archive.offset, tar)
    except (tarfile.TarError, RecursionError, ValueError) as exc:
        if head[:2] == b"\x1f\x8b" or head[:3] == b"BZh" or head[:3] == b"\xfd7z" or head[:4] == b"\x28\xb5\x2f\xfd":
            raise DataError(
                "this tar is compressed and cannot be read by offset", where=str(tar), fix="unpack it to a plain .tar"
            ) from exc
        raise DataError(f"this tar is damaged: {exc}", where=str(tar), fix=_AGAIN) from exc
    except OSError as exc:
        raise DataError(f"cannot be read: {exc.strerror or exc}", where=str(tar)) from exc
    return found.entries()


def _check_end(file: Any, end: int, tar: Path | str) -> None:
    """Refuse what tarfile takes for an end: a header that is damaged, or nothing at all."""
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if not block:
        raise DataError("this tar is cut short: it has no end mark", where=str(tar), fix=_AGAIN)
    if block.strip(b"\0"):
        raise DataError(
            f"this tar is damaged: the header at byte {end} cannot be read, and the members after it are lost",
            where=str(tar),
            fix=_AGAIN,
        )
    if file.read(_TAIL_BYTES).strip(b"\0"):
        raise DataError(
            f"something follows the end of this tar at byte {end}",
            where=str(tar),
            fix="join archives with `tar --concatenate`, or list each of them",
        )


class _Found:
    """The members of a shard by key, as they come."""

    def __init__(self, tar: Path | str, size: int) -> None:
        self._tar, self._size = tar, size
        self._audio: dict[str, tuple[str, int, int]] = {}
        self._texts: dict[str, str] = {}
        self._order: dict[str, None] = {}

    def add(self, member: tarfile.TarInfo, file: Any) -> None:
        """Take note of a member, and read its text from `file`. Raises DataError for one that cannot be meant."""
        name, where = member.name, f"{self._tar}!/{member.name}"
        if member.isdir():
            return
        if os.path.isabs(name) or ".." in name.split("/"):
            raise DataError("this member names a path outside the tar", where=where, fix="do not use this file")
        if not member.isfile() or member.sparse is not None:
            raise DataError("this member is a link or a special file", where=where, fix="write regular files")
        if member.offset_data + member.size > self._size:
            raise DataError(
                f"this tar is cut short: {name} ends at byte {member.offset_data + member.size} of {self._size}",
                where=where,
                fix=_AGAIN,
            )
        key, _, suffix = name.removeprefix("./").rpartition(".")
        if os.path.basename(key).startswith("._"):
            return  # resource forks that macOS adds
        if suffix.lower() == "txt":
            if key in self._texts:
                raise DataError(f"the key {key!r} has two texts", where=where, fix=_AGAIN)
            self._texts[key] = _text(_body(member, file, where), where)
        elif f".{suffix.lower()}" in AUDIO_SUFFIXES:
            if key in self._audio:
                raise DataError(f"the key {key!r} has two audio members", where=where, fix=_AGAIN)
            self._audio[key] = (name, member.offset_data, member.size)
        else:
            return
        self._order[key] = None

    def entries(self) -> tuple[TarEntry, ...]:
        """The utterances, in the order of the tar."""
        return tuple(TarEntry(k, *self._audio.get(k, ("", 0, 0)), self._texts.get(k)) for k in self._order)


def _body(member: tarfile.TarInfo, file: Any, where: str) -> bytes:
    if member.size > _MOST_TEXT_BYTES:
        raise DataError(f"a text of {member.size} bytes", where=where, fix="this is no transcript")
    back = file.tell()
    file.seek(member.offset_data)
    body: bytes = file.read(member.size)
    file.seek(back)
    return body


def _text(body: bytes, where: str) -> str:
    try:
        return " ".join(body.decode("utf-8-sig").split("\n")).replace("\r", "").strip()
    except UnicodeDecodeError as exc:
        raise DataError(f"not UTF-8: byte 0x{exc.object[exc.start]:02x}", where=where) from exc
