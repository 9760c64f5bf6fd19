"""Which way of decoding, and its numbers; everything checked before any computing."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from thawline.errors import RecipeError

MODES = ("ctc_greedy_search", "ctc_prefix_beam_search", "attention", "attention_rescoring")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOptions:
    """WeNet's decoding arguments, with its names shortened where they repeat themselves.

    mode:           one of MODES
    beam:           hypotheses kept
    ctc_weight:     weight of the CTC score in attention_rescoring
    reverse_weight: share of the right-to-left decoder in attention_rescoring, 0..1
    chunk_size:     encoder frames per chunk; -1: full context
    left_chunks:    chunks of history; -1: all
    streaming:      compute the encoder chunk by chunk with caches instead of with a mask (the same numbers, slower)
    length_penalty: attention: the score is divided by length ** length_penalty
    blank_penalty:  taken from blank's logit; more than zero gives more tokens
    max_tokens:     attention: at most so many tokens; None: as many as the batch has encoder frames, as in WeNet
    """

    mode: str = "ctc_greedy_search"
    beam: int = 10
    ctc_weight: float = 0.0
    reverse_weight: float = 0.0
    chunk_size: int = -1
    left_chunks: int = -1
    streaming: bool = False
    length_penalty: float = 0.0
    blank_penalty: float = 0.0
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise RecipeError(f"unknown decoding mode {self.mode!r}", where="mode", fix=near(self.mode, MODES))
        if self.beam < 1:
            raise RecipeError(f"a beam of {self.beam} keeps nothing", where="beam", fix="use 1 or more")
        if not 0.0 <= self.reverse_weight <= 1.0:
            raise RecipeError(f"{self.reverse_weight} is outside 0..1", where="reverse_weight", fix="0.3 is usual")
        if self.ctc_weight < 0.0:
            raise RecipeError(f"{self.ctc_weight} is negative", where="ctc_weight")
        if self.blank_penalty < 0.0:
            raise RecipeError(
                f"{self.blank_penalty} is negative",
                where="blank_penalty",
                fix="use 0 or more; to get fewer tokens, use a length penalty or another beam",
            )
        if self.chunk_size == 0 or self.chunk_size < -1:
            raise RecipeError(
                f"a chunk of {self.chunk_size} frames", where="chunk_size", fix="use -1 (full context) or 1 and up"
            )
        if self.streaming and self.chunk_size < 1:
            raise RecipeError("streaming needs a chunk size", where="chunk_size", fix="16 is usual")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise RecipeError(f"at most {self.max_tokens} tokens is none", where="max_tokens")

    @classmethod
    def of(cls, **values: Any) -> DecodeOptions:
        """The options from keywords. Raises RecipeError with the nearest names for an unknown one."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise RecipeError(f"unknown decoding option {name!r}", where="decode", fix=near(name, known))
        return cls(**values)


def near(word: str, known: Sequence[str]) -> str:
    """The hint of a refusal: the nearest known words, else all of them."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.4)
    return f"closest: {', '.join(close)}" if close else f"known: {', '.join(known)}"
