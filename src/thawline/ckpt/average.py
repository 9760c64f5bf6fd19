"""The mean of several checkpoints, as one more source: computed a piece at a time while it is read.

WeNet's `wenet/bin/average_model.py` adds the tensors in their own type and divides: float16 sums lose bits, and integer
buffers become floats (`num_batches_tracked` is 1234.5 in its file, and truncated when a model loads it). Here floats
are summed in float64 and rounded once; integers keep their type and get the mean truncated toward zero, which is what a
model that loads WeNet's file ends up with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from thawline.ckpt.formats.casting import FLOATING, cast
from thawline.ckpt.formats.pieces import Computed, Planned, chunks
from thawline.ckpt.formats.thawline_run import ALONE
from thawline.ckpt.source import Source
from thawline.core.index import is_adapter
from thawline.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray

ORIGIN: Final = "mean"
_PIECE: Final = 1 << 18  # bytes of one tensor at a time; in float64 it is up to four times as many
_INTEGERS: Final = {
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
}  # fmt: skip


def average(sources: Sequence[Source], *, labels: Sequence[str] = ()) -> Source:
    """Mean over the sources of each tensor, with the first one's order, ties, configuration and sidecars.

    labels: what they are called in the note about it; their own names if not given
    Raises CheckpointError, before anything is read, if there is no source, if one is no whole model, if names, shapes
    or element types differ, or if an element type has no mean; and while reading at booleans that differ.
    """
    if not sources:
        raise CheckpointError("there is nothing to average", fix="give at least one checkpoint")
    first = sources[0]
    for source in sources:
        _refuse_part(source)
    for other in sources[1:]:
        _refuse_strangers(first, other)
    names = ", ".join(labels or [source.path.name for source in sources])
    plan = replace(
        first.plan,
        format=f"mean of {len(sources)} x {first.format}",
        tensors={name: _mean(name, sources) for name in first.names},
        files=tuple(file for source in sources for file in source.plan.files),
        notes=(*first.notes, f"the mean of {names}"),
    )
    return Source(first.path, plan)


def _refuse_part(source: Source) -> None:
    if source.format == ALONE:
        raise CheckpointError(
            f"is a delta: {len(source.not_held)} tensors are in its base only",
            where=str(source.path),
            fix="give the base (--base)",
        )
    if source.format.startswith(ALONE) and any(map(is_adapter, source.names)):
        raise CheckpointError(
            "holds LoRA adapters beside the weights, and a mean of factors is not the mean of what they add",
            where=str(source.path),
            fix="average the run itself, which knows their scale",
        )


def _refuse_strangers(first: Source, other: Source) -> None:
    odd = sorted(set(first.names) ^ set(other.names))
    if odd:
        raise CheckpointError(
            f"holds other tensors than {first.path}: {', '.join(odd[:5])}{', ...' if len(odd) > 5 else ''}",
            where=str(other.path),
            fix="average checkpoints of one run and one phase of its plan",
        )
    for name in first.names:
        mine, theirs = first.info(name), other.info(name)
        if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            raise CheckpointError(
                f"{name} is {theirs.dtype} {theirs.shape} here and {mine.dtype} {mine.shape} in {first.path}",
                where=str(other.path),
                fix="average checkpoints of one run",
            )


def _mean(name: str, sources: Sequence[Source]) -> Planned:
    tensors = tuple(source.plan.tensors[name] for source in sources)
    info = tensors[0].info
    if info.dtype not in (*FLOATING, *_INTEGERS, "BOOL"):
        raise CheckpointError(f"{name} is {info.dtype}, which has no mean here", where=str(sources[0].path))
    labels = [str(source.path) for source in sources]

    def make(chunk_bytes: int) -> Iterator[memoryview]:
        size = max(min(chunk_bytes, _PIECE) // 8 * 8, 8)
        streams = [_pieces(tensor, size) for tensor in tensors]
        for pieces in zip(*streams, strict=True):
            yield _mean_of(pieces, name, info.dtype, labels)

    tied = info.tied_to if all(tensor.info.tied_to == info.tied_to for tensor in tensors) else None
    return Planned(info=replace(info, origin=ORIGIN, tied_to=tied), parts=(Computed(tensors, make),))


def _mean_of(pieces: Sequence[bytes], name: str, dtype: str, labels: Sequence[str]) -> memoryview:
    import numpy as np

    if dtype == "BOOL":
        for piece, label in zip(pieces, labels, strict=True):
            if piece != pieces[0]:
                raise CheckpointError(
                    f"{name} is true or false and differs from {labels[0]}: there is no mean",
                    where=label,
                    fix="leave it out, or take the last checkpoint as it is",
                )
        return memoryview(pieces[0])
    if dtype in FLOATING:
        total: NDArray[Any] = np.frombuffer(cast(pieces[0], dtype, "F64"), dtype="<f8").copy()
        for piece in pieces[1:]:
            total += np.frombuffer(cast(piece, dtype, "F64"), dtype="<f8")
        return cast((total / len(pieces)).data.cast("B"), "F64", dtype)
    kind = _INTEGERS[dtype]
    total = np.frombuffer(pieces[0], dtype=kind).astype("<u8" if dtype == "U64" else "<i8")
    for piece in pieces[1:]:
        total += np.frombuffer(piece, dtype=kind)
    count = total.dtype.type(len(pieces))
    mean: NDArray[Any] = (np.sign(total) * (np.abs(total) // count)).astype(kind)
    return mean.data.cast("B")


def _pieces(tensor: Planned, size: int) -> Iterator[bytes]:
    """The tensor's bytes in pieces of `size`, however its parts lie, so that several tensors go in step."""
    held = bytearray()
    for chunk in chunks(tensor, size):
        held += chunk
        while len(held) >= size:
            yield bytes(held[:size])
            del held[:size]
    if held:
        yield bytes(held)
