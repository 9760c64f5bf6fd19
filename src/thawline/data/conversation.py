"""Questions and answers about clips, as instruction files hold them.

Two file formats are read: Ask-Anything's (`video_chat2/dataset/it_dataset*.py`, `pt_dataset.py`) and the list of
`conversations` that LLaVA introduced. Plain data; torch is never imported, and no clip is opened here. The words of a
language model around a dialogue are `conversation_templates`' matter, its token numbers `conversation_tokens`'.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from thawline.core.config import near_names
from thawline.errors import DataError

Media = Literal["video", "image", "text"]
Format = Literal["auto", "ask-anything", "llava"]
_PLACEHOLDERS = ("<image>", "<video>")
_QUOTED = 200
"""Characters of an odd value that a message quotes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One question with its answer. The question may be empty (captions)."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """One sample of an instruction file.

    key:         `file.json#17`, or the entry's own id
    media:       absolute paths of its clips, in order; several only for images
    instruction: what the Q-Former reads, and what stands in front of the conversation
    start_s, end_s: the part of the video that is meant, None for all of it
    caption:     stage 2's samples have one instead of turns
    """

    key: str
    kind: Media
    media: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = ()
    instruction: str = ""
    start_s: float | None = None
    end_s: float | None = None
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Malformed:
    """An entry that is no sample, kept in its place so that the numbers of the others stay."""

    key: str
    reason: str


class Dialogues(Sequence[Dialogue]):
    """An instruction file. Asking for a malformed entry raises DataError, and costs that one sample.

    fingerprint: of the file's bytes, hexadecimal
    """

    def __init__(self, path: Path, entries: Sequence[Dialogue | Malformed], fmt: str, fingerprint: str) -> None:
        self.path = path
        self.format = fmt
        self.fingerprint = fingerprint
        self._entries = tuple(entries)

    @overload
    def __getitem__(self, number: int) -> Dialogue: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Dialogue]: ...
    def __getitem__(self, number: int | slice) -> Dialogue | Sequence[Dialogue]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        entry = self._entries[number]
        if isinstance(entry, Malformed):
            raise DataError(entry.reason, where=entry.key, fix="mend or remove the entry")
        return entry

    def __len__(self) -> int:
        return len(self._entries)

    def key(self, number: int) -> str:
        """What an entry is called in reports, also where it is malformed."""
        return self._entries[number].key

    @property
    def malformed(self) -> tuple[Malformed, ...]:
        return tuple(e for e in self._entries if isinstance(e, Malformed))


def read_dialogues(path: Path, *, media_root: Path | None = None, format: Format = "auto") -> Dialogues:
    """Read an instruction file, or a caption file.

    media_root: what relative paths in it are relative to; the file's own folder where None
    Raises DataError where the file is absent, no JSON list, empty, or not one entry is a sample.
    """
    try:
        raw = path.read_bytes()
    except OSError as exc:
        near = near_names(path.name, [p.name for p in path.parent.glob("*.json")])
        raise DataError(
            f"the instruction file cannot be read: {exc.strerror}",
            where=str(path),
            fix=f"did you mean {path.parent / near[0]}?" if near else "give a file that is one JSON list of samples",
        ) from exc
    rows = _rows(raw, path)
    root = media_root if media_root is not None else path.parent
    entries = _apart([_entry(row, f"{path.name}#{number}", root, format) for number, row in enumerate(rows)], path.name)
    if all(isinstance(e, Malformed) for e in entries):
        first = entries[0]
        assert isinstance(first, Malformed)
        raise DataError(
            f"none of its {len(entries)} entries is a sample; the first: {first.reason}",
            where=str(path),
            fix='an entry has "QA" (Ask-Anything), "conversations" (LLaVA) or "caption"',
        )
    fmt = "llava" if any(isinstance(r, dict) and "conversations" in r for r in rows) else "ask-anything"
    return Dialogues(path, entries, fmt, hashlib.blake2b(raw, digest_size=16).hexdigest())


def _rows(raw: bytes, path: Path) -> list[Any]:
    """The entries of a file. Raises DataError where its bytes are no JSON list, saying what they may be instead."""
    try:
        rows = json.loads(raw)
    except (ValueError, RecursionError) as exc:
        by_line = isinstance(exc, json.JSONDecodeError) and exc.msg == "Extra data" and exc.lineno > 1
        raise DataError(
            f"not JSON: {exc}",
            where=str(path),
            fix="it has a sample a line: put [ in front, ] behind, and a comma after each line but the last"
            if by_line
            else "it must be one JSON list of samples",
        ) from exc
    if isinstance(rows, list) and rows:
        return rows
    lists = [key for key, value in rows.items() if isinstance(value, list)] if isinstance(rows, dict) else []
    raise DataError(
        "no samples: it must be a JSON list that is not empty",
        where=str(path),
        fix=f"it is an object: write the list under {lists[0]!r} into a file of its own" if lists else "add samples",
    )


def _apart(entries: Sequence[Dialogue | Malformed], name: str) -> list[Dialogue | Malformed]:
    """The entries, those that share an id with others told apart by their numbers."""
    count = Counter(entry.key for entry in entries)
    return [
        replace(entry, key=f"{entry.key} ({name}#{number})") if count[entry.key] > 1 else entry
        for number, entry in enumerate(entries)
    ]


def _entry(row: Any, key: str, root: Path, format: Format) -> Dialogue | Malformed:
    if not isinstance(row, dict):
        return Malformed(key, f"an entry must be an object, got {type(row).__name__}")
    try:
        is_llava = format == "llava" or (format == "auto" and "conversations" in row)
        return _from_llava(row, key, root) if is_llava else _from_ask_anything(row, key, root)
    except DataError as exc:
        return Malformed(key, exc.what)


def _from_ask_anything(row: Mapping[str, Any], key: str, root: Path) -> Dialogue:
    kind, media = _media_of(row, root)
    if "caption" in row:
        if not media:
            raise DataError("a caption without a video or image")
        caption = _text(row["caption"], "caption")
        if not caption.strip():
            raise DataError("the caption is empty")
        return Dialogue(key=key, kind=kind, media=media, caption=caption)
    qa = row.get("QA")
    if not isinstance(qa, list) or not qa:
        raise DataError('"QA" must be a list of questions and answers that is not empty')
    turns = []
    for item in qa:
        if not isinstance(item, dict) or "a" not in item:
            raise DataError(f'every item of "QA" needs an answer "a", got {_short(item)}')
        turns.append(Turn(question=_text(item.get("q", ""), "q"), answer=_text(item["a"], "a")))
    start_s, end_s = _part_of(row)
    return Dialogue(
        key=key,
        kind=kind,
        media=media,
        turns=tuple(turns),
        instruction=_text(qa[0].get("i", ""), "i"),
        start_s=start_s,
        end_s=end_s,
    )


def _from_llava(row: Mapping[str, Any], key: str, root: Path) -> Dialogue:
    kind, media = _media_of(row, root)
    said = row.get("conversations")
    if not isinstance(said, list) or not said:
        raise DataError('"conversations" must be a list that is not empty')
    turns: list[Turn] = []
    system = ""
    question: str | None = None
    places = 0
    for item in said:
        if not isinstance(item, dict) or "from" not in item or "value" not in item:
            raise DataError(f'every item of "conversations" needs "from" and "value", got {_short(item)}')
        who, text = str(item["from"]), _text(item["value"], "value")
        if who in ("human", "user"):
            for place in _PLACEHOLDERS:
                places += text.count(place)
                text = text.replace(place, "")
            question = text.strip()
        elif who in ("gpt", "assistant"):
            turns.append(Turn(question=question or "", answer=text.strip()))
            question = None
        elif who == "system":
            system = text.strip()
        else:
            raise DataError(f'"from" is {who!r}; known: human, gpt, user, assistant, system')
    if not turns:
        raise DataError("nobody answers in it")
    if places and places != len(media):
        raise DataError(f"it has {places} places for clips and names {len(media)} files")
    own = str(row["id"]) if isinstance(row.get("id"), (str, int)) and row["id"] != "" else key
    return Dialogue(key=own, kind=kind, media=media, turns=tuple(turns), instruction=system)


def _media_of(row: Mapping[str, Any], root: Path) -> tuple[Media, tuple[str, ...]]:
    kinds: list[Media] = [k for k in ("video", "image") if row.get(k)]
    if not kinds:
        return "text", ()
    if len(kinds) > 1:
        raise DataError("it names a video and an image; one of them is meant")
    value = row[kinds[0]]
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(n, str) and n for n in names):
        raise DataError(f"{kinds[0]!r} must be a path or a list of paths, got {_short(value)}")
    for name in names:
        _text(name, kinds[0])
    return kinds[0], tuple(n if "://" in n else os.path.abspath(root / n) for n in names)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what!r} must be text, got {_short(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as exc:  # JSON can spell half of a surrogate pair; no tokenizer and no disk takes it
        raise DataError(f"{what!r} holds {value[exc.start]!r}, which is half of a character") from exc
    return value


def _short(value: Any) -> str:
    """A value of a file as a message quotes it."""
    text = repr(value)
    return text if len(text) <= _QUOTED else text[:_QUOTED] + " ..."


def _part_of(row: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """The part of the video that is meant, in seconds; None, None for all of it."""
    given = {name: row[name] for name in ("start", "end") if row.get(name) is not None}
    if not given:
        return None, None
    if len(given) == 1:
        raise DataError(f'"{next(iter(given))}" stands alone: a part has "start" and "end", in seconds')
    try:
        start_s, end_s = float(given["start"]), float(given["end"])
    except (TypeError, ValueError, OverflowError) as exc:
        raise DataError(f'"start" and "end" must be seconds, got {_short(list(given.values()))}') from exc
    if not end_s > start_s >= 0:
        raise DataError(f"the part from {start_s:g} to {end_s:g} seconds is empty")
    return start_s, end_s


def shuffled(turns: Sequence[Turn], rng: np.random.Generator) -> tuple[Turn, ...]:
    """The turns in another order: upstream's `random_shuffle`, here from the sample's counter."""
    return tuple(turns[i] for i in rng.permutation(len(turns)))
