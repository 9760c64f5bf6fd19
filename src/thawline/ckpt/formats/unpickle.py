"""Reading pickles without running anything: a small machine for the pickle language that only builds plain data.

A pickle is a program: it names functions and calls them. This machine knows a fixed list of names; each stands for a
few lines here that build plain values (`TensorRef`, `StorageRef`, `Inert`, dict, tuple). Any other name is refused with
the name it wanted, before anything is called; nothing is ever imported. Work is bounded: every instruction is paid for
by bytes of the pickle, containers are counted, keys are simple.
Language: Lib/pickletools.py of CPython, protocols 0 to 5.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from thawline.errors import CheckpointError

MAX_BYTES: Final = 256 << 20
"""Pickles of metadata are kilobytes; those of the largest distributed checkpoints tens of megabytes."""

_MAX_CONTAINERS: Final = 12_000_000
_MAX_INTEGER_BYTES: Final = 256
_MAX_KEY_DEPTH: Final = 4


@dataclass(frozen=True, slots=True)
class Name:
    """A name of the fixed list that a pickle mentions, e.g. Name("torch", "FloatStorage")."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Inert:
    """What stands for an object of a class that is known by name only: its class, arguments and state."""

    name: Name
    args: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] | None = None

    def get(self, key: str, default: object = None) -> Any:
        """An attribute, if its state is a mapping."""
        return self.state.get(key, default) if isinstance(self.state, dict) else default


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A stretch of data that the pickle refers to.

    key: its name in the archive; dtype: safetensors spelling, or "" for untyped bytes; count: elements, or bytes if
    untyped; view: (first element, elements) if it is a view of the storage `key` (files older than torch 0.4)
    """

    key: str
    dtype: str
    count: int
    view: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor as the pickle states it; offset and strides in elements of `dtype`."""

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


STORAGES: Final[Mapping[str, str]] = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64", "UntypedStorage": "",
}  # fmt: skip
"""Torch's storage classes and the element type of each."""

TORCH_DTYPES: Final[Mapping[str, str]] = {
    "float64": "F64", "double": "F64", "float32": "F32", "float": "F32", "float16": "F16", "half": "F16",
    "bfloat16": "BF16", "int64": "I64", "long": "I64", "int32": "I32", "int": "I32", "int16": "I16", "short": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint16": "U16", "uint32": "U32", "uint64": "U64", "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
"""Torch's element types by name."""

_INERT: Final = frozenset({
    # DeepSpeed's optimizer shards
    "deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum", "deepspeed.utils.tensor_fragment.fragment_address",
    # torch.distributed.checkpoint's metadata
    *(f"torch.distributed.checkpoint.metadata.{name}" for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    "torch.distributed.checkpoint.filesystem._StorageInfo", "torch.distributed.checkpoint.filesystem._StoragePrefix",
    "torch.serialization._get_layout",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in (
        "Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    # what Lightning and others put beside the weights
    "argparse.Namespace",
    "lightning.fabric.utilities.data.AttributeDict", "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict", "lightning.pytorch.utilities.parsing.AttributeDict",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct", "numpy.dtype", "numpy.ndarray", "datetime.datetime", "datetime.date",
    "datetime.timedelta", "torch.device", "torch.Generator", "torch.strided", "torch.contiguous_format",
    "torch.preserve_format", "torch.channels_last", "torch.sparse_coo", "torch.Tensor", "torch.nn.parameter.Parameter",
    "builtins.slice", "builtins.complex", "builtins.range",
    "torch.optim.adam.Adam", "torch.optim.adamw.AdamW", "torch.optim.sgd.SGD",
})  # fmt: skip

_REFUSED_TENSORS: Final = {
    "torch._utils._rebuild_sparse_tensor": "sparse tensors",
    "torch._utils._rebuild_sparse_csr_tensor": "sparse tensors",
    "torch._utils._rebuild_qtensor": "quantised tensors",
    "torch._utils._rebuild_nested_tensor": "nested tensors",
    "torch._utils._rebuild_meta_tensor_no_storage": "tensors without data (device 'meta')",
    "torch.jit._pickle.restore_type_tag": "a TorchScript program",
}


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
        self.push(_known(module, name, self.where))

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(args, tuple):
            raise ValueError("arguments are not a tuple")
        self.made(_call(function, args, self.where))

    def new_object(self, keywords: bool) -> None:
        extra = self.pop() if keywords else {}
        args, cls = self.pop(), self.pop()
        if not isinstance(args, tuple) or not isinstance(extra, dict):
            raise ValueError("arguments are not a tuple")
        self.made(_call(cls, (*args, extra) if extra else args, self.where))

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
            target[_key(pairs[i])] = pairs[i + 1]

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
        target.update(_key(value) for value in values)

    def dictionary(self) -> None:
        pairs = self.to_mark()
        self.made({})
        self.set_items(pairs)

    def instance(self, cls: Any, args: list[Any]) -> None:
        self.made(_call(cls, tuple(args), self.where))


def _key(value: Any, depth: int = 0) -> Any:
    """A value that may be a key: hashing it must be cheap and must not recurse deeply."""
    if isinstance(value, str | bytes | int | float | None | Inert | Name):
        return value
    if isinstance(value, tuple) and depth < _MAX_KEY_DEPTH and len(value) <= 64:
        for item in value:
            _key(item, depth + 1)
        return value
    raise ValueError(f"{type(value).__name__} cannot be a key")


def _known(module: str, name: str, where: str) -> Name:
    """The name if it is on the fixed list. Raises CheckpointError naming it otherwise."""
    full = f"{module}.{name}"
    if full in _REFUSED_TENSORS:
        raise CheckpointError(
            f"holds {_REFUSED_TENSORS[full]} ({full}), which are not supported",
            where=where,
            fix="save plain dense tensors",
        )
    listed = (
        full in _CALLS
        or full in _INERT
        or (module in ("torch", "torch.storage") and name in STORAGES)
        or (module == "torch" and name in TORCH_DTYPES)
    )
    if not listed:
        raise CheckpointError(
            f"its pickle wants {full!r}, which is not on the list of what checkpoints need; nothing was run",
            where=where,
            fix="do not load this file with other tools unless you trust who made it; to convert it, save it again "
            "with tensors only",
        )
    return Name(module, name)


def _call(function: Any, args: tuple[Any, ...], where: str) -> Any:
    if not isinstance(function, Name):
        raise ValueError(f"{type(function).__name__} is not a function")
    known = _CALLS.get(str(function))
    if known is not None:
        return known(args, where)
    if str(function) in _INERT:
        return Inert(function, args)
    raise ValueError(f"{function} is not called in checkpoints")


def _dtype(value: Any) -> str:
    if isinstance(value, Name) and value.module == "torch" and value.name in TORCH_DTYPES:
        return TORCH_DTYPES[value.name]
    raise ValueError(f"{value} is not an element type")


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or len(value) > 64:
        raise ValueError("a shape is not a tuple")
    for size in value:
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 60:
            raise ValueError(f"{size!r} is not a size")
    return tuple(value)


def _tensor(args: tuple[Any, ...], dtype: str = "") -> TensorRef:
    storage, offset, shape, strides = args[0], args[1], _sizes(args[2]), _sizes(args[3])
    if not isinstance(storage, StorageRef):
        raise ValueError("a tensor has no storage")
    (offset,) = _sizes((offset,))
    if len(shape) != len(strides):
        raise ValueError(f"shape {shape} and strides {strides} differ in length")
    return TensorRef(storage, dtype or storage.dtype, offset, shape, strides)


def _rebuild_tensor(args: tuple[Any, ...], where: str) -> TensorRef:
    return _tensor(args)


def _rebuild_tensor_v3(args: tuple[Any, ...], where: str) -> TensorRef:
    return _tensor(args, _dtype(args[6]))


def _first_tensor(args: tuple[Any, ...], where: str) -> TensorRef:
    if not isinstance(args[0], TensorRef):
        raise ValueError("a parameter has no tensor")
    return args[0]


def _rebuild_from_type(args: tuple[Any, ...], where: str) -> Any:
    # (function, type, its arguments, state): the type is torch.Tensor or a subclass, the data are the same.
    if not isinstance(args[0], Name) or not str(args[0]).startswith("torch._utils._rebuild_"):
        raise ValueError(f"{args[0]} does not rebuild a tensor")
    if not isinstance(args[2], tuple):
        raise ValueError("arguments are not a tuple")
    return _call(args[0], args[2], where)


def _mapping(args: tuple[Any, ...], where: str) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for arg in args:
        if isinstance(arg, dict):
            found.update(arg)
        elif isinstance(arg, list):
            for pair in arg:
                if not isinstance(pair, tuple | list) or len(pair) != 2:
                    raise ValueError("a mapping is not made of pairs")
                found[_key(pair[0])] = pair[1]
        elif not isinstance(arg, Name):  # defaultdict's factory
            raise ValueError("a mapping is not made of pairs")
    return found


def _size(args: tuple[Any, ...], where: str) -> tuple[int, ...]:
    return _sizes(args[0]) if args else ()


def _members(args: tuple[Any, ...], where: str) -> set[Any]:
    return {_key(value) for value in args[0]} if args else set()


def _encode(args: tuple[Any, ...], where: str) -> bytes:
    # How protocol 2 spells bytes: text and the name of an encoding.
    if len(args) != 2 or not isinstance(args[0], str) or args[1] not in ("latin1", "latin-1"):
        raise ValueError("bytes are not spelt as text")
    return args[0].encode("latin1")


def _no_bytes(args: tuple[Any, ...], where: str) -> bytes:
    # How protocol 2 spells bytes of length zero.
    if args:
        raise ValueError("bytes are made from something")
    return b""


_CALLS: Final[Mapping[str, Callable[[tuple[Any, ...], str], Any]]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _first_tensor,
    "torch._utils._rebuild_parameter_with_state": _first_tensor,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": _mapping,
    "collections.Counter": _mapping,
    "builtins.dict": _mapping,
    "__builtin__.dict": _mapping,
    "builtins.list": lambda args, where: list(args[0]) if args else [],
    "builtins.set": _members,
    "__builtin__.set": _members,
    "builtins.frozenset": _members,
    "builtins.int": lambda args, where: args[0] if args and isinstance(args[0], int) else 0,
    "builtins.bytes": _no_bytes,
    "__builtin__.bytes": _no_bytes,
    "torch.Size": _size,
    "_codecs.encode": _encode,
}


def _persistent(machine: _Machine) -> None:
    """A reference to data outside the pickle: ("storage", class, key, device, count[, view])."""
    value = machine.pop()
    if not isinstance(value, tuple) or len(value) not in (5, 6) or value[0] != "storage":
        raise ValueError("a reference is not one to a storage")
    _, cls, key, _, count = value[:5]
    if not isinstance(cls, Name) or cls.name not in STORAGES or not isinstance(key, str):
        raise ValueError(f"{cls} is not a storage")
    (count,) = _sizes((count,))
    view = None
    if len(value) == 6 and value[5] is not None:
        offset, size = _sizes(tuple(value[5][1:3]))
        view = (offset, size)
    machine.made(StorageRef(key, STORAGES[cls.name], count, view))


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
    name = _known(machine.line(), machine.line(), machine.where)
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
    0x91: lambda m: m.made({_key(value) for value in m.to_mark()}, 4),
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
    ord("Q"): _persistent,
}
