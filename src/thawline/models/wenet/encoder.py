"""WeNet's Conformer and Transformer encoders: whole utterances, chunk masks, and true streaming with caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from thawline.models.recompute import recomputed
from thawline.models.wenet.attention import (
    KeyValue,
    MultiHeadedAttention,
    RelPositionMultiHeadedAttention,
)
from thawline.models.wenet.cmvn import CmvnStatistics, GlobalCMVN
from thawline.models.wenet.config import EncoderConfig
from thawline.models.wenet.convolution import ConvolutionModule
from thawline.models.wenet.embedding import PositionalEncoding, positional_encoding
from thawline.models.wenet.feed_forward import PositionwiseFeedForward
from thawline.models.wenet.masks import encoder_mask, valid_mask
from thawline.models.wenet.subsampling import subsampling


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerState:
    """What one layer remembers between chunks."""

    attention: KeyValue
    convolution: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamState:
    """What the encoder remembers between chunks; the first chunk has none.

    offset: encoder frames given out so far
    """

    offset: int
    layers: tuple[LayerState, ...]


def _attention(config: EncoderConfig) -> MultiHeadedAttention:
    cls = RelPositionMultiHeadedAttention if config.selfattention_layer_type == "rel_selfattn" else MultiHeadedAttention
    return cls(
        config.attention_heads,
        config.output_size,
        config.attention_dropout_rate,
        query_bias=config.query_bias,
        key_bias=config.key_bias,
        value_bias=config.value_bias,
    )


def _feed_forward(config: EncoderConfig) -> PositionwiseFeedForward:
    return PositionwiseFeedForward(config.output_size, config.linear_units, config.dropout_rate, config.activation_type)


class TransformerEncoderLayer(nn.Module):
    """Self-attention and feed-forward, each with its residual and norm."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.self_attn = _attention(config)
        self.feed_forward = _feed_forward(config)
        self.norm1 = nn.LayerNorm(config.output_size, eps=config.norm_eps)
        self.norm2 = nn.LayerNorm(config.output_size, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.normalize_before = config.normalize_before

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        pos: Tensor,
        valid: Tensor | None,
        state: LayerState | None = None,
    ) -> tuple[Tensor, LayerState]:
        """x (B, T, size) -> (the same shape, what to remember)."""
        before = self.normalize_before
        attended, kept = self.self_attn(self.norm1(x) if before else x, mask, pos, state.attention if state else None)
        x = x + self.dropout(attended)
        x = x if before else self.norm1(x)
        x = x + self.dropout(self.feed_forward(self.norm2(x) if before else x))
        x = x if before else self.norm2(x)
        return x, LayerState(attention=kept, convolution=None)


class ConformerEncoderLayer(nn.Module):
    """Half feed-forward, self-attention, convolution, half feed-forward (macaron and convolution may be absent)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size, eps = config.output_size, config.norm_eps
        self.self_attn = _attention(config)
        self.feed_forward = _feed_forward(config)
        self.feed_forward_macaron = _feed_forward(config) if config.macaron_style else None
        self.conv_module = ConvolutionModule(config) if config.use_cnn_module else None
        self.norm_ff = nn.LayerNorm(size, eps=eps)
        self.norm_mha = nn.LayerNorm(size, eps=eps)
        if self.feed_forward_macaron is not None:
            self.norm_ff_macaron = nn.LayerNorm(size, eps=eps)
        self.ff_scale = 0.5 if config.macaron_style else 1.0
        if self.conv_module is not None:
            self.norm_conv = nn.LayerNorm(size, eps=eps)
            self.norm_final = nn.LayerNorm(size, eps=eps)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.normalize_before = config.normalize_before

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        pos: Tensor,
        valid: Tensor | None,
        state: LayerState | None = None,
    ) -> tuple[Tensor, LayerState]:
        """x (B, T, size), mask (B, 1 or T, T2), valid (B, 1, T) -> (x of the same shape, what to remember)."""
        before = self.normalize_before
        if self.feed_forward_macaron is not None:
            half = self.feed_forward_macaron(self.norm_ff_macaron(x) if before else x)
            x = x + self.ff_scale * self.dropout(half)
            x = x if before else self.norm_ff_macaron(x)
        attended, kept = self.self_attn(
            self.norm_mha(x) if before else x, mask, pos, state.attention if state else None
        )
        x = x + self.dropout(attended)
        x = x if before else self.norm_mha(x)
        history: Tensor | None = None
        if self.conv_module is not None:
            convolved, history = self.conv_module(
                self.norm_conv(x) if before else x, valid, state.convolution if state else None
            )
            x = x + self.dropout(convolved)
            x = x if before else self.norm_conv(x)
        x = x + self.ff_scale * self.dropout(self.feed_forward(self.norm_ff(x) if before else x))
        x = x if before else self.norm_ff(x)
        if self.conv_module is not None:
            x = self.norm_final(x)
        return x, LayerState(attention=kept, convolution=history)


class BaseEncoder(nn.Module):
    """CMVN, subsampling, layers, final norm. The two subclasses differ in the kind of layer."""

    layer: type[nn.Module]

    def __init__(self, config: EncoderConfig, cmvn: CmvnStatistics | None, *, has_cmvn: bool) -> None:
        super().__init__()
        self.config = config
        self.global_cmvn = GlobalCMVN(config.input_size, cmvn) if has_cmvn else None
        self.embed = subsampling(
            config.input_layer,
            config.input_size,
            config.output_size,
            config.dropout_rate,
            positional_encoding(config.pos_enc_layer_type, config.output_size, config.positional_dropout_rate),
        )
        self.after_norm = nn.LayerNorm(config.output_size, eps=config.norm_eps)
        self.encoders = nn.ModuleList([self.layer(config) for _ in range(config.num_blocks)])
        self.gradient_checkpointing = config.gradient_checkpointing

    def recompute_(self) -> None:
        """Recompute the activations of every layer in the backward pass."""
        self.gradient_checkpointing = True

    def forward(
        self, feats: Tensor, lengths: Tensor, *, chunk_size: int = -1, left_chunks: int = -1
    ) -> tuple[Tensor, Tensor]:
        """feats (B, T, bins), lengths (B,) -> (out (B, T', size), valid (B, 1, T')).

        chunk_size: -1 full context, 0 a random chunk (training), else encoder frames per chunk. Rows past a length are
        not zero and mean nothing.
        """
        config = self.config
        valid = valid_mask(lengths, feats.size(1)).unsqueeze(1)
        if self.global_cmvn is not None:
            feats = self.global_cmvn(feats)
        x, pos, valid = self.embed(feats, valid)
        mask = encoder_mask(
            valid,
            chunk_size=chunk_size,
            left_chunks=left_chunks,
            static_chunk=config.static_chunk_size,
            dynamic=config.use_dynamic_chunk,
            draw_left=config.use_dynamic_left_chunk,
            max_chunk=100 // config.subsampling_rate,  # one second
        )
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in self.encoders:
            x, _ = (recomputed(layer) if recompute else layer)(x, mask, pos, valid)
        return self._finish(x), valid

    def forward_chunk(
        self, feats: Tensor, state: StreamState | None, *, keep_frames: int
    ) -> tuple[Tensor, StreamState]:
        """One chunk of a stream: feats (B, window, bins) -> (out (B, chunk, size), the state for the next chunk).

        The window overlaps the next one by what the subsampling needs (see `streaming.py`). keep_frames: encoder frames
        of history that the next chunk may see; negative: all.
        """
        if self.global_cmvn is not None:
            feats = self.global_cmvn(feats)
        offset = state.offset if state else 0
        everything = torch.ones(feats.size(0), 1, feats.size(1), dtype=torch.bool, device=feats.device)
        x, _, _ = self.embed(feats, everything, offset)
        past = state.layers[0].attention[0].size(2) if state else 0
        table = cast("PositionalEncoding", self.embed.pos_enc)
        pos = table.rows(offset - past, past + x.size(1)).to(x)
        layers: list[LayerState] = []
        for i, layer in enumerate(self.encoders):
            x, kept = layer(x, None, pos, None, state.layers[i] if state else None)
            layers.append(kept if keep_frames < 0 else _truncated(kept, keep_frames))
        next_state = StreamState(offset=offset + x.size(1), layers=tuple(layers))
        return self._finish(x), next_state

    def _finish(self, x: Tensor) -> Tensor:
        if self.config.normalize_before and self.config.final_norm:
            x = self.after_norm(x)
        return x


def _truncated(state: LayerState, keep_frames: int) -> LayerState:
    key, value = state.attention
    start = max(key.size(2) - keep_frames, 0)
    return LayerState(attention=(key[:, :, start:], value[:, :, start:]), convolution=state.convolution)


class TransformerEncoder(BaseEncoder):
    """`encoder: transformer`."""

    layer = TransformerEncoderLayer


class ConformerEncoder(BaseEncoder):
    """`encoder: conformer`."""

    layer = ConformerEncoderLayer
