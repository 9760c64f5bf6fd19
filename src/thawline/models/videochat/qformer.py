"""VideoChat2's Q-Former: BERT with query vectors that attend to the frames, and words beside them or alone.

Names of modules and tensors are those of `video_chat2/models/blip2/Qformer.py` (BLIP-2's, Li et al. 2023), so that its
checkpoints load as they are. What upstream deletes after building (`cls`, and without text input the words' embeddings
and feed-forward) is not built here; stage 1, which needs `cls`, adds it (`alignment`). transformers'
InstructBlipVideoQFormerModel computes the same numbers under two renamings; the tests hold the two against each other.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from thawline.models.videochat.config import QFormerConfig
from thawline.models.videochat.vit import DropPath

MASKED = -10000.0
"""Added to the score of a padded token. Not minus infinity: upstream's value, which its weights were trained with."""
INIT_STD = 0.02


class Embeddings(nn.Module):
    """Queries, then words with their positions; both through one LayerNorm."""

    position_ids: Tensor

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.positions = config.positions
        self.word_embeddings = self.position_embeddings = None
        if config.text_input:
            self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
            self.position_embeddings = nn.Embedding(config.max_positions, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        # A constant, but every upstream checkpoint holds it.
        self.register_buffer("position_ids", torch.arange(config.max_positions)[None])

    def forward(self, queries: Tensor | None, text_ids: Tensor | None, text_mask: Tensor | None) -> Tensor:
        x = queries
        if text_ids is not None:
            assert self.word_embeddings is not None
            assert self.position_embeddings is not None
            if self.positions == "own" and text_mask is not None:
                places = (text_mask.long().cumsum(1) - 1).clamp(min=0)
            else:
                places = self.position_ids[:, : text_ids.shape[1]]
            words: Tensor = self.word_embeddings(text_ids) + self.position_embeddings(places)
            x = words if queries is None else torch.cat((queries, words), dim=1)
        return self.dropout(self.LayerNorm(x))  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """`attention.self`: projections and scaled dot products. `source_width` differs where frames are attended to."""

    def __init__(self, config: QFormerConfig, source_width: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(source_width, config.hidden_size)
        self.value = nn.Linear(source_width, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_dropout)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (self._split(t) for t in (self.query(x), self.key(source), self.value(source)))
        rate = self.dropout.p if self.training else 0.0
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate)
        return out.transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)  # (B, heads, tokens, width // heads)


class Output(nn.Module):
    """Projection, dropout, stochastic depth, residual, LayerNorm (BERT's order)."""

    def __init__(self, config: QFormerConfig, source_width: int, drop_path: float) -> None:
        super().__init__()
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.dense = nn.Linear(source_width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.drop_path(self.dropout(self.dense(x))) + residual)  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self, config: QFormerConfig, source_width: int, drop_path: float) -> None:
        super().__init__()
        self.self = SelfAttention(config, source_width)
        self.output = Output(config, config.hidden_size, drop_path)

    def forward(self, x: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        return self.output(self.self(x, source, mask), x)  # type: ignore[no-any-return]


class Intermediate(nn.Module):
    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.intermediate_act_fn = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Self attention over queries and words; the queries then see the frames; each kind has its own feed-forward.

    With `n_queries` 0 there are words alone, and no frames. `before` are vectors that are attended to and not changed.
    """

    crossattention: Attention | None
    intermediate: Intermediate | None
    output: Output | None

    def __init__(self, config: QFormerConfig, number: int, vision_width: int, drop_path: float) -> None:
        super().__init__()
        self.attention = Attention(config, config.hidden_size, drop_path)
        crosses = number % config.cross_attention_every == 0
        self.crossattention = Attention(config, vision_width, drop_path) if crosses else None
        inner = config.intermediate_size
        self.intermediate = Intermediate(config) if config.text_input else None
        self.output = Output(config, inner, drop_path) if config.text_input else None
        self.intermediate_query = Intermediate(config)
        self.output_query = Output(config, inner, drop_path)

    def forward(
        self, x: Tensor, mask: Tensor | None, vision: Tensor | None, n_queries: int, before: Tensor | None = None
    ) -> Tensor:
        x = self.attention(x, x if before is None else torch.cat((before, x), dim=1), mask)
        queries, words = x[:, :n_queries], x[:, n_queries:]
        if not n_queries:
            return self._words(words)
        if self.crossattention is not None:
            assert vision is not None
            queries = self.crossattention(queries, vision, None)
        queries = self.output_query(self.intermediate_query(queries), queries)
        if not words.shape[1]:
            return cast(Tensor, queries)
        return torch.cat((queries, self._words(words)), dim=1)

    def _words(self, words: Tensor) -> Tensor:
        assert self.intermediate is not None
        assert self.output is not None
        return cast(Tensor, self.output(self.intermediate(words), words))


class Layers(nn.Module):
    """`bert.encoder`."""

    def __init__(self, config: QFormerConfig, vision_width: int) -> None:
        super().__init__()
        rates = torch.linspace(0, config.drop_path_rate, config.layers, device="cpu").tolist()
        self.layer = nn.ModuleList(Layer(config, i, vision_width, rates[i]) for i in range(config.layers))


class Bert(nn.Module):
    """`qformer.bert`."""

    def __init__(self, config: QFormerConfig, vision_width: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Layers(config, vision_width)

    def forward(self, queries: Tensor, vision: Tensor, text_ids: Tensor | None, text_mask: Tensor | None) -> Tensor:
        x = self.embeddings(queries, text_ids, text_mask)
        mask = None
        if text_mask is not None:
            seen = functional.pad(text_mask, (queries.shape[1], 0), value=1)
            mask = additive(seen[:, None, None, :], x.dtype)  # (B, 1, 1, queries + words)
        for layer in self.encoder.layer:
            x = layer(x, mask, vision, queries.shape[1])
        return cast(Tensor, x)


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores: 0 where `seen` is 1, and `MASKED` where it is 0."""
    return (1.0 - seen.to(dtype)) * MASKED


class QFormer(nn.Module):
    """`qformer`: (B, Q, H) queries and (B, N, W) frame vectors -> (B, Q + words, H), queries first.

    text_ids, text_mask: (B, words) int64, or None without text input. Rows of padded words mean nothing.
    """

    def __init__(self, config: QFormerConfig, vision_width: int) -> None:
        super().__init__()
        self.config = config
        self.bert = Bert(config, vision_width)
        self.apply(initialise)

    def forward(
        self, queries: Tensor, vision: Tensor, text_ids: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Tensor:
        return self.bert(queries, vision, text_ids, text_mask)  # type: ignore[no-any-return]


def initialise(module: nn.Module) -> None:
    """BERT's initial values: normal weights, biases of zero."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
