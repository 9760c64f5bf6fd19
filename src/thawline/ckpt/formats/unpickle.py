"""Reading pickles without running anything: a small machine for the pickle language that only builds plain data.

A pickle is a program: it names functions and calls them. What may be named, and the plain value that each name stands
for, is the fixed list of `pickle_names`; any other name is refused before anything is called. Work is bounded: every
instruction is paid for by bytes of the pickle, containers are counted, keys are simple.
Language: Lib/pickletools.py of CPython, protocols 0 to 5.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any, Final

from thawline.ckpt.formats.pickle_names import Inert, TensorRef, as_key, call, known, storage
from thawline.errors import CheckpointError

MAX_BYTES: Final = 256 << 20
"""Pickles of metadata are kilobytes; those of the largest distributed checkpoints tens of megabytes."""

_MAX_CONTAINERS: Final = 12_000_000
_MAX_INTEGER_BYTES: Final = 256


def unpickle(data: memoryview, *, where: str, start: int = 0) -> tuple[Any, int]:
    """The value that the pickle at byte `start` of `data` builds, and the position after its end.

    Raises CheckpointError, with `where` and the position, for names outside the list and for damage of any kind.
    """
    if len(data) - start > MAX_BYTES:
        raise CheckpointError(
            f"a pickle of {len(data) - start} bytes is not metadata (the limit is {MAX_BYTES})",
            where=where,
            fix="do not trust this file",
        )
    machine = _Machine(data, start, where)
    try:
        return machine.run()
    except (struct.error, IndexError, KeyError, ValueError, TypeError, OverflowError, RecursionError) as exc:
        why = "it ends before it is whole" if machine.at >= len(data) else exc
        raise CheckpointError(
            f"the pickle is damaged near byte {machine.at}: {why}", where=where, fix="copy the file again"
        ) from exc


class _Mark:
    """Where a run of values begins on the stack."""


_MARK: Final = _Mark()


class _Machine:
    def __init__(self, data: memoryview, start: int, where: str) -> None:
        self.data = data
        self.at = start
        self.where = where
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.containers = 0

    def run(self) -> tuple[Any, int]:
        data, table = self.data, _INSTRUCTIONS
        while True:
            code = data[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                if len(self.stack) != 1:
                    raise ValueError(f"{len(self.stack)} values are left over")
                return self.pop(), self.at
            instruction = table.get(code)
            if instruction is None:
                raise ValueError(f"instruction {code:#04x} is not known")
            instruction(self)

    # reading

    def take(self, count: int) -> memoryview:
        if count < 0 or self.at + count > len(self.data):
            raise ValueError(f"{count} more bytes are wanted, {len(self.data) - self.at} are left")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, kind: str) -> int:
        value: int = struct.unpack(kind, self.take(struct.calcsize(kind)))[0]
        return value

    def line(self) -> str:
        # A line of the text protocols: names and numbers, so a bounded look ahead is enough.
        window = bytes(self.data[self.at : self.at + (1 << 16)])
        end = window.index(b"\n")
        self.at += end + 1
        return window[:end].decode("utf-8")

    # the stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a value is missing")
        return value

    def to_mark(self) -> list[Any]:
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is _MARK:
                values = self.stack[at + 1 :]
                del self.stack[at:]
                return values
        raise ValueError("a mark is missing")

    def made(self, value: Any, cost: int = 1) -> None:
        self.containers += cost
        if self.containers > _MAX_CONTAINERS:
            raise CheckpointError(
                f"the pickle builds more than {_MAX_CONTAINERS} objects", where=self.where, fix="do not trust this file"
            )
        self.stack.append(value)

    def put(self, index: int) -> None:
        if self.stack[-1] is _MARK:
            raise ValueError("a mark cannot be remembered")
        self.memo[index] = self.stack[-1]

    # names and calls

    def name(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name is not text")
        self.push(known(module, name, self.where))

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(args, tuple):
            raise ValueError("arguments are not a tuple")
        self.made(call(function, args, self.where))

    def new_object(self, keywords: bool) -> None:
        extra = self.pop() if keywords else {}
        args, cls = self.pop(), self.pop()
        if not isinstance(args, tuple) or not isinstance(extra, dict):
            raise ValueError("arguments are not a tuple")
        self.made(call(cls, (*args, extra) if extra else args, self.where))

    def build(self) -> None:
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif not isinstance(target, dict | TensorRef):
            # A dict's attributes (`_metadata` of a state dict) and a tensor's are not part of the data.
            raise ValueError(f"{type(target).__name__} takes no state")

    def set_items(self, pairs: list[Any]) -> None:
        if len(pairs) % 2:
            raise ValueError("a key has no value")
        target = self.stack[-1]
        if isinstance(target, Inert):
            if target.items is None:
                target.items = {}
            target = target.items
        if not isinstance(target, dict):
            raise ValueError(f"{type(target).__name__} takes no items")
        for i in range(0, len(pairs), 2):
            target[as_key(pairs[i])] = pairs[i + 1]

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Inert):
            return  # a list class we know by name only: its items are not weights
        if not isinstance(target, list):
            raise ValueError(f"{type(target).__name__} takes no elements")
        target.extend(values)

    def add(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, set):
            raise ValueError(f"{type(target).__name__} takes no members")
        target.update(as_key(value) for value in values)

    def dictionary(self) -> None:
        pairs = self.to_mark()
        self.made({})
        self.set_items(pairs)

    def instance(self, cls: Any, args: list[Any]) -> None:
        self.made(call(cls, tuple(args), self.where))


def _integer(machine: _Machine) -> None:
    text = machine.line()
    machine.push({"00": False, "01": True}[text] if text in ("00", "01") else int(text[:200].rstrip("L")))


def _long(machine: _Machine, size: int) -> None:
    if size > _MAX_INTEGER_BYTES:
        raise ValueError(f"an integer of {size} bytes")
    machine.push(int.from_bytes(machine.take(size), "little", signed=True))


def _text(kind: str) -> Callable[[_Machine], None]:
    return lambda m: m.push(str(m.take(m.number(kind)), "utf-8", "surrogatepass"))


def _bytes(kind: str) -> Callable[[_Machine], None]:
    return lambda m: m.push(bytes(m.take(m.number(kind))))


def _latin(kind: str) -> Callable[[_Machine], None]:
    return lambda m: m.push(str(m.take(m.number(kind)), "latin-1"))


def _quoted(machine: _Machine) -> None:
    text = machine.line()
    if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0]:
        raise ValueError("text has no quotes")
    machine.push(text[1:-1])


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def make(machine: _Machine) -> None:
        values = [machine.pop() for _ in range(count)]
        machine.made(tuple(reversed(values)))

    return make


def _protocol(machine: _Machine) -> None:
    version = machine.number("B")
    if version > 5:
        raise ValueError(f"protocol {version} is not known")


def _frame(machine: _Machine) -> None:
    machine.take(8)  # only a hint for reading ahead


def _stack_global(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.name(module, name)


def _pop_mark(machine: _Machine) -> None:
    machine.to_mark()


def _drop(machine: _Machine) -> None:
    machine.stack.pop()


def _set_item(machine: _Machine) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _append_one(machine: _Machine) -> None:
    machine.append([machine.pop()])


def _object(machine: _Machine) -> None:
    cls, *args = machine.to_mark()
    machine.instance(cls, args)


def _instance(machine: _Machine) -> None:
    name = known(machine.line(), machine.line(), machine.where)
    machine.instance(name, machine.to_mark())


_INSTRUCTIONS: Final[Mapping[int, Callable[[_Machine], None]]] = {
    0x80: _protocol,
    0x95: _frame,
    ord("("): lambda m: m.push(_MARK),
    ord("0"): _drop,
    ord("1"): _pop_mark,
    ord("2"): lambda m: m.push(m.stack[-1]),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("I"): _integer,
    ord("L"): _integer,
    ord("J"): lambda m: m.push(m.number("<i")),
    ord("K"): lambda m: m.push(m.number("B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    0x8A: lambda m: _long(m, m.number("B")),
    0x8B: lambda m: _long(m, m.number("<I")),
    ord("F"): lambda m: m.push(float(m.line())),
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    ord("S"): _quoted,
    ord("V"): lambda m: m.push(m.line()),
    ord("T"): _latin("<I"),
    ord("U"): _latin("B"),
    ord("X"): _text("<I"),
    0x8C: _text("B"),
    0x8D: _text("<Q"),
    ord("B"): _bytes("<I"),
    ord("C"): _bytes("B"),
    0x8E: _bytes("<Q"),
    0x96: _bytes("<Q"),
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.made(tuple(m.to_mark())),
    0x85: _tuple_of(1),
    0x86: _tuple_of(2),
    0x87: _tuple_of(3),
    ord("]"): lambda m: m.made([]),
    ord("l"): lambda m: m.made(m.to_mark()),
    ord("a"): _append_one,
    ord("e"): lambda m: m.append(m.to_mark()),
    ord("}"): lambda m: m.made({}),
    ord("d"): lambda m: m.dictionary(),
    ord("s"): _set_item,
    ord("u"): lambda m: m.set_items(m.to_mark()),
    0x8F: lambda m: m.made(set(), 4),
    0x90: lambda m: m.add(m.to_mark()),
    0x91: lambda m: m.made({as_key(value) for value in m.to_mark()}, 4),
    ord("p"): lambda m: m.put(int(m.line()[:20])),
    ord("q"): lambda m: m.put(m.number("B")),
    ord("r"): lambda m: m.put(m.number("<I")),
    0x94: lambda m: m.put(len(m.memo)),
    ord("g"): lambda m: m.push(m.memo[int(m.line()[:20])]),
    ord("h"): lambda m: m.push(m.memo[m.number("B")]),
    ord("j"): lambda m: m.push(m.memo[m.number("<I")]),
    ord("c"): lambda m: m.name(m.line(), m.line()),
    0x93: _stack_global,
    ord("R"): lambda m: m.reduce(),
    0x81: lambda m: m.new_object(keywords=False),
    0x92: lambda m: m.new_object(keywords=True),
    ord("b"): lambda m: m.build(),
    ord("i"): _instance,
    ord("o"): _object,
    ord("Q"): lambda m: m.made(storage(m.pop())),
}
