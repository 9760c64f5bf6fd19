"""Features in as they come, encoder frames out, with caches: the numbers of chunk-masked encoding, computed once."""

from __future__ import annotations

import torch
from torch import Tensor

from thawline.errors import RecipeError
from thawline.models.wenet.config import EncoderConfig
from thawline.models.wenet.encoder import BaseEncoder, StreamState


class EncoderStream:
    """One stream (or several in step): feed features, get what can be computed by now.

    Windows overlap by what the subsampling needs, as in WeNet (encoder.py, forward_chunk_by_chunk): a chunk of C
    encoder frames takes (C - 1) * rate + right_context + 1 input frames.
    """

    def __init__(self, encoder: BaseEncoder, *, chunk_size: int, left_chunks: int = -1) -> None:
        """Raises RecipeError where streaming would not give what the model was trained for."""
        check_streaming(encoder.config, chunk_size)
        self.encoder = encoder
        self.keep_frames = chunk_size * left_chunks if left_chunks >= 0 else -1
        self.context = encoder.embed.right_context + 1
        self.stride = encoder.embed.rate * chunk_size
        self.window = (chunk_size - 1) * encoder.embed.rate + self.context
        self.state: StreamState | None = None
        self.waiting: Tensor | None = None

    @torch.no_grad()
    def feed(self, feats: Tensor) -> Tensor:
        """feats (B, n, bins), n of any size -> (B, m, size), m a multiple of the chunk size, often 0."""
        waiting = feats if self.waiting is None else torch.cat([self.waiting, feats], dim=1)
        out: list[Tensor] = []
        while waiting.size(1) >= self.window:
            out.append(self._chunk(waiting[:, : self.window]))
            waiting = waiting[:, self.stride :]
        self.waiting = waiting
        return self._joined(out, feats)

    @torch.no_grad()
    def finish(self) -> Tensor:
        """The last, shorter chunk -> (B, m, size); the stream is over."""
        rest, self.waiting = self.waiting, None
        if rest is None:
            raise RecipeError("the stream has had no features", fix="feed it before finishing it")
        return self._joined([self._chunk(rest)] if rest.size(1) >= self.context else [], rest)

    def _chunk(self, window: Tensor) -> Tensor:
        out, self.state = self.encoder.forward_chunk(window, self.state, keep_frames=self.keep_frames)
        return out

    def _joined(self, parts: list[Tensor], like: Tensor) -> Tensor:
        if parts:
            return torch.cat(parts, dim=1)
        return like.new_zeros(like.size(0), 0, self.encoder.config.output_size)


def check_streaming(config: EncoderConfig, chunk_size: int) -> None:
    """Raises RecipeError where this encoder cannot stream with chunks of this size."""
    check_chunks(config, chunk_size)
    if chunk_size < 1:
        raise RecipeError(f"streaming needs a chunk size, not {chunk_size}", where="chunk_size", fix="16 is usual")
    if config.kind == "conformer" and config.use_cnn_module and not config.causal:
        raise RecipeError(
            "this encoder's convolutions look ahead; computed chunk by chunk they would give other numbers",
            where="encoder_conf.causal",
            fix="use a model trained with causal: true, or decode whole utterances",
        )
    if config.input_layer == "conv1d2":
        raise RecipeError(
            "Whisper's padded convolutions cannot be computed chunk by chunk",
            where="encoder_conf.input_layer",
            fix="decode whole windows",
        )


def check_chunks(config: EncoderConfig, chunk_size: int) -> None:
    """Raises RecipeError where bounded context would be ignored or was never trained (WeNet ignores it silently)."""
    if chunk_size <= 0:
        return
    if not config.has_chunks:
        raise RecipeError(
            f"a chunk size of {chunk_size} was asked for, but this model knows full context only",
            where="chunk_size",
            fix="leave it out, or use a model trained with use_dynamic_chunk or static_chunk_size",
        )
    if not config.use_dynamic_chunk and chunk_size != config.static_chunk_size:
        raise RecipeError(
            f"a chunk size of {chunk_size} was asked for, but this model knows {config.static_chunk_size} only",
            where="chunk_size",
            fix=f"use {config.static_chunk_size}",
        )
