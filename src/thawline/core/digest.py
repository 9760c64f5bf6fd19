"""Fingerprints: which bytes a tensor holds, and which tensors a model holds.

A tensor's digest is BLAKE3 over its dtype, its shape and its bytes (little endian, row major, as safetensors stores
them). A model's fingerprint is BLAKE3 over the sorted lines `name digest`. Neither depends on device, strides, file
format or order. Torch is imported only by `digest_tensor`, so files can be fingerprinted without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from blake3 import blake3

if TYPE_CHECKING:
    from torch import Tensor

Buffer = bytes | bytearray | memoryview

_PARALLEL_BYTES = 1 << 20  # below this, one core is faster than waking the others

DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "complex64": "C64",
}  # fmt: skip
"""Names of element types: torch's spelling -> the spelling of the safetensors format, which is used in every file."""


def digest_bytes(dtype: str, shape: Sequence[int], data: Buffer, *, parallel: bool = True) -> str:
    """Digest of one tensor given as bytes: 64 hexadecimal digits.

    parallel: let all cores work on it, where it is large; False for callers that hash several tensors at once

    dtype: the safetensors spelling, e.g. "F32"; shape: elements per dimension; data: row major, little endian.
    """
    header = f"{dtype}[{','.join(map(str, shape))}]".encode()
    threads = blake3.AUTO if parallel and len(data) >= _PARALLEL_BYTES else 1
    return str(blake3(header + b"\0", max_threads=threads).update(data).hexdigest())


def digest_tensor(tensor: Tensor) -> str:
    """Digest of a torch tensor; equals `digest_bytes` of what safetensors would write for it."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    raw: Buffer = flat.view(torch.uint8).numpy().data if flat.numel() else b""
    return digest_bytes(DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), raw)


def fingerprint(digests: Mapping[str, str]) -> str:
    """Fingerprint of a whole model from the digests of its tensors by name: 64 hexadecimal digits."""
    lines = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return str(blake3(lines.encode()).hexdigest())
