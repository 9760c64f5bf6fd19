"""Multi-head attention, through torch's scaled_dot_product_attention, with WeNet's parameter names.

Masks are boolean, True where a key may be seen. A query that may see nothing gets zeros before the output projection,
as in WeNet. Relative attention has no rel_shift: WeNet scores position j by its own encoding, not by the distance.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeyValue = tuple[Tensor, Tensor]
"""Keys and values, each (batch, heads, positions, size of a head)."""


class MultiHeadedAttention(nn.Module):
    """Self-attention with absolute positions (WeNet's `selfattn`)."""

    def __init__(
        self,
        heads: int,
        size: int,
        dropout_rate: float,
        *,
        query_bias: bool = True,
        key_bias: bool = True,
        value_bias: bool = True,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_size = size // heads
        self.linear_q = nn.Linear(size, size, bias=query_bias)
        self.linear_k = nn.Linear(size, size, bias=key_bias)
        self.linear_v = nn.Linear(size, size, bias=value_bias)
        self.linear_out = nn.Linear(size, size, bias=query_bias)
        self.dropout = nn.Dropout(dropout_rate)

    def split(self, x: Tensor) -> Tensor:
        """(B, T, size) -> (B, heads, T, size of a head)."""
        return x.view(*x.shape[:2], self.heads, self.head_size).transpose(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Heads (B, h, T, d) and mask (B, 1 or T, T2) -> (B, T, size), projected."""
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if mask is None else mask.unsqueeze(1),
            dropout_p=self.dropout.p if self.training else 0.0,
            scale=1.0 / math.sqrt(self.head_size),
        )
        out: Tensor = self.linear_out(context[..., : self.head_size].transpose(1, 2).flatten(2))
        return out

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        pos: Tensor | None = None,
        past: KeyValue | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """x (B, T, size) -> (the same shape, the keys and values including `past`)."""
        key, value = _extend(past, self.split(self.linear_k(x)), self.split(self.linear_v(x)))
        return self.attend(self.split(self.linear_q(x)), key, value, mask), (key, value)


class RelPositionMultiHeadedAttention(MultiHeadedAttention):
    """Self-attention whose scores also see the keys' positions (Dai et al. 2019, 3.3, without rel_shift)."""

    def __init__(
        self,
        heads: int,
        size: int,
        dropout_rate: float,
        *,
        query_bias: bool = True,
        key_bias: bool = True,
        value_bias: bool = True,
    ) -> None:
        super().__init__(
            heads,
            size,
            dropout_rate,
            query_bias=query_bias,
            key_bias=key_bias,
            value_bias=value_bias,
        )
        self.linear_pos = nn.Linear(size, size, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(heads, self.head_size))
        self.pos_bias_v = nn.Parameter(torch.empty(heads, self.head_size))
        nn.init.xavier_uniform_(self.pos_bias_u)
        nn.init.xavier_uniform_(self.pos_bias_v)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        pos: Tensor | None = None,
        past: KeyValue | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """pos: encodings of all keys, past ones included, (1, T2, size)."""
        assert pos is not None, "relative attention is called with positions"
        key, value = _extend(past, self.split(self.linear_k(x)), self.split(self.linear_v(x)))
        where = self.split(self.linear_pos(pos)).to(key.dtype).expand(key.size(0), -1, -1, -1)
        query = self.split(self.linear_q(x))
        # (q + u) k + (q + v) p is one inner product of twice the width: no (T, T) matrix of biases is ever built.
        wide_query = torch.cat([query + self.pos_bias_u.unsqueeze(1), query + self.pos_bias_v.unsqueeze(1)], dim=-1)
        wide_key = torch.cat([key, where], dim=-1)
        wide_value = value
        dropping = self.training and self.dropout.p > 0
        if value.device.type == "cpu" and not dropping:
            # The fused kernel wants equal widths: 1.6 times faster with these zeros (8 x 4 heads, 250 frames).
            wide_value = F.pad(value, (0, self.head_size))
        return self.attend(wide_query.to(value.dtype), wide_key, wide_value, mask), (key, value)


class MultiHeadedCrossAttention(MultiHeadedAttention):
    """Attention of tokens over encoder frames (WeNet's `crossattn`)."""

    def memory(self, encoder_out: Tensor) -> KeyValue:
        """Keys and values of (B, T', size), to be used for every token and every hypothesis."""
        return self.split(self.linear_k(encoder_out)), self.split(self.linear_v(encoder_out))

    def read(self, x: Tensor, memory: KeyValue, mask: Tensor | None) -> Tensor:
        """x (B * n, L, size) over memory of B utterances; mask (B, 1, T') -> (B * n, L, size).

        Several hypotheses of one utterance are consecutive in x; its memory is not repeated for them.
        """
        batch = memory[0].size(0)
        rows, length, size = x.shape
        query = self.split(self.linear_q(x.reshape(batch, -1, size)))
        return self.attend(query, *memory, mask).reshape(rows, length, size)


def _extend(past: KeyValue | None, key: Tensor, value: Tensor) -> KeyValue:
    if past is None:
        return key, value
    return torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
