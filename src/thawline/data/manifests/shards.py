"""WeNet's shards: tar files of KEY.wav and KEY.txt, scanned once and read by offset from then on."""

from __future__ import annotations

import json
import os
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from thawline.data.manifests.rows import Placed, Rows, absolute, lines_of, missing, nfc
from thawline.data.utterance import AUDIO_SUFFIXES, TarRef, Utterance
from thawline.errors import DataError

_INDEX_VERSION = 1
_PARTNER = "write the shard again with both members, KEY.wav and KEY.txt"


def shards(rows: Rows, path: Path) -> Iterator[Placed]:
    """The utterances of a list of tar files, or of one."""
    if path.suffix.lower() == ".tar":
        yield from _rows_of(rows, path, str(path))
        return
    for number, line in lines_of(path):
        if not line:
            continue
        where = f"{path}:{number}"
        try:
            tar = Path(absolute(line, path.parent, where))
            if not tar.is_file():
                error = missing(tar)
                raise DataError(error.what, where=where, fix=error.fix)
            yield from _rows_of(rows, tar, where)
        except DataError as error:
            rows.refuse(error)


def _rows_of(rows: Rows, tar: Path, where: str) -> Iterator[Placed]:
    for entry in tar_index(tar, cache=rows.cache):
        at = f"{tar}!/{entry.member or entry.key}"
        if not entry.member:
            rows.refuse(
                DataError(f"the text {entry.key}.txt has no audio of the same name in the tar", where=at, fix=_PARTNER)
            )
        elif entry.txt is None and rows.text_required:
            rows.refuse(DataError(f"no text: there is no {entry.key}.txt in the tar", where=at, fix=_PARTNER))
        else:
            ref = TarRef(str(tar), entry.member, entry.offset, entry.size)
            yield at, Utterance(key=nfc(entry.key), wav=str(ref), txt=nfc(entry.txt or ""))


@dataclass(frozen=True, slots=True)
class TarEntry:
    """One utterance of a shard: where its audio lies and what its text is (None: no .txt member)."""

    key: str
    member: str
    offset: int
    size: int
    txt: str | None


def tar_index(tar: Path, *, cache: Path | None = None) -> tuple[TarEntry, ...]:
    """The utterances of one shard; from its cached index where that fits the file's size and time, else by one scan.

    The index lies beside the shard (`NAME.tar.index.json`) or in `cache`; it is written only where that is possible.
    Raises DataError: damaged or compressed, a member that is a link or names a path outside the tar.
    """
    place = _index_place(tar, cache)
    try:
        status = tar.stat()
        stamp = [_INDEX_VERSION, status.st_size, status.st_mtime_ns]
    except OSError as exc:
        raise DataError(f"cannot be read: {exc.strerror}", where=str(tar)) from exc
    try:
        kept = json.loads(place.read_text(encoding="utf-8"))
        if kept["stamp"] == stamp:
            return tuple(TarEntry(*row) for row in kept["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or not ours: scanned below, and replaced where possible
    rows = _scan_tar(tar)
    body = json.dumps(
        {"stamp": stamp, "rows": [[r.key, r.member, r.offset, r.size, r.txt] for r in rows]}, ensure_ascii=False
    )
    _write_if_possible(place, body)
    return rows


def _index_place(tar: Path, cache: Path | None) -> Path:
    if cache is None:
        return tar.with_name(tar.name + ".index.json")
    # Two shards of one name in different folders must not share an index.
    return cache / f"{tar.stem}-{blake3(str(tar).encode()).hexdigest(8)}.index.json"


def _write_if_possible(place: Path, body: str) -> None:
    """An index saves a scan and nothing else, so a folder that cannot be written is no error."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    except OSError:
        return
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(body)
        os.replace(temporary, place)
    except OSError:
        Path(temporary).unlink(missing_ok=True)


def _scan_tar(tar: Path) -> tuple[TarEntry, ...]:
    audio: dict[str, tuple[str, int, int]] = {}
    texts: dict[str, str] = {}
    order: dict[str, None] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                name = member.name
                if member.isdir():
                    continue
                where = f"{tar}!/{name}"
                if os.path.isabs(name) or ".." in name.split("/"):
                    raise DataError("this member names a path outside the tar", where=where, fix="do not use this file")
                if not member.isfile() or member.sparse is not None:
                    raise DataError("this member is a link or a special file", where=where, fix="write regular files")
                key, _, suffix = name.removeprefix("./").rpartition(".")
                if os.path.basename(key).startswith("._"):
                    continue  # resource forks that macOS adds
                if suffix.lower() == "txt":
                    source = archive.extractfile(member)
                    assert source is not None  # a regular file
                    texts[key] = _text_member(source.read(), where)
                elif f".{suffix.lower()}" in AUDIO_SUFFIXES:
                    if key in audio:
                        raise DataError(f"the key {key!r} has two audio members", where=where)
                    audio[key] = (name, member.offset_data, member.size)
                else:
                    continue
                order[key] = None
            size = tar.stat().st_size
    except tarfile.ReadError as exc:
        with tar.open("rb") as file:
            head = file.read(3)
        if head[:2] == b"\x1f\x8b" or head == b"BZh" or head == b"\xfd7z":
            raise DataError(
                "this tar is compressed and cannot be read by offset", where=str(tar), fix="unpack it to a plain .tar"
            ) from exc
        raise DataError(f"this tar is damaged: {exc}", where=str(tar), fix="write the shard again") from exc
    except OSError as exc:
        raise DataError(f"cannot be read: {exc.strerror or exc}", where=str(tar)) from exc
    for key, (name, offset, length) in audio.items():
        if offset + length > size:
            raise DataError(
                f"this tar is cut short: {key} ends at byte {offset + length} of {size}",
                where=f"{tar}!/{name}",
                fix="write the shard again",
            )
    return tuple(TarEntry(key, *audio.get(key, ("", 0, 0)), texts.get(key)) for key in order)


def _text_member(body: bytes, where: str) -> str:
    try:
        return " ".join(body.decode("utf-8-sig").split("\n")).replace("\r", "").strip()
    except UnicodeDecodeError as exc:
        raise DataError(f"not UTF-8: byte 0x{exc.object[exc.start]:02x}", where=where) from exc
