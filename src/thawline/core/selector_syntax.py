"""How selectors are written: a value of a plan becomes items, and an item's text the segments of a path.

Plain text in, plain data out; what a selector names in a model is `select`'s matter. The language:

    encoder.embed                    a path names the whole subtree of a module, or one tensor; whole segments only
    encoder.*.norm*   **.weight      `*` within a segment, `**` across any number of segments
    decoder.**.{q,v}_proj            each word of a brace must match
    encoder.encoders[-2:]            children of a layer list by number, slice or list: [0], [10,16,17], [0,-2:]
    @norm @bias @embedding @linear @lora @ClassName    by kind, at any depth below what stands before: encoder.@norm
    re:.*\\.attn\\.(q|k)\\..*            a regular expression for the whole name of a tensor or of a module
    decoder.embed.0.weight[rows 5000:]   rows of one matrix, for new tokens
    [a, b, "!c"]                     a list adds up from left to right; `!` takes away
    {select: a, expect: 2}           a count: 2 layers, modules or tensors named directly (`tensors: 34` counts tensors)
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thawline.errors import SelectorError

_BRACKET = re.compile(r"\[([^\[\]]*)\]$")
_SLICE = re.compile(r"(-?\d*):(-?\d*)(?::(-?\d+))?")
_BRACE = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One selector of a list: its text without `!`, whether it takes away, and the counts it promises."""

    text: str
    minus: bool = False
    expect: int | None = None
    tensors: int | None = None
    where: str = ""

    @property
    def spelled(self) -> str:
        return ("!" if self.minus else "") + self.text


def items_of(selector: Any, *, where: str = "") -> tuple[Item, ...]:
    """The selectors that a value from a plan holds, in order. Raises SelectorError for anything that is none."""
    if isinstance(selector, str):
        text = selector.strip()
        minus = text.startswith("!")
        text = text[1:].strip() if minus else text
        if not text:
            raise SelectorError(f"{selector!r} is an empty selector", where=where, fix="write a name, or delete it")
        return (Item(text=text, minus=minus, where=where),)
    if isinstance(selector, Mapping):
        unknown = sorted(set(selector) - {"select", "expect", "tensors"}, key=str)
        if "select" not in selector or unknown:
            raise _not_a_selector(selector, where)
        inner = items_of(selector["select"], where=where)
        expect, tensors = selector.get("expect"), selector.get("tensors")
        if (expect is None and tensors is None) or len(inner) == 1:
            return tuple(_with_counts(item, expect, tensors) for item in inner)
        raise SelectorError(
            f"'expect' counts one selector, but here stand {len(inner)}",
            where=where,
            fix="give each its own {select: ..., expect: ...}",
        )
    if isinstance(selector, Sequence) and not isinstance(selector, (bytes, bytearray)):
        if not selector:
            raise SelectorError("the list of selectors is empty", where=where, fix='name what is meant, e.g. ["head"]')
        return tuple(item for part in selector for item in items_of(part, where=where))
    raise _not_a_selector(selector, where)


def yaml_hint(line: str) -> str:
    """How to write the selector on a line that YAML refused or read as something else; "" where nothing is odd.

    >>> yaml_hint("train: [ctc, encoder.encoders[-2:]]")
    'a slice inside a [...] list needs quotes: "encoder.encoders[-2:]"'
    """
    bare = re.sub(r"\"[^\"]*\"|'[^']*'", "", line)
    if (flow := re.search(r"\[.*?([\w.*{},@-]+\[[^\[\]]*\])", bare)) is not None:
        return f'a slice inside a [...] list needs quotes: "{flow[1].lstrip(",")}"'
    if (odd := re.search(r"(?:^|[-:\[,]\s*)([!@*&{][^\s,\]]*)", bare.strip())) is not None and odd[1] not in (
        "{",
        "{}",
    ):
        return f'a selector that begins with {odd[1][0]} needs quotes in YAML: "{odd[1]}"'
    return ""


def _not_a_selector(value: Any, where: str) -> SelectorError:
    if isinstance(value, Mapping) and any(v is None for v in value.values()):
        words = ",".join(str(k) for k in value)
        fix = f'a brace at the beginning needs quotes in YAML: "{{{words}}}..."'
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        fix = f'a number is a path only in quotes ("{value}"); layers of a list are written name[{value}]'
    else:
        fix = "write a text, a list of texts, or {select: ..., expect: N}"
    return SelectorError(f"{value!r} is not a selector", where=where, fix=fix)


def _with_counts(item: Item, expect: Any, tensors: Any) -> Item:
    for name, count in (("expect", expect), ("tensors", tensors)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise SelectorError(f"{name}: {count!r} is not a count", where=item.where, fix="a number from 1")
    return Item(text=item.text, minus=item.minus, expect=expect, tensors=tensors, where=item.where)


@dataclass(frozen=True, slots=True)
class Segment:
    """One step of a path. glob is None for a literal name; indices are the texts of its [...] in order."""

    text: str
    name: str
    glob: re.Pattern[str] | None
    indices: tuple[str, ...]


def split_rows(item: Item) -> tuple[str, str | None]:
    """The text without its `[rows ...]`, and what stands in that; None where no rows are meant."""
    bracket = _BRACKET.search(item.text)
    if bracket is None or not re.match(r"\s*rows?\b", bracket[1]):
        return item.text, None
    return item.text[: bracket.start()], re.sub(r"^\s*rows?\b", "", bracket[1]).strip()


def expand_braces(text: str, item: Item) -> Iterator[str]:
    """The texts that one with `{a,b}` stands for. Raises SelectorError for a brace that is open or holds nothing."""
    pieces = _BRACE.split(text)
    if any(c in piece for piece in pieces[::2] for c in "{}"):
        raise SelectorError(f"{item.text!r}: a brace is not closed", where=item.where, fix="write {a,b}")
    options = [p.split(",") if i % 2 else [p] for i, p in enumerate(pieces)]
    if any(not word.strip() for o in options[1::2] for word in o):
        raise SelectorError(f"{item.text!r}: a brace holds an empty word", where=item.where, fix="write {a,b}")
    for words in itertools.product(*options):
        yield "".join(word.strip() for word in words)


def segments_of(text: str, item: Item) -> tuple[Segment, ...]:
    """The steps of a path without braces. Raises SelectorError for one that cannot be read."""
    pieces: list[str] = []
    depth, start = 0, 0
    for i, char in enumerate(text):
        depth += (char == "[") - (char == "]")
        if char == "." and depth == 0:
            pieces.append(text[start:i])
            start = i + 1
    pieces.append(text[start:])
    return tuple(_segment(piece, item) for piece in pieces)


def _segment(piece: str, item: Item) -> Segment:
    name = piece
    indices: list[str] = []
    while (bracket := _BRACKET.search(name)) is not None:
        indices.insert(0, bracket[1])
        name = name[: bracket.start()]
    problem = ""
    if not name and not indices:
        problem = "it has an empty segment (two dots, or a dot at an end)"
    elif "[" in name or "]" in name:
        problem = "a bracket is not closed, or does not stand at the end of its segment"
    elif "**" in name and name != "**":
        problem = "`**` stands for whole segments and must be one of its own"
    elif name == "**" and indices:
        problem = "`**` is not a layer list"
    elif name == "@":
        problem = "@ needs a kind"
    elif any(c.isspace() for c in name):
        problem = "a name holds no spaces"
    elif "!" in name:
        problem = "`!` stands only at the beginning"
    if problem:
        raise SelectorError(
            f"{item.text!r} cannot be read: {problem}",
            where=item.where,
            fix="e.g. encoder.encoders[-2:], **.norm*, @bias, !decoder.embed, re:.*weight",
        )
    glob = None
    if name not in ("", "**") and not name.startswith("@") and ("*" in name or "?" in name):
        glob = re.compile("".join({"*": ".*", "?": "."}.get(c, re.escape(c)) for c in name))
    return Segment(piece, name, glob, tuple(indices))


def numbers_in(text: str, count: int, item: Item, what: str) -> list[int]:
    """The numbers that the inside of a [...] means for `count` layers or rows."""
    picked: list[int] = []
    for part in text.split(","):
        part = part.strip()
        if re.fullmatch(r"-?\d+", part):
            bounds = [int(part)]
            ok = -count <= bounds[0] < count
            chosen = [bounds[0] % count] if ok else []
        elif (cut := _SLICE.fullmatch(part)) is not None:
            start, stop, stride = (int(g) if g else None for g in cut.groups())
            # A slice that reaches past the end would silently mean fewer layers than were written.
            ok = all(b is None or -count <= b <= count for b in (start, stop)) and stride != 0
            chosen = list(range(count))[slice(start, stop, stride)] if ok else []
        else:
            raise SelectorError(
                f"{item.text!r} cannot be read: [{text}] is neither numbers nor slices",
                where=item.where,
                fix="e.g. [0], [-2:], [10,16,17], or [rows 5000:]",
            )
        if not ok:
            raise SelectorError(
                f"{item.text!r}: [{part}] is out of range, there are {count} {what}",
                where=item.where,
                fix=f"numbers go from 0 to {count - 1}, or from -{count} to -1",
            )
        if not chosen:
            raise SelectorError(
                f"{item.text!r}: [{part}] names none of the {count} {what}",
                where=item.where,
                fix=f"e.g. [0], [-1], [:{count}]",
            )
        picked.extend(chosen)
    return picked
