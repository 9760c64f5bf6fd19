"""A model as plain data: which tensors it has, in which modules, and of what kind each module is.

An index is made from a live model (`thawline.freeze.inspect.index_of`) or from the names, shapes and dtypes in a
checkpoint's header (`ModelIndex.from_header`). This module never imports torch, so a plan can be checked against a
file before any model is built. It says what there is; which of it a pattern names is said in `core.select`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Kind = Literal["norm", "bias", "embedding", "lora", "linear"]
KINDS: tuple[Kind, ...] = ("norm", "bias", "embedding", "lora", "linear")

NORM_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})
"""Names of the buffers in which BatchNorm and InstanceNorm keep statistics."""

# Wrappers that put a segment of their own into every name; it is not part of what people call the parameter.
_WRAPPER_SEGMENTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_MARKS = ("base_layer", "base_model", "modules_to_save", "original_module", *sorted(_WRAPPER_SEGMENTS))
_BUFFER_LIKE = NORM_STATISTICS | {"inv_freq", "pe", "position_ids", "token_type_ids"}
_NORM_CLASS = re.compile(r"(?<![a-z])(?:[A-Z0-9]\w*)?Norm(?:alization)?(?:Act)?(?:\d[dD])?$")
_NORM_BASES = frozenset({"_NormBase", "_BatchNorm", "_InstanceNorm", "LayerNorm", "GroupNorm", "RMSNorm"})
_NORM_SEGMENT = re.compile(r"(^|_)(norm|norms|ln|bn|layernorm|batchnorm|groupnorm|layer_norm|rms)(\d*|_.*)$")
_EMBEDDING_SEGMENT = re.compile(r"(^|_)(embed|embedding|embeddings|wte|wpe|tok_embeddings|shared)(_|$)|embed")
_BIAS = re.compile(r"(^|_)bias($|_)")
_FLOATING = ("F", "BF", "C")


class Described(Protocol):
    """What a header says about one tensor."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamInfo:
    """One named parameter or buffer.

    name:         fully qualified, as `Module.named_parameters()` spells it
    shape:        elements per dimension, outermost first
    dtype:        spelling of the safetensors format, e.g. "F32"
    persistent:   False for a buffer that no state dict holds
    module_class: class name of the module that owns it, "" where only a header is known
    tied_to:      first name of the same tensor, where this is a later one
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    is_buffer: bool = False
    persistent: bool = True
    module_class: str = ""
    tied_to: str | None = None

    @property
    def numel(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count

    @property
    def nbytes(self) -> int:
        return (self.numel * bits_of(self.dtype) + 7) // 8

    @property
    def is_floating(self) -> bool:
        """Whether gradient descent can move it (integer and boolean tensors have no gradient)."""
        return self.dtype.startswith(_FLOATING)


def bits_of(dtype: str) -> int:
    """Bits of one element of a safetensors dtype: 32 for "F32", 8 for "BOOL" and "F8_E4M3".

    >>> bits_of("BF16"), bits_of("I64"), bits_of("F8_E4M3")
    (16, 64, 8)
    """
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8


class Node:
    """A place in the tree of names: a module with children, or a tensor (`tensor` is its number, else -1).

    Places are numbered parents first; those below a place are numbered `order + 1` to `end - 1`, and their tensors
    stand together in the tree's list, from `first` to `last - 1`.
    """

    __slots__ = ("children", "classes", "end", "first", "last", "order", "path", "tensor")

    def __init__(self, path: str) -> None:
        self.path = path
        self.children: dict[str, Node] = {}
        self.classes: tuple[str, ...] = ()
        self.tensor = -1
        self.order = self.end = self.first = self.last = 0

    @property
    def holds_tensors(self) -> bool:
        return self.last > self.first

    def layers(self) -> int:
        """Length of the layer list that this module is: 1 + its highest numbered child, 0 if it has none."""
        return 1 + max((int(k) for k in self.children if k.isdecimal()), default=-1)


class Tree:
    """The names of one model as a tree, with the look-ups that selectors need."""

    def __init__(self, root: Node, places: dict[str, Node]) -> None:
        self.root = root
        self.places = places
        self.nodes: list[Node] = []
        self.tensors: list[int] = []
        self.by_last: dict[str, list[Node]] = {}
        self._number(root, "")

    def _number(self, node: Node, name: str) -> None:
        node.order, node.first = len(self.nodes), len(self.tensors)
        self.nodes.append(node)
        self.by_last.setdefault(name, []).append(node)
        if node.tensor >= 0:
            self.tensors.append(node.tensor)
        for key, child in node.children.items():
            self._number(child, key)
        node.end, node.last = len(self.nodes), len(self.tensors)

    def below(self, node: Node) -> list[Node]:
        """The place itself and everything below it, parents first."""
        return self.nodes[node.order : node.end]

    def numbers(self, node: Node) -> list[int]:
        """Numbers of all tensors at or below `node`."""
        return self.tensors[node.first : node.last]


def original_name(name: str) -> str:
    """What a tensor or module was called before LoRA, DDP, FSDP or `torch.compile` wrapped it.

    >>> original_name("base_model.model.decoder.0.q_proj.base_layer.weight")
    'decoder.0.q_proj.weight'
    >>> original_name("head.modules_to_save.default.weight")
    'head.weight'
    """
    if "." not in name and name not in _WRAPPER_SEGMENTS:
        return name
    parts = name.split(".")
    if parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    kept: list[str] = []
    skip = False
    for part in parts:
        if skip:
            skip = False
        elif part == "modules_to_save":
            skip = True  # the adapter's name follows
        elif part != "base_layer" and part not in _WRAPPER_SEGMENTS:
            kept.append(part)
    return ".".join(kept)


def is_adapter(name: str) -> bool:
    """Whether the tensor is a LoRA adapter's (peft's names: lora_A, lora_B, lora_embedding_A, ...)."""
    return ".lora_" in name or name.startswith("lora_")


class ModelIndex:
    """Every parameter, buffer and module of one model, by name and in model order.

    params:  parameters; a tied tensor is listed under each of its names, later ones with `tied_to`
    buffers: buffers, also those that no state dict holds
    modules: class names of each module along its method resolution order, by path ("" is the model itself)
    source:  "model", or "header" where classes are unknown and kinds are inferred from names and shapes
    """

    def __init__(
        self,
        params: Iterable[ParamInfo],
        buffers: Iterable[ParamInfo] = (),
        modules: Mapping[str, tuple[str, ...]] | None = None,
        *,
        source: Literal["model", "header"] = "model",
    ) -> None:
        self.params = tuple(params)
        self.buffers = tuple(buffers)
        self.modules: Mapping[str, tuple[str, ...]] = dict(modules or {})
        self.source = source
        self.tensors = self.params + self.buffers
        self.numbers = {info.name: i for i, info in enumerate(self.tensors)}
        self._tree: Tree | None = None
        self._kinds: dict[str, tuple[list[Node], list[Node]]] = {}

    @classmethod
    def from_header(cls, infos: Iterable[Described]) -> ModelIndex:
        """The index of a file: names, shapes and dtypes only. What looks like a buffer is taken for one."""
        params: list[ParamInfo] = []
        buffers: list[ParamInfo] = []
        for info in infos:
            last = info.name.rpartition(".")[2]
            known = info if isinstance(info, ParamInfo) else None
            buffer = known.is_buffer if known else False
            if not buffer:
                buffer = last in _BUFFER_LIKE or not info.dtype.startswith(_FLOATING) or ".global_cmvn." in info.name
            entry = ParamInfo(
                name=info.name,
                shape=tuple(info.shape),
                dtype=info.dtype,
                is_buffer=buffer,
                persistent=known.persistent if known else True,
                module_class=known.module_class if known else "",
                tied_to=known.tied_to if known else None,
            )
            (buffers if buffer else params).append(entry)
        made_index = cls(params, buffers, source="header")
        _ = made_index.tree  # grown here, so that resolving does not wait for it
        return made_index

    def __getitem__(self, name: str) -> ParamInfo:
        return self.tensors[self.numbers[name]]

    def __contains__(self, name: object) -> bool:
        return name in self.numbers

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def tree(self) -> Tree:
        """The tree of original names (built once)."""
        if self._tree is None:
            self._tree = self._grow()
        return self._tree

    def place(self, path: str) -> Node | None:
        """The module or tensor called `path`, under its original or its present name; None if there is none."""
        return self.tree.places.get(path)

    def of_kind(self, kind: str) -> tuple[list[Node], list[Node]]:
        """The places of a kind (one of KINDS, or a class name), and those of which it cannot be told."""
        if kind not in self._kinds:
            sure: list[Node] = []
            unsure: list[Node] = []
            for node in self._candidates(kind):
                told = self.has_kind(node, kind)
                if told or told is None:
                    (sure if told else unsure).append(node)
            self._kinds[kind] = sure, unsure
        return self._kinds[kind]

    def _candidates(self, kind: str) -> list[Node]:
        tree = self.tree
        if kind == "bias":
            nodes = [n for last, ns in tree.by_last.items() if _BIAS.search(last) for n in ns]
            return sorted(nodes, key=lambda n: n.order)
        if kind == "lora":
            return [n for n in tree.nodes if n.tensor >= 0]
        return [n for n in tree.nodes if n.tensor < 0]

    def aliases(self) -> dict[str, tuple[str, ...]]:
        """First name of every tied parameter -> all its names, the first one first."""
        groups: dict[str, list[str]] = {}
        for info in self.params:
            if info.tied_to is not None:
                groups.setdefault(info.tied_to, [info.tied_to]).append(info.name)
        return {first: tuple(names) for first, names in groups.items()}

    def has_kind(self, node: Node, kind: str) -> bool | None:
        """Whether the module or tensor at `node` is of `kind` (a Kind or a class name); None: cannot be told."""
        if kind == "lora":
            return node.tensor >= 0 and is_adapter(self.tensors[node.tensor].name)
        if kind == "bias":
            return self._is_bias(node)
        if node.tensor >= 0:
            return False
        if kind == "norm":
            return self._is_norm(node)
        if kind == "embedding":
            return self._is_embedding(node)
        if kind == "linear":
            return self._is_linear(node)
        if node.classes or self.source == "model":
            return kind in node.classes
        return None if node.children else False

    def classes(self) -> tuple[str, ...]:
        """Every class name that occurs as a module's own class."""
        return tuple(sorted({mro[0] for mro in self.modules.values() if mro}))

    def _grow(self) -> Tree:
        root = Node("")
        places = {"": root}
        prefix = "module." if self.tensors and all(i.name.startswith("module.") for i in self.tensors) else ""
        every = "\n".join(self.numbers) + "\n".join(self.modules)
        renamed = bool(prefix) or any(mark in every for mark in _MARKS)

        def plant(name: str) -> Node:
            path = name
            if renamed:
                spelled = name.removeprefix(prefix)
                if ".original_module" in spelled:
                    # peft keeps the replaced module beside its trained copy; only its full name means it.
                    return places.setdefault(spelled, Node(spelled))
                path = original_name(spelled)
            node = places.get(path)
            if node is None:
                head, _, last = path.rpartition(".")
                parent = root if not head else places.get(head) or plant(head)
                node = places[path] = Node(path)
                parent.children[last] = node
            if renamed:
                places.setdefault(name, node)
            return node

        for path, mro in self.modules.items():
            node = root if path in ("", "module") else plant(path)
            node.classes = node.classes + mro if node.classes else mro
        for number, info in enumerate(self.tensors):
            plant(info.name).tensor = number
        return Tree(root, places)

    def _direct(self, node: Node) -> dict[str, ParamInfo]:
        return {k: self.tensors[c.tensor] for k, c in node.children.items() if c.tensor >= 0}

    def _is_bias(self, node: Node) -> bool:
        if node.tensor < 0:
            return False
        info = self.tensors[node.tensor]
        last = info.name.rpartition(".")[2]
        return not info.is_buffer and len(info.shape) == 1 and _BIAS.search(last) is not None

    def _is_norm(self, node: Node) -> bool | None:
        direct = self._direct(node)
        if any(c.tensor < 0 and c.holds_tensors for c in node.children.values()):
            return False  # a container such as PreNorm, not a norm itself
        if node.classes:
            return _is_norm_class(node.classes)
        if not direct:
            return False
        if "running_mean" in direct:
            return True
        weight = direct.get("weight")
        if weight is None or len(weight.shape) != 1 or not set(direct) <= {"weight", "bias"}:
            return False
        return True if _NORM_SEGMENT.search(node.path.rpartition(".")[2].lower()) else None

    def _is_embedding(self, node: Node) -> bool | None:
        if node.classes:
            return not {"Embedding", "EmbeddingBag"}.isdisjoint(node.classes)
        direct = self._direct(node)
        weight = direct.get("weight")
        if weight is None or len(weight.shape) != 2 or "bias" in direct:
            return False
        names = node.path.lower().split(".")[-2:]
        named = _EMBEDDING_SEGMENT.search(names[-1]) or (names[-1].isdecimal() and "embed" in names[0])
        return True if named else None

    def _is_linear(self, node: Node) -> bool | None:
        if node.classes:
            return not {"Linear", "LazyLinear", "Conv1D"}.isdisjoint(node.classes)
        direct = self._direct(node)
        weight = direct.get("weight")
        if weight is None or len(weight.shape) != 2:
            return False
        if "bias" in direct:
            return True
        return False if self._is_embedding(node) else None


def _is_norm_class(mro: Sequence[str]) -> bool:
    if not _NORM_BASES.isdisjoint(mro):
        return True
    own = mro[0]
    return not own.startswith("_") and _NORM_CLASS.search(own) is not None
