"""The digest of a planned tensor, its bytes read once. Torch is not imported."""

from __future__ import annotations

from collections.abc import Iterator

from blake3 import blake3

from thawline.ckpt.formats.mapped import CHUNK_BYTES
from thawline.ckpt.formats.pieces import Linear, Planned, chunks, regions


def digest_of(tensor: Planned, chunk_bytes: int = CHUNK_BYTES) -> str:
    """Digest of a planned tensor, checksums compared. Where the file states this very digest, its comparison is it."""
    stated = None
    for region in regions(tensor):
        region.check()
        stated = region.seal
    info = tensor.info
    whole = len(tensor.parts) == 1 and isinstance(tensor.parts[0], Linear) and tensor.stored in ("", info.dtype)
    if whole and stated is not None and stated[0] == _head(info.dtype, info.shape):
        return stated[1]
    return digest(info.dtype, info.shape, chunks(tensor, chunk_bytes))


def digest(dtype: str, shape: tuple[int, ...], data: Iterator[memoryview]) -> str:
    """Digest of a tensor given a piece at a time; equals `core.digest.digest_bytes` of the whole."""
    hasher = blake3(_head(dtype, shape))
    for piece in data:
        hasher.update(piece)
    return str(hasher.hexdigest())


def _head(dtype: str, shape: tuple[int, ...]) -> bytes:
    return f"{dtype}[{','.join(map(str, shape))}]".encode() + b"\0"
