"""Changing the element type of tensor bytes: F32, F64, F16 and BF16 into one another, with numpy.

Widening is exact. Narrowing rounds to nearest, ties to even, as torch does; NaN stays NaN with its sign. BF16, which
numpy lacks, is done on the bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from thawline.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Buffer = bytes | bytearray | memoryview

FLOATING: Final = ("F64", "F32", "F16", "BF16")
"""The element types that can be given as one another."""

_NUMPY: Final = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def can_cast(source: str, target: str) -> bool:
    """Whether values of element type `source` can be given as `target`."""
    return source == target or (source in FLOATING and target in FLOATING)


def is_exact(source: str, target: str) -> bool:
    """Whether every value survives: BF16 and F16 hold different values, neither contains the other."""
    wider = {"F16": ("F32", "F64"), "BF16": ("F32", "F64"), "F32": ("F64",)}
    return source == target or target in wider.get(source, ())


def cast(data: Buffer, source: str, target: str) -> memoryview:
    """The same values in element type `target`. Bytes in, bytes out; the input is not changed."""
    if source == target:
        return memoryview(data)
    if not can_cast(source, target):
        raise CheckpointError(f"{source} cannot be written as {target}", fix="leave tensors of integers as they are")
    import numpy as np

    if source == "BF16":
        single = _widen_bf16(np.frombuffer(data, dtype="<u2"))
    else:
        single = np.frombuffer(data, dtype=_NUMPY[source])
    if target == "BF16":
        # F64 goes through F32, as in torch: two roundings, which differ from one in the rarest of cases.
        with np.errstate(over="ignore", invalid="ignore"):
            out: NDArray[Any] = _narrow_bf16(single.astype("<f4", copy=False))
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            out = single.astype(_NUMPY[target], copy=False)
    return np.ascontiguousarray(out).view(np.uint8).data if out.size else memoryview(b"")


def overflowed(before: Buffer, source: str, after: Buffer, target: str) -> int:
    """How many finite values became infinite in `cast`."""
    import numpy as np

    return int(np.count_nonzero(_infinite(after, target) & ~_infinite(before, source)))


def _infinite(data: Buffer, dtype: str) -> NDArray[Any]:
    import numpy as np

    if dtype == "BF16":
        bits: NDArray[Any] = np.frombuffer(data, dtype="<u2")
        return np.asarray((bits & 0x7FFF) == 0x7F80)
    values: NDArray[Any] = np.frombuffer(data, dtype=_NUMPY[dtype])
    return np.asarray(np.isinf(values))


def _widen_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    import numpy as np

    # One pass: the upper half of every 32-bit word is the value, the lower half stays zero.
    wide = np.zeros((len(bits), 2), dtype="<u2")
    wide[:, 1] = bits
    return wide.view("<f4").reshape(-1)


def _narrow_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view("<u4")
    # Adding just under half of the last kept place, and one more if it is odd, carries exactly when rounding goes up.
    rounded: NDArray[np.uint16] = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if nan.any():
        # A NaN whose payload lies in the dropped half would become infinite: keep its sign, make it quiet.
        rounded[nan] = ((bits[nan] >> 16) | 0x0040).astype("<u2")
    return rounded
