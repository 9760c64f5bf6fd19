"""What may be said of decoding and scoring speech: the `options` of a recipe, and of evaluate, transcribe and serve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from thawline.core.config import Document, Strict, bind
from thawline.tasks.scoring import Normalizer

Mode = Literal["", "ctc_greedy_search", "ctc_prefix_beam_search", "attention", "attention_rescoring", "whisper"]


class SpeechOptions(Strict):
    """`options` of a speech recipe, and of `evaluate`, `transcribe` and `serve`."""

    language: str = ""
    """What a multilingual model is prompted with, e.g. en or zh; auto lets the model decide. Empty takes each row's own
    `lang`, else English."""
    task: Literal["transcribe", "translate"] = "transcribe"
    """What a Whisper does: write what it hears, or translate it into English."""
    prompt: str = ""
    """Whisper: words that came before, e.g. names and their spelling."""
    fallback: bool = False
    """Whisper: decode again by drawing at temperatures from 0.2 to 1.0 what repeats itself or is improbable, and leave
    out what is silence. Draws are keyed: the same recording gives the same text."""
    compression_ratio: float = Field(default=1.35, gt=0)
    """fallback: what zlib makes smaller than by this factor repeats itself (of token ids; transformers' measure)."""
    log_prob: float = -1.0
    """fallback: what has less than this, in ln per token, is improbable."""
    no_speech: float = Field(default=0.6, ge=0, le=1)
    """fallback: the probability from which an improbable window is silence."""
    normalizer: Normalizer = "none"
    """How texts are made comparable before scoring: none, basic or english."""
    mode: Mode = ""
    """WeNet's four, or whisper. Empty takes ctc_greedy_search where the model has CTC, else attention."""
    beam: int | None = Field(default=None, ge=1)
    """Hypotheses kept. Empty takes 10 where CTC prefixes are searched, else 1."""
    ctc_weight: float = Field(default=0.0, ge=0)
    """attention_rescoring: weight of the CTC score."""
    reverse_weight: float = Field(default=0.0, ge=0, le=1)
    """attention_rescoring: share of the right-to-left decoder, where there is one."""
    length_penalty: float = Field(default=0.0, allow_inf_nan=False)
    """attention: scores are divided by length to this power."""
    blank_penalty: float = Field(default=0.0, ge=0)
    """CTC: taken from blank's logit; more than zero gives more tokens."""
    chunk_size: int = -1
    """Encoder frames a chunk, for models trained so; -1 is full context."""
    left_chunks: int = Field(default=-1, ge=-1)
    """Chunks of history; -1 is all."""
    streaming: bool = False
    """Compute the encoder chunk by chunk with caches, as for live speech."""
    hotwords: tuple[str, ...] = ()
    """Phrases to prefer, in the modes that search CTC prefixes."""
    hotword_score: float = Field(default=3.0, gt=0)
    """Bonus in ln per token of such a phrase."""
    allow_pipes: bool = False
    """Run the shell commands that a Kaldi wav.scp names. They are as dangerous as whoever wrote the list."""
    units: str = ""
    """Train only: a units.txt to change the vocabulary to. Rows of shared tokens are kept, new ones are drawn."""
    tokenizer: str = ""
    """A folder with a Whisper's tokenizer.json, for models that come without one."""

    @classmethod
    def given(cls, values: Mapping[str, Any], *, where: str = "options") -> SpeechOptions:
        """From keywords; those that are None or empty are left out. Raises RecipeError with the nearest names."""
        chosen = {name: value for name, value in values.items() if value not in (None, "", ())}
        return bind(cls, Document({k: list(v) if isinstance(v, tuple) else v for k, v in chosen.items()}, where))
