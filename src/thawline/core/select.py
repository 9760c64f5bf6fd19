"""Which tensors a selector names.

Plain data in, plain data out; torch is never imported. The language:

    encoder.embed                    a path names the whole subtree of a module, or one tensor; whole segments only
    encoder.*.norm*   **.weight      `*` within a segment, `**` across any number of segments
    decoder.**.{q,v}_proj            each word of a brace must match
    encoder.encoders[-2:]            children of a layer list by number, slice or list: [0], [10,16,17], [0,-2:]
    @norm @bias @embedding @linear @lora @ClassName    by kind, at any depth below what stands before: encoder.@norm
    re:.*\\.attn\\.(q|k)\\..*            a regular expression for the whole name of a tensor or of a module
    decoder.embed.0.weight[rows 5000:]   rows of one matrix, for new tokens
    [a, b, "!c"]                     a list adds up from left to right; `!` takes away
    {select: a, expect: 2}           a count: 2 layers, modules or tensors named directly (`tensors: 34` counts tensors)

A tensor wrapped by LoRA, DDP, FSDP or `torch.compile` answers to its original name as well as to its present one.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from thawline.core.index import KINDS, ModelIndex, Node
from thawline.errors import SelectorError

Rows = tuple[tuple[int, int], ...]
"""Ranges of rows [start, stop) of one tensor, ascending and apart."""

_BRACKET = re.compile(r"\[([^\[\]]*)\]$")
_SLICE = re.compile(r"(-?\d*):(-?\d*)(?::(-?\d+))?")
_BRACE = re.compile(r"\{([^{}]*)\}")
_NAME = re.compile(r"[^\s.\[\]{}!@]+")


@dataclass(frozen=True, slots=True)
class Match:
    """What one positive selector names.

    numbers: tensors, as positions in `ModelIndex.tensors`, in model order
    anchors: the modules or tensors that the pattern names directly, outermost only
    rows:    ranges of rows by tensor number, where only rows were meant
    notes:   what could not be decided, as sentences
    """

    numbers: tuple[int, ...]
    anchors: tuple[str, ...]
    rows: Mapping[int, Rows] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


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


def select(selector: Any, index: ModelIndex, *, where: str = "") -> tuple[str, ...]:
    """Names of the parameters and buffers that `selector` names, in model order.

    selector: a text, a list of them, or `{select: ..., expect: N}`. Raises SelectorError where anything in it matches
    nothing, is out of range, cannot be read, or breaks its promised count.

    >>> from thawline.core.index import ParamInfo
    >>> names = ("enc.0.weight", "enc.1.weight", "enc.10.weight", "head.weight")
    >>> index = ModelIndex(ParamInfo(name=n, shape=(2, 2), dtype="F32") for n in names)
    >>> select("enc.1", index), select(["**", "!enc[0,1]"], index)
    (('enc.1.weight',), ('enc.10.weight', 'head.weight'))
    """
    chosen = bytearray(len(index))
    for item in items_of(selector, where=where):
        for number in match(item, index).numbers:
            chosen[number] = not item.minus
    return tuple(info.name for info, on in zip(index.tensors, chosen, strict=True) if on)


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


def match(item: Item, index: ModelIndex) -> Match:
    """What `item` names (its `!` is the caller's business). Raises SelectorError; see `select`."""
    found = _match_regex(item, index) if item.text.startswith("re:") else _match_paths(item, index)
    _check_counts(item, found)
    return found


def layers_of(path: str, index: ModelIndex, *, where: str = "") -> tuple[str, ...]:
    """Paths of the layers of the one list called `path`, first layer first. Raises SelectorError where it is none."""
    found = match(Item(text=path, where=where), index)
    if len(found.anchors) != 1:
        raise SelectorError(
            f"{path!r} names {len(found.anchors)} modules, where one layer list is meant",
            where=where,
            fix=f"choose one of {', '.join(found.anchors[:4])}",
        )
    node = index.place(found.anchors[0])
    assert node is not None
    layers = tuple(
        child.path
        for key, child in sorted(node.children.items(), key=lambda kv: (len(kv[0]), kv[0]))
        if key.isdecimal() and child.holds_tensors
    )
    if not layers:
        lists = [n.path for n in index.tree.nodes if n.layers() > 1][:4]
        raise SelectorError(
            f"{path!r} is not a layer list: it has no numbered children",
            where=where,
            fix=f"layer lists here: {', '.join(lists)}" if lists else "this model has none",
        )
    return layers


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


def _check_counts(item: Item, found: Match) -> None:
    if item.expect is not None and len(found.anchors) != item.expect:
        raise SelectorError(
            f"{item.text!r} was expected to name {item.expect}, it names {len(found.anchors)}: {_some(found.anchors)}",
            where=item.where,
            fix="correct the selector or the count",
        )
    if item.tensors is not None and len(found.numbers) != item.tensors:
        raise SelectorError(
            f"{item.text!r} was expected to hold {item.tensors} tensors, it holds {len(found.numbers)}",
            where=item.where,
            fix="correct the selector or the count",
        )


def _some(names: Sequence[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _match_regex(item: Item, index: ModelIndex) -> Match:
    try:
        pattern = re.compile(item.text[3:])
    except re.error as exc:
        raise SelectorError(
            f"{item.text!r} is not a regular expression: {exc}", where=item.where, fix="Python's syntax is meant"
        ) from exc
    anchors: dict[str, Node] = {}
    for node in index.tree.nodes[1:]:
        if node.last > node.first and pattern.fullmatch(node.path):
            anchors[node.path] = node
    for name, place in index.tree.places.items():
        if name != place.path and place.holds_tensors and pattern.fullmatch(name):
            anchors[place.path] = place
    if not anchors:
        near = [i.name for i in index.tensors if pattern.search(i.name)]
        fix = (
            f"a regular expression must match a whole name; parts of {_some(near)} would: write re:.*{item.text[3:]}.*"
            if near
            else f"names look like {_some([i.name for i in index.tensors], 3)}"
        )
        raise SelectorError(f"{item.text!r} matches none of the {len(index)} tensors", where=item.where, fix=fix)
    return _gather(list(anchors.values()), index)


def _gather(anchors: Sequence[Node], index: ModelIndex, notes: tuple[str, ...] = ()) -> Match:
    numbers: list[int] = []
    outer: list[str] = []
    end = -1
    for node in sorted(anchors, key=lambda n: n.order):
        if node.order == 0 and len(anchors) > 0 and node.path:
            # A place outside the tree (the module that peft replaced): it is alone.
            numbers.extend([node.tensor] if node.tensor >= 0 else [])
            outer.append(node.path)
        elif node.order >= end:
            numbers.extend(index.tree.numbers(node))
            outer.append(node.path)
            end = node.end
    return Match(tuple(sorted(numbers)), tuple(outer), notes=notes)


@dataclass(frozen=True, slots=True)
class _Segment:
    """One step of a path. glob is None for a literal name; indices are the texts of its [...] in order."""

    text: str
    name: str
    glob: re.Pattern[str] | None
    indices: tuple[str, ...]


def _match_paths(item: Item, index: ModelIndex) -> Match:
    body, rows = _split_rows(item)
    anchors: list[Node] = []
    notes: list[str] = []
    for text in _expand_braces(body, item):
        # A present name, exactly as written, is meant as such: it may hold segments of a wrapper.
        place = index.place(text) if _NAME.fullmatch(text.replace(".", "")) else None
        if place is not None:
            hit = [place]
        else:
            hit, undecided = _Walk(index, _segments(text, item), item).run()
            if undecided:
                notes.append(
                    f"{item.text!r}: whether {_some(undecided)} is meant cannot be told from a header; "
                    "it was left out (a built model decides)"
                )
        with_tensors = [node for node in hit if node.holds_tensors or node.tensor >= 0]
        if not with_tensors:
            raise _matched_nothing(text, item, index, hit, notes)
        anchors.extend(with_tensors)
    found = _gather(anchors, index, tuple(notes))
    if rows is None:
        return found
    return _with_rows(found, rows, item, index)


def _split_rows(item: Item) -> tuple[str, str | None]:
    bracket = _BRACKET.search(item.text)
    if bracket is None or not re.match(r"\s*rows?\b", bracket[1]):
        return item.text, None
    return item.text[: bracket.start()], re.sub(r"^\s*rows?\b", "", bracket[1]).strip()


def _with_rows(found: Match, text: str, item: Item, index: ModelIndex) -> Match:
    numbers = [n for n in found.numbers if not index.tensors[n].is_buffer]
    if len(numbers) != 1 or not index.tensors[numbers[0]].shape:
        names = [index.tensors[n].name for n in found.numbers]
        raise SelectorError(
            f"{item.text!r}: rows belong to one parameter, but this names {len(names)} tensors: {_some(names)}",
            where=item.where,
            fix="name the matrix, e.g. decoder.embed.0.weight[rows 5000:]",
        )
    number = numbers[0]
    count = index.tensors[number].shape[0]
    picked = sorted(set(_picked(text, count, item, f"rows of {index.tensors[number].name}")))
    if not picked:
        raise SelectorError(f"{item.text!r} names no row of {count}", where=item.where, fix="correct the range")
    ranges: list[tuple[int, int]] = []
    for row in picked:
        if ranges and ranges[-1][1] == row:
            ranges[-1] = (ranges[-1][0], row + 1)
        else:
            ranges.append((row, row + 1))
    return Match((number,), found.anchors, {number: tuple(ranges)}, found.notes)


def _expand_braces(text: str, item: Item) -> Iterator[str]:
    pieces = _BRACE.split(text)
    if any(c in piece for piece in pieces[::2] for c in "{}"):
        raise SelectorError(f"{item.text!r}: a brace is not closed", where=item.where, fix="write {a,b}")
    options = [p.split(",") if i % 2 else [p] for i, p in enumerate(pieces)]
    if any(not word.strip() for o in options[1::2] for word in o):
        raise SelectorError(f"{item.text!r}: a brace holds an empty word", where=item.where, fix="write {a,b}")
    for words in itertools.product(*options):
        yield "".join(word.strip() for word in words)


def _segments(text: str, item: Item) -> tuple[_Segment, ...]:
    pieces: list[str] = []
    depth, start = 0, 0
    for i, char in enumerate(text):
        depth += (char == "[") - (char == "]")
        if char == "." and depth == 0:
            pieces.append(text[start:i])
            start = i + 1
    pieces.append(text[start:])
    return tuple(_segment(piece, item) for piece in pieces)


def _segment(piece: str, item: Item) -> _Segment:
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
    return _Segment(piece, name, glob, tuple(indices))


class _Walk:
    """One pass of a pattern over the tree of names."""

    def __init__(self, index: ModelIndex, segments: tuple[_Segment, ...], item: Item) -> None:
        self.index, self.segments, self.item = index, segments, item
        self.found: dict[int, Node] = {}
        self.seen: set[tuple[int, int]] = set()
        self.undecided: list[str] = []

    def run(self) -> tuple[list[Node], list[str]]:
        self.step(self.index.tree.root, 0)
        return list(self.found.values()), self.undecided

    def step(self, node: Node, at: int) -> None:
        key = (id(node), at)
        if key in self.seen:
            return
        self.seen.add(key)
        if at == len(self.segments):
            self.found[id(node)] = node
            return
        segment = self.segments[at]
        if segment.name == "**":
            if at + 1 == len(self.segments):
                self.found[id(node)] = node  # the rest of the subtree is inside it
            else:
                self.anywhere(node, self.segments[at + 1], at + 1)
        elif segment.name.startswith("@"):
            sure, unsure = self.index.of_kind(self.kind(segment))
            for below in sure:
                if node.order <= below.order < node.end:
                    self.enter(below, segment, at)
            self.undecided.extend(n.path for n in unsure if node.order <= n.order < node.end)
        elif not segment.name:
            self.enter(node, segment, at)
        elif segment.glob is None:
            child = node.children.get(segment.name)
            if child is not None:
                self.enter(child, segment, at)
        else:
            for name, child in node.children.items():
                if segment.glob.fullmatch(name):
                    self.enter(child, segment, at)

    def kind(self, segment: _Segment) -> str:
        kind = segment.name[1:]
        if kind not in KINDS and self.index.source == "header":
            near = near_misses(segment.name, self.index)
            raise SelectorError(
                f"{self.item.text!r}: classes cannot be told from a checkpoint's header",
                where=self.item.where,
                fix=(f"did you mean {near[0]}? " if near else "") + "a built model knows its classes; or use names",
            )
        return kind

    def anywhere(self, node: Node, segment: _Segment, at: int) -> None:
        """Places strictly below `node`, at any depth, whose last segment fits; `**` is done by name, not by descent."""
        if segment.name in ("", "**") or segment.name.startswith("@"):
            for below in self.index.tree.below(node):
                self.step(below, at)
            return
        by_last = self.index.tree.by_last
        names = [segment.name] if segment.glob is None else [n for n in by_last if segment.glob.fullmatch(n)]
        for name in names:
            for place in by_last.get(name, ()):
                if node.order < place.order < node.end:
                    self.enter(place, segment, at)

    def enter(self, node: Node, segment: _Segment, at: int) -> None:
        nodes = [node]
        for text in segment.indices:
            nodes = [layer for n in nodes for layer in self.layers(n, text)]
        for reached in nodes:
            self.step(reached, at + 1)

    def layers(self, node: Node, text: str) -> list[Node]:
        count = node.layers()
        what = f"layers of {node.path or 'the model'}"
        if count == 0:
            if any(s.glob is not None or s.name[:1] in ("*", "@") for s in self.segments):
                return []  # one of several places that a glob names; the others may be lists
            raise SelectorError(
                f"{self.item.text!r}: {node.path or 'the model'} is not a layer list, it has no numbered children",
                where=self.item.where,
                fix=f"its children: {_some(list(node.children))}" if node.children else "it is a single tensor",
            )
        picked = _picked(text, count, self.item, what)
        return [node.children[str(i)] for i in picked if str(i) in node.children]


def _picked(text: str, count: int, item: Item, what: str) -> list[int]:
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


def _matched_nothing(
    text: str, item: Item, index: ModelIndex, hit: Sequence[Node], notes: Sequence[str]
) -> SelectorError:
    spelled = repr(item.text) if text == item.text else f"{text!r} (in {item.text!r})"
    if hit:
        what = f"{spelled} names {len(hit)} modules, but they hold no tensors: {_some([n.path for n in hit])}"
        return SelectorError(what, where=item.where, fix="name the module beside it that has weights")
    what = f"{spelled} matches none of the {len(index)} tensors"
    if notes:
        what += ". " + " ".join(notes)
    near = near_misses(text, index)
    fix = f"closest: {', '.join(near)}" if near else "`thawline plan` lists the names"
    if text.startswith("re"):
        fix += "; a regular expression is written re:..."
    return SelectorError(what, where=item.where, fix=fix + "; or delete the rule if the layer is gone")


def near_misses(text: str, index: ModelIndex, *, count: int = 3) -> list[str]:
    """What may have been meant by a selector that matched nothing, best first."""
    segments = text.split(".")
    kind = segments[-1]
    if kind.startswith("@"):
        known = [f"@{k}" for k in (*KINDS, *index.classes())]
        close = difflib.get_close_matches(kind.lower(), [k.lower() for k in known], n=count, cutoff=0.5)
        return [".".join((*segments[:-1], k)) for k in known if k.lower() in close][:count]
    # The first segment that leads nowhere is the likely slip: try its neighbours there and look whether the rest fits.
    node = index.tree.root
    for at, segment in enumerate(segments):
        name = segment.partition("[")[0]
        child = node.children.get(name)
        if child is None and ("*" in name or name == ""):
            break
        if child is None:
            lowered = {k.lower(): k for k in node.children}
            close = difflib.get_close_matches(name.lower(), list(lowered), n=count, cutoff=0.5)
            head = ".".join((*segments[:at],))
            found = []
            for word in close:
                bracket = segment[len(name) :]
                path = ".".join(p for p in (head, lowered[word] + bracket, *segments[at + 1 :]) if p)
                found.append(path)
            if found:
                return [path for path in found if _leads_somewhere(path, index)] or found
            break
        node = child
    every = list(dict.fromkeys(n.path for n in index.tree.nodes[1:] if n.holds_tensors))
    literal = max((s for s in re.split(r"[.*?\[\]{}]+", text) if s), key=len, default=text)
    plain = difflib.get_close_matches(text, every, n=count, cutoff=0.6) if len(every) <= 20_000 else []
    if plain:
        return plain
    ends: dict[str, str] = {}
    for path in every:
        ends.setdefault(path.rpartition(".")[2], path)
    close = difflib.get_close_matches(literal, list(ends), n=count, cutoff=0.5)
    return [ends[c] for c in close]


def _leads_somewhere(text: str, index: ModelIndex) -> bool:
    item = Item(text=text)
    try:
        return bool(_Walk(index, _segments(text, item), item).run()[0])
    except SelectorError:
        return False
