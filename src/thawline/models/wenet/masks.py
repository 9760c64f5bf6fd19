"""Which positions may see which: padding, chunks and left context. True means "may be seen"."""

from __future__ import annotations

import torch
from torch import Tensor


def valid_mask(lengths: Tensor, size: int) -> Tensor:
    """lengths (B,) -> (B, size), True before each length."""
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)


def causal_mask(size: int, device: torch.device) -> Tensor:
    """(size, size): position i sees 0..i."""
    return torch.ones(size, size, dtype=torch.bool, device=device).tril()


def chunk_mask(size: int, chunk: int, left_chunks: int, device: torch.device) -> Tensor:
    """(size, size): a frame sees its own chunk of `chunk` frames and `left_chunks` before it (negative: all before it).

    WeNet: wenet/utils/mask.py, subsequent_chunk_mask.
    """
    index = torch.arange(size, device=device) // chunk
    distance = index.unsqueeze(1) - index.unsqueeze(0)  # chunks that the key lies before the query
    mask = distance >= 0
    return mask if left_chunks < 0 else mask & (distance <= left_chunks)


def draw_chunk(size: int, *, max_chunk: int, draw_left: bool) -> tuple[int, int]:
    """A random (chunk size, left chunks) for one training batch of `size` encoder frames.

    Drawn from torch's global generator exactly as WeNet draws it (wenet/utils/mask.py, add_optional_chunk_mask): half
    of the time full context, otherwise 1..max_chunk frames. Whoever wants the draw to be a function of the step seeds
    that generator for the step.
    """
    if size < 2:  # WeNet's own draw fails here: there is nothing to choose
        return max(size, 1), -1
    chunk = int(torch.randint(1, size, (1,)).item())
    if chunk > size // 2:
        return size, -1
    chunk = chunk % max_chunk + 1
    if not draw_left:
        return chunk, -1
    most = (size - 1) // chunk
    return chunk, int(torch.randint(0, most, (1,)).item()) if most > 0 else 0


def encoder_mask(
    valid: Tensor,
    *,
    chunk_size: int,
    left_chunks: int,
    static_chunk: int,
    dynamic: bool,
    draw_left: bool,
    max_chunk: int,
) -> Tensor:
    """Self-attention mask of the encoder: valid (B, 1, T) -> (B, 1, T), or (B, T, T) where chunks apply.

    chunk_size: 0 draws a chunk (training), negative is full context, positive is that many encoder frames.
    """
    size = valid.size(2)
    if dynamic:
        if chunk_size == 0:
            chunk_size, left_chunks = draw_chunk(size, max_chunk=max_chunk, draw_left=draw_left)
        if chunk_size < 0 or (chunk_size >= size and left_chunks < 0):
            return valid
        return valid & chunk_mask(size, chunk_size, left_chunks, valid.device)
    if static_chunk > 0:
        return valid & chunk_mask(size, static_chunk, left_chunks, valid.device)
    return valid
