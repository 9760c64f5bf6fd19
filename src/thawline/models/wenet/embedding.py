"""Positional encodings. The tables are called `pe` and lie in the checkpoint, as in WeNet."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from thawline.errors import DataError


def sinusoids(start: int, stop: int, size: int) -> Tensor:
    """Rows start..stop of sin/cos interleaved (Vaswani et al. 2017, 3.5) -> (stop - start, size) float32."""
    table = torch.zeros(stop - start, size)
    position = torch.arange(start, stop, dtype=torch.float32).unsqueeze(1)
    rate = torch.exp(torch.arange(0, size, 2, dtype=torch.float32) * -(math.log(10000.0) / size))
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate)[:, : size // 2]
    return table


class PositionalEncoding(nn.Module):
    """x * sqrt(size) + pe (WeNet's `abs_pos`, and `embed` for tokens)."""

    pe: Tensor

    def __init__(self, size: int, dropout_rate: float, rows: int = 5000) -> None:
        super().__init__()
        self.size = size
        self.scale = math.sqrt(size)
        self.dropout = nn.Dropout(dropout_rate)
        self.register_buffer("pe", sinusoids(0, rows, size).unsqueeze(0))  # (1, rows, size)

    def rows(self, start: int, count: int) -> Tensor:
        """Encodings of positions start..start+count -> (1, count, size).

        Positions past the stored table (200 s at four frames of 10 ms) are computed by the same formula.
        """
        stored = self.pe.size(1)
        if start + count <= stored:
            return self.pe[:, start : start + count]
        more = sinusoids(max(start, stored), start + count, self.size).to(self.pe)
        return torch.cat([self.pe[:, start:], more.unsqueeze(0)], dim=1)

    def forward(self, x: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """x (B, T, size) -> (encoded x, the encodings (1, T, size) for relative attention)."""
        pos = self.rows(offset, x.size(1))
        return self.dropout(x * self.scale + pos), pos


class RelPositionalEncoding(PositionalEncoding):
    """x * sqrt(size); the encodings go to attention (WeNet's `rel_pos`)."""

    def forward(self, x: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        return self.dropout(x * self.scale), self.dropout(self.rows(offset, x.size(1)))


class WhisperPositionalEncoding(PositionalEncoding):
    """Whisper's encoder table: sines then cosines, 1500 rows, no scaling (WeNet's `abs_pos_whisper`)."""

    def __init__(self, size: int, dropout_rate: float, rows: int = 1500) -> None:
        super().__init__(size, dropout_rate, rows)
        self.scale = 1.0
        step = math.log(10000) / (size // 2 - 1)
        rate = torch.exp(-step * torch.arange(size // 2))
        angle = torch.arange(rows).unsqueeze(1) * rate.unsqueeze(0)
        self.pe = torch.cat([torch.sin(angle), torch.cos(angle)], dim=1).unsqueeze(0)

    def rows(self, start: int, count: int) -> Tensor:
        if start + count > self.pe.size(1):
            raise DataError(
                f"{start + count} encoder frames, but Whisper's positions end at {self.pe.size(1)}",
                fix="cut the audio into windows of at most 30 s",
            )
        return self.pe[:, start : start + count]


class LearnablePositionalEncoding(PositionalEncoding):
    """Whisper's decoder table, a parameter of 448 rows, no scaling (WeNet's `embed_learnable_pe`)."""

    def __init__(self, size: int, dropout_rate: float, rows: int = 448) -> None:
        super().__init__(size, dropout_rate, 1)
        self.scale = 1.0
        del self.pe
        self.pe = nn.Parameter(torch.empty(1, rows, size).normal_(std=0.01))

    def rows(self, start: int, count: int) -> Tensor:
        if start + count > self.pe.size(1):
            raise DataError(
                f"{start + count} positions, but the learned table has {self.pe.size(1)}",
                fix="shorten the text (token_max_length) or cut the audio",
            )
        return self.pe[:, start : start + count]


class NoPositionalEncoding(nn.Module):
    """x as it is (WeNet's `no_pos`)."""

    def __init__(self, size: int, dropout_rate: float) -> None:
        super().__init__()
        self.size = size
        self.dropout = nn.Dropout(dropout_rate)

    def rows(self, start: int, count: int) -> Tensor:
        return torch.zeros(1, count, self.size)

    def forward(self, x: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        return self.dropout(x), torch.zeros(1, x.size(1), self.size, dtype=x.dtype, device=x.device)


def positional_encoding(kind: str, size: int, dropout_rate: float) -> nn.Module:
    """The module that WeNet's name `kind` stands for."""
    classes: dict[str, type[nn.Module]] = {
        "embed": PositionalEncoding,
        "abs_pos": PositionalEncoding,
        "rel_pos": RelPositionalEncoding,
        "no_pos": NoPositionalEncoding,
        "abs_pos_whisper": WhisperPositionalEncoding,
        "embed_learnable_pe": LearnablePositionalEncoding,
    }
    return classes[kind](size, dropout_rate)
