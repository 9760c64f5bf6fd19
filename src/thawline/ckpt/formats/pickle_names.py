"""What a pickle of a checkpoint may name, and the plain value that each name builds: a fixed list, and nothing runs.

Torch, DeepSpeed, Lightning and torch.distributed.checkpoint spell tensors as calls of a few functions, and their own
classes by name. A tensor becomes a `TensorRef` into a `StorageRef`, an ordered dict a dict, a class that is known by
name only an `Inert`. Any other name is refused with what it wanted; nothing is ever imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from thawline.errors import CheckpointError

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


def as_key(value: Any, depth: int = 0) -> Any:
    """A value that may be a key: hashing it must be cheap and must not recurse deeply."""
    if isinstance(value, str | bytes | int | float | None | Inert | Name):
        return value
    if isinstance(value, tuple) and depth < _MAX_KEY_DEPTH and len(value) <= 64:
        for item in value:
            as_key(item, depth + 1)
        return value
    raise ValueError(f"{type(value).__name__} cannot be a key")


def known(module: str, name: str, where: str) -> Name:
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


def call(function: Any, args: tuple[Any, ...], where: str) -> Any:
    """What the call of a name on the list builds. Raises ValueError if it is no call that checkpoints make."""
    if not isinstance(function, Name):
        raise ValueError(f"{type(function).__name__} is not a function")
    builder = _CALLS.get(str(function))
    if builder is not None:
        return builder(args, where)
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
    _refuse_lazy(args[6:7], where)
    return _tensor(args)


def _rebuild_tensor_v3(args: tuple[Any, ...], where: str) -> TensorRef:
    _refuse_lazy(args[7:8], where)
    return _tensor(args, _dtype(args[6]))


def _refuse_lazy(remarks: tuple[Any, ...], where: str) -> None:
    """Torch conjugates and negates lazily: the bytes saved are those from before, with a remark behind the tensor."""
    for remark in remarks:
        pending = [str(key) for key, value in remark.items() if value] if isinstance(remark, dict) else []
        if pending:
            raise CheckpointError(
                f"holds a tensor whose values are not its bytes: they are still to be changed ({', '.join(pending)})",
                where=where,
                fix="save what tensor.resolve_conj().resolve_neg() gives",
            )


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
    return call(args[0], args[2], where)


def _mapping(args: tuple[Any, ...], where: str) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for arg in args:
        if isinstance(arg, dict):
            found.update(arg)
        elif isinstance(arg, list):
            for pair in arg:
                if not isinstance(pair, tuple | list) or len(pair) != 2:
                    raise ValueError("a mapping is not made of pairs")
                found[as_key(pair[0])] = pair[1]
        elif not isinstance(arg, Name):  # defaultdict's factory
            raise ValueError("a mapping is not made of pairs")
    return found


def _size(args: tuple[Any, ...], where: str) -> tuple[int, ...]:
    return _sizes(args[0]) if args else ()


def _members(args: tuple[Any, ...], where: str) -> set[Any]:
    return {as_key(value) for value in args[0]} if args else set()


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


def storage(value: Any) -> StorageRef:
    """A reference to data outside the pickle: ("storage", class, key, device, count[, view]). ValueError if none."""
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
    return StorageRef(key, STORAGES[cls.name], count, view)


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
