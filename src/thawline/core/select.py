"""Which tensors a selector names.

Plain data in, plain data out; torch is never imported. How a selector is written is `selector_syntax`'s matter.

A tensor wrapped by LoRA, DDP, FSDP or `torch.compile` answers to its original name as well as to its present one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from thawline.core.index import KINDS, ModelIndex, Node
from thawline.core.selector_syntax import Item as Item
from thawline.core.selector_syntax import Segment, expand_braces, numbers_in, segments_of, split_rows
from thawline.core.selector_syntax import items_of as items_of
from thawline.core.selector_syntax import yaml_hint as yaml_hint
from thawline.errors import SelectorError

Rows = tuple[tuple[int, int], ...]
"""Ranges of rows [start, stop) of one tensor, ascending and apart."""

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


def _match_paths(item: Item, index: ModelIndex) -> Match:
    body, rows = split_rows(item)
    anchors: list[Node] = []
    notes: list[str] = []
    for text in expand_braces(body, item):
        # A present name, exactly as written, is meant as such: it may hold segments of a wrapper.
        place = index.place(text) if _NAME.fullmatch(text.replace(".", "")) else None
        if place is not None:
            hit = [place]
        else:
            hit, undecided = _Walk(index, segments_of(text, item), item).run()
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
    picked = sorted(set(numbers_in(text, count, item, f"rows of {index.tensors[number].name}")))
    if not picked:
        raise SelectorError(f"{item.text!r} names no row of {count}", where=item.where, fix="correct the range")
    ranges: list[tuple[int, int]] = []
    for row in picked:
        if ranges and ranges[-1][1] == row:
            ranges[-1] = (ranges[-1][0], row + 1)
        else:
            ranges.append((row, row + 1))
    return Match((number,), found.anchors, {number: tuple(ranges)}, found.notes)


class _Walk:
    """One pass of a pattern over the tree of names."""

    def __init__(self, index: ModelIndex, segments: tuple[Segment, ...], item: Item) -> None:
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

    def kind(self, segment: Segment) -> str:
        kind = segment.name[1:]
        if kind not in KINDS and self.index.source == "header":
            near = near_misses(segment.name, self.index)
            raise SelectorError(
                f"{self.item.text!r}: classes cannot be told from a checkpoint's header",
                where=self.item.where,
                fix=(f"did you mean {near[0]}? " if near else "") + "a built model knows its classes; or use names",
            )
        return kind

    def anywhere(self, node: Node, segment: Segment, at: int) -> None:
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

    def enter(self, node: Node, segment: Segment, at: int) -> None:
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
        picked = numbers_in(text, count, self.item, what)
        return [node.children[str(i)] for i in picked if str(i) in node.children]


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
        return bool(_Walk(index, segments_of(text, item), item).run()[0])
    except SelectorError:
        return False
