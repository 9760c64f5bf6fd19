"""WeNet's attention decoders: left to right, and both directions (U2++)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from thawline.models.recompute import recomputed
from thawline.models.wenet.attention import (
    KeyValue,
    MultiHeadedAttention,
    MultiHeadedCrossAttention,
)
from thawline.models.wenet.config import DecoderConfig
from thawline.models.wenet.embedding import positional_encoding
from thawline.models.wenet.feed_forward import PositionwiseFeedForward
from thawline.models.wenet.masks import causal_mask, valid_mask


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeState:
    """Step-by-step decoding: per layer, the encoder's keys and values and those of the tokens so far."""

    memory: tuple[KeyValue, ...]
    past: tuple[KeyValue, ...] | None
    length: int

    def select(self, rows: Tensor) -> DecodeState:
        """The state whose hypotheses are `rows` of this one's (the memory stays: beams do not change utterance)."""
        if self.past is None:
            return self
        past = tuple((k.index_select(0, rows), v.index_select(0, rows)) for k, v in self.past)
        return DecodeState(memory=self.memory, past=past, length=self.length)


class DecoderLayer(nn.Module):
    """Self-attention, attention over the encoder, feed-forward, each with its residual and norm."""

    def __init__(self, size: int, config: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = MultiHeadedAttention(
            config.attention_heads,
            size,
            config.self_attention_dropout_rate,
            query_bias=config.query_bias,
            key_bias=config.key_bias,
            value_bias=config.value_bias,
        )
        self.src_attn = MultiHeadedCrossAttention(
            config.attention_heads,
            size,
            config.src_attention_dropout_rate,
            query_bias=config.src_query_bias,
            key_bias=config.src_key_bias,
            value_bias=config.src_value_bias,
        )
        self.feed_forward = PositionwiseFeedForward(
            size, config.linear_units, config.dropout_rate, config.activation_type
        )
        self.norm1 = nn.LayerNorm(size, eps=config.norm_eps)
        self.norm2 = nn.LayerNorm(size, eps=config.norm_eps)
        self.norm3 = nn.LayerNorm(size, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.normalize_before = config.normalize_before

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        memory: Tensor | KeyValue,
        memory_mask: Tensor | None,
        past: KeyValue | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """x (B * n, L, size), memory (B, T', size) or its keys and values -> (x, the tokens' keys and values)."""
        before = self.normalize_before
        attended, kept = self.self_attn(self.norm1(x) if before else x, mask, None, past)
        x = x + self.dropout(attended)
        x = x if before else self.norm1(x)
        if isinstance(memory, Tensor):
            memory = self.src_attn.memory(memory)
        x = x + self.dropout(self.src_attn.read(self.norm2(x) if before else x, memory, memory_mask))
        x = x if before else self.norm2(x)
        x = x + self.dropout(self.feed_forward(self.norm3(x) if before else x))
        x = x if before else self.norm3(x)
        return x, kept


class TransformerDecoder(nn.Module):
    """Tokens and encoder frames in, logits out."""

    def __init__(self, vocabulary: int, size: int, config: DecoderConfig, blocks: int) -> None:
        super().__init__()
        embedding = nn.Embedding(vocabulary, size)
        self.embed = nn.Sequential(
            embedding,
            positional_encoding(config.input_layer, size, config.positional_dropout_rate),
        )
        self.after_norm = nn.LayerNorm(size, eps=config.norm_eps)
        self.output_layer = nn.Linear(size, vocabulary)
        self.decoders = nn.ModuleList([DecoderLayer(size, config) for _ in range(blocks)])
        self.normalize_before = config.normalize_before
        self.gradient_checkpointing = config.gradient_checkpointing
        if config.tie_word_embedding:
            self.output_layer.weight = embedding.weight
            # OpenAI's Whisper has no output bias; left random it would differ from one load to the next.
            nn.init.zeros_(self.output_layer.bias)

    def recompute_(self) -> None:
        """Recompute the activations of every layer in the backward pass."""
        self.gradient_checkpointing = True

    def forward(self, memory: Tensor, memory_mask: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Teacher forcing.

        memory (B, T', size), memory_mask (B, 1, T'), tokens (B * n, L), lengths (B * n,) -> logits (B * n, L,
        vocabulary). Hypotheses of one utterance are consecutive.
        """
        size = tokens.size(1)
        mask = valid_mask(lengths, size).unsqueeze(1) & causal_mask(size, tokens.device)
        x, _ = self.embed(tokens)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in self.decoders:
            x, _ = (recomputed(layer) if recompute else layer)(x, mask, memory, memory_mask)
        return self._logits(x)

    def start(self, memory: Tensor) -> DecodeState:
        """Prepare step-by-step decoding over memory (B, T', size)."""
        layers = cast("Iterable[DecoderLayer]", self.decoders)
        kv = tuple(layer.src_attn.memory(memory) for layer in layers)
        return DecodeState(memory=kv, past=None, length=0)

    def step(self, state: DecodeState, memory_mask: Tensor, tokens: Tensor) -> tuple[Tensor, DecodeState]:
        """tokens (B * n, L), the ones not yet seen -> (log probabilities of the next (B * n, vocabulary), state)."""
        new = tokens.size(1)
        table = self.embed[1]
        x, _ = table(self.embed[0](tokens), state.length)
        mask = None
        if new > 1:
            whole = causal_mask(state.length + new, tokens.device)
            mask = whole[state.length :].unsqueeze(0)
        past: list[KeyValue] = []
        for i, layer in enumerate(self.decoders):
            x, kept = layer(x, mask, state.memory[i], memory_mask, state.past[i] if state.past else None)
            past.append(kept)
        logp = self._logits(x[:, -1]).float().log_softmax(-1)
        return logp, DecodeState(memory=state.memory, past=tuple(past), length=state.length + new)

    def _logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self.output_layer(self.after_norm(x) if self.normalize_before else x)
        return logits


class BiTransformerDecoder(nn.Module):
    """One decoder per direction; the right one reads reversed targets."""

    def __init__(self, vocabulary: int, size: int, config: DecoderConfig) -> None:
        super().__init__()
        self.left_decoder = TransformerDecoder(vocabulary, size, config, config.num_blocks)
        self.right_decoder = TransformerDecoder(vocabulary, size, config, config.r_num_blocks)
