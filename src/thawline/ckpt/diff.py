"""What differs between two sets of named tensors, and by how much: bits first, then figures.

Equality is of bits: two NaNs with the same bits are the same, 0.0 and -0.0 are not. Tensors are read one pair at a time
and compared piece by piece, so mappings that read lazily from files may be larger than memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from thawline.ckpt.naming import shown
from thawline.core.digest import DTYPES

Status = Literal["same", "changed", "added", "removed"]

_PIECE = 1 << 20  # elements compared at a time: 8 MB in float64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDiff:
    """One tensor in both sets.

    shapes, dtypes: in the first and the second; empty where it is not (dtypes in the safetensors spelling)
    elements:       how many it has (in the second; in the first if it was removed)
    differing:      elements whose bits differ; all of them if shape or element type does
    max_abs:        largest absolute difference among finite elements; None if the shapes differ or none is finite
    norm:           2-norm of the difference of the finite elements, and of the first, in float64
    not_finite:     differing elements that are NaN or infinite in either
    """

    name: str
    status: Status
    shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    dtypes: tuple[str, str] = ("", "")
    elements: int = 0
    differing: int = 0
    max_abs: float | None = None
    norm: tuple[float, float] | None = None
    not_finite: int = 0

    @property
    def relative(self) -> float | None:
        """Norm of the difference over the norm of the first; None where that has no meaning."""
        return None if self.norm is None else _ratio(*self.norm)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Tensors of one part of the model (a layer) taken together; figures as in TensorDiff."""

    name: str
    tensors: int
    changed: int
    added: int
    removed: int
    elements: int
    differing: int
    max_abs: float | None
    relative: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Diff:
    """The comparison of two sets of tensors, ordered as the first, then what only the second has."""

    first: str
    second: str
    tensors: tuple[TensorDiff, ...]

    def names(self, status: Status) -> tuple[str, ...]:
        """Names of the tensors with this status."""
        return tuple(t.name for t in self.tensors if t.status == status)

    @property
    def is_same(self) -> bool:
        """Whether names, shapes, element types and all bits are equal."""
        return all(t.status == "same" for t in self.tensors)

    def blocks(self) -> tuple[Block, ...]:
        """The tensors by block, in order of appearance."""
        grouped: dict[str, list[TensorDiff]] = {}
        for tensor in self.tensors:
            grouped.setdefault(block_of(tensor.name), []).append(tensor)
        return tuple(_block(name, members) for name, members in grouped.items())

    def table(self) -> str:
        """A line per block and a summary, for people."""
        rows = [("block", "tensors", "changed", "elements", "max abs", "relative")]
        for block in self.blocks():
            words = [f"{block.changed}"] if block.changed or not (block.added or block.removed) else []
            words += [
                f"{count} {word}" for count, word in ((block.added, "added"), (block.removed, "removed")) if count
            ]
            rows.append(
                (
                    shown(block.name),
                    f"{block.tensors}",
                    ", ".join(words),
                    _share(block.differing, block.elements),
                    _figure(block.max_abs),
                    _figure(block.relative),
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One line: how many tensors are the same, changed, added, removed."""
        counts = ", ".join(f"{len(self.names(s))} {s}" for s in ("same", "changed", "added", "removed"))
        verdict = "bitwise equal" if self.is_same else "different"
        return f"{self.first} and {self.second} are {verdict}: {counts}"

    def to_json(self) -> dict[str, object]:
        """A plain value; what has no finite number is null."""
        return {
            "first": self.first,
            "second": self.second,
            "same": self.is_same,
            "counts": {s: len(self.names(s)) for s in ("same", "changed", "added", "removed")},
            "blocks": [asdict(block) for block in self.blocks()],
            "tensors": [
                {key: value for key, value in asdict(t).items() if key != "norm"} | {"relative": t.relative}
                for t in self.tensors
                if t.status != "same"
            ],
        }


def diff(a: Mapping[str, Tensor], b: Mapping[str, Tensor], *, first: str = "A", second: str = "B") -> Diff:
    """Compare two sets of tensors, on the CPU. `first` and `second` are what the report calls them."""
    return Diff(first=first, second=second, tensors=tuple(_compare_all(a, b)))


def block_of(name: str) -> str:
    """The part of the model a tensor is counted with: the path up to the first layer number, else its module.

    >>> block_of("encoder.encoders.3.self_attn.linear_q.weight"), block_of("ctc.ctc_lo.bias")
    ('encoder.encoders.3', 'ctc.ctc_lo')
    """
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1]) or name


def _compare_all(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Iterator[TensorDiff]:
    ours, theirs = set(a), set(b)  # asking a lazy mapping whether it has a name may read the tensor
    for name in a:
        if name in theirs:
            yield _compare(name, a[name].detach(), b[name].detach())
        else:
            yield _alone(name, a[name], "removed")
    for name in b:
        if name not in ours:
            yield _alone(name, b[name], "added")


def _alone(name: str, tensor: Tensor, status: Status) -> TensorDiff:
    shape, dtype = tuple(tensor.shape), _spelling(tensor)
    return TensorDiff(
        name=name,
        status=status,
        shapes=((), shape) if status == "added" else (shape, ()),
        dtypes=("", dtype) if status == "added" else (dtype, ""),
        elements=tensor.numel(),
        differing=tensor.numel(),
    )


def _compare(name: str, one: Tensor, other: Tensor) -> TensorDiff:
    shapes = (tuple(one.shape), tuple(other.shape))
    dtypes = (_spelling(one), _spelling(other))
    if shapes[0] != shapes[1]:
        count = other.numel()
        return TensorDiff(name=name, status="changed", shapes=shapes, dtypes=dtypes, elements=count, differing=count)
    differing = not_finite = 0
    largest: float | None = None
    squares = [0.0, 0.0]
    retyped = one.dtype != other.dtype
    for x, y in zip(_flat(one), _flat(other), strict=True):
        unequal = torch.ones(len(x), dtype=torch.bool) if retyped else _bits(x) != _bits(y)
        differing += int(unequal.sum())
        x64, y64 = _wide(x), _wide(y)
        gap = (y64 - x64).abs()
        finite = torch.isfinite(gap)
        not_finite += int((unequal & ~finite).sum())
        squares[0] += float(gap[finite].square().sum())
        squares[1] += float(x64[finite].abs().square().sum())
        if bool((finite & unequal).any()):
            largest = max(largest or 0.0, float(gap[finite].max()))
    changed = bool(differing) or retyped
    return TensorDiff(
        name=name,
        status="changed" if changed else "same",
        shapes=shapes,
        dtypes=dtypes,
        elements=other.numel(),
        differing=differing,
        max_abs=largest,
        norm=(math.sqrt(squares[0]), math.sqrt(squares[1])) if changed else None,
        not_finite=not_finite,
    )


def _flat(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.to("cpu").contiguous().reshape(-1)
    for start in range(0, flat.numel(), _PIECE):
        yield flat[start : start + _PIECE]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_INTEGERS[tensor.element_size()])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _spelling(tensor: Tensor) -> str:
    word = str(tensor.dtype).removeprefix("torch.")
    return DTYPES.get(word, word)


def _block(name: str, members: Sequence[TensorDiff]) -> Block:
    figures = [t.max_abs for t in members if t.max_abs is not None]
    norms = [t.norm for t in members if t.norm is not None]
    return Block(
        name=name,
        tensors=len(members),
        changed=sum(t.status == "changed" for t in members),
        added=sum(t.status == "added" for t in members),
        removed=sum(t.status == "removed" for t in members),
        elements=sum(t.elements for t in members),
        differing=sum(t.differing for t in members),
        max_abs=max(figures, default=None),
        relative=_ratio(math.hypot(*(n[0] for n in norms)), math.hypot(*(n[1] for n in norms))) if norms else None,
    )


def _ratio(difference: float, reference: float) -> float | None:
    return difference / reference if reference else None


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if part else "0"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
