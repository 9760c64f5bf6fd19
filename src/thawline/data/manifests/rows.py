"""What the readers of every format share: lines of text, rows of named fields, and what becomes of a bad one.

Policy for text and keys: UTF-8 with or without a byte order mark, Unix or Windows line ends, surrounding white space
removed, Unicode normalised to NFC. Paths are left as written; a relative one is relative to the folder of its list.
"""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from thawline.data.utterance import TarRef, Utterance, is_url
from thawline.errors import DataError

_WITH_CARE = re.compile(
    r"^\.|/\.|//|/$|!|^$|\0"
)  # what a path holds that is not simply joined: dots, "//", a tar's "!/"

Report = Callable[[DataError], None]
Placed = tuple[str, Utterance]
"""Where a row stands (file:line, or a member of a tar), and the row."""

KEY_NAMES = ("key", "id", "utt_id", "utt")
WAV_NAMES = ("wav", "audio_filepath", "audio", "file_name", "path", "file")
TXT_NAMES = ("txt", "text", "sentence", "transcription", "transcript")


@dataclass(frozen=True)
class Rows:
    """How rows are read.

    text_required: whether a row without text is bad
    allow_pipes:   whether a Kaldi wav.scp may name shell commands
    cache:         folder for the indexes of tar shards; None is beside each shard
    refuse:        takes what is wrong with a row; it raises, or the row is left out
    """

    text_required: bool
    allow_pipes: bool
    cache: Path | None
    refuse: Report

    def unique(self, rows: Iterable[Placed]) -> Iterator[Utterance]:
        """The rows whose key is not there before them."""
        first: dict[str, str] = {}
        for where, row in rows:
            if row.key in first:
                self.refuse(
                    DataError(
                        f"the key {row.key!r} is there twice; first at {first[row.key]}",
                        where=where,
                        fix="give every utterance its own key",
                    )
                )
                continue
            first[row.key] = where
            yield row

    def row(self, fields: Mapping[str, Any], where: str, root: Path) -> Placed | None:
        """A row of named fields (JSON or a table); None and a report where it is no utterance."""
        try:
            return where, self._utterance(fields, where, root)
        except DataError as error:
            self.refuse(error)
            return None

    def _utterance(self, fields: Mapping[str, Any], where: str, root: Path) -> Utterance:
        wav = _first(fields, WAV_NAMES)
        if isinstance(wav, Mapping):  # the datasets library writes {"path": ..., "bytes": null}
            wav = wav.get("path")
        if not wav:
            raise DataError(
                f"no audio path; the fields are {', '.join(map(str, fields))}",
                where=where,
                fix=f"name it {WAV_NAMES[0]!r} (also read: {', '.join(WAV_NAMES[1:])})",
            )
        if not isinstance(wav, str):
            raise DataError(f"the audio path is not a text: {wav!r}", where=where)
        txt = _first(fields, TXT_NAMES)
        if txt is None and self.text_required:
            raise DataError(
                f"no text; the fields are {', '.join(map(str, fields))}",
                where=where,
                fix=f"name it {TXT_NAMES[0]!r} (also read: {', '.join(TXT_NAMES[1:])})",
            )
        _check_text(txt, "text", where)
        key = _first(fields, KEY_NAMES)
        _check_text(key, "key", where)
        if key is not None and not nfc(key):
            raise DataError("the key is empty", where=where, fix="give every utterance its own key")
        start = seconds_of(fields, ("start", "start_s", "offset"), where)
        end = seconds_of(fields, ("end", "end_s"), where)
        duration = seconds_of(fields, ("duration", "duration_s"), where)
        if end is None and start is not None and duration is not None:
            end = start + duration  # NeMo writes offset and duration
        if start is not None and end is not None:
            if end <= start:
                raise DataError(f"the stretch ends at {end:g} s, before it starts at {start:g} s", where=where)
            duration = end - start
        return Utterance(
            key=nfc(key) if key is not None else nfc(Path(wav).with_suffix("").as_posix()),
            wav=absolute(wav, root, where),
            txt="" if txt is None else nfc(txt),
            speaker=nfc(fields.get("speaker") or fields.get("client_id") or ""),
            start_s=start,
            end_s=end,
            duration_s=duration,
            lang=nfc(fields.get("lang") or fields.get("language") or fields.get("locale") or ""),
            task=nfc(fields.get("task") or ""),
        )


def _check_text(value: object, what: str, where: str) -> None:
    """Refuse what is no text: `str` of it would be learnt as one. A whole number is (a digit, a numbered key)."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return
    if not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(f"the {what} is no string but {kind}: {str(value)[:60]}", where=where, fix="write it in quotes")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise DataError(
            f"the {what} holds half of a surrogate pair: {value[:60]!r}", where=where, fix="write it as UTF-8"
        )


def nfc(text: object) -> str:
    """`text` in Unicode NFC without white space around it: a decomposed and a composed letter are the same text."""
    text = str(text)
    return text.strip() if text.isascii() else unicodedata.normalize("NFC", text).strip()


def lines_of(path: Path, *, strip: str | None = None) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and lines without surrounding white space (or the characters `strip`).

    Only "\\n" ends a line: U+2028 and the like may stand in a text.
    """
    number = 0
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, line.strip(strip)
    except UnicodeDecodeError as exc:
        wide = number == 1 and exc.object[:2] in (b"\xff\xfe", b"\xfe\xff")
        encoding = "UTF-16" if wide else "GB18030"
        raise DataError(
            f"not UTF-8: byte 0x{exc.object[exc.start]:02x} at column {exc.start + 1}" + (" (UTF-16)" if wide else ""),
            where=f"{path}:{number}",
            fix=f"convert the file, e.g. iconv -f {encoding} -t UTF-8 (or the encoding it was written in)",
        ) from exc
    except OSError as exc:
        raise DataError(f"cannot be read: {exc.strerror}", where=str(path)) from exc


def _first(fields: Mapping[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        value = fields.get(name)
        if value is not None:
            return value
    return None


def seconds_of(fields: Mapping[str, Any], names: Sequence[str], where: str) -> float | None:
    """The first of the fields `names` as seconds; None where there is none. Raises DataError for what is no time."""
    value = _first(fields, names)
    if value is None or value == "":
        return None
    try:
        seconds = -1.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        name = next(n for n in names if fields.get(n) is not None)
        raise DataError(f"{name} is not a time in seconds: {value!r}", where=where)
    return seconds


def absolute(wav: str, root: Path, where: str) -> str:
    """The path `wav` as a list in `root` means it; a member of a tar keeps a network address.

    Raises DataError for any other network address, and for what no path can be.
    """
    if wav.isascii() and not _WITH_CARE.search(wav):  # nearly every path; normpath costs ten times as much
        return wav if wav.startswith("/") else os.path.join(root, wav)
    if is_url(wav):
        if TarRef.parse(wav) is not None:
            return wav
        if not wav.startswith("file://"):
            raise DataError(
                f"audio behind a network address is not read: {wav[:80]!r}",
                where=where,
                fix="bring it to a local or mounted folder, or pack it into tar shards, which are read by offset",
            )
        wav = wav.removeprefix("file://")
    if "\0" in wav:
        raise DataError(f"no path can hold a NUL byte: {wav[:80]!r}", where=where, fix="write the list again")
    ref = TarRef.parse(wav) if "!/" in wav else None
    if ref is not None:
        return str(replace(ref, tar=os.path.normpath(os.path.join(root, ref.tar))))
    return os.path.normpath(os.path.join(root, wav))


def missing(path: Path) -> DataError:
    """The refusal of a path that is not there: where it breaks off, and what is near."""
    parent = path.parent
    while not parent.exists() and parent != parent.parent:
        path, parent = parent, parent.parent
    try:
        siblings = sorted(p.name for p in parent.iterdir() if not p.name.startswith("."))
    except (PermissionError, NotADirectoryError):
        siblings = []
    near = difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.5)
    there = near or siblings[:5]
    fix = f"{'near it' if near else 'there'} {'is' if len(there) == 1 else 'are'}: {', '.join(there)}"
    return DataError(
        f"there is no {path.name!r} in {parent}",
        where=str(path),
        fix=fix if there else "check the path; a path in a recipe is relative to the recipe",
    )
