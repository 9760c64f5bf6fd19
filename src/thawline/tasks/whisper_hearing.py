"""Recordings through a Whisper: short ones together, long ones and those with times along the model's time marks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from thawline.data.speech import SpeechSample, collate
from thawline.models.decode.hypothesis import Hypothesis
from thawline.models.whisper_long import decode_long
from thawline.tasks.speech_decoding import settings_of
from thawline.tasks.transcript import Timed, Transcript, spoken_words

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from thawline.tasks.recognition import Recognizer

WINDOW_S = 30.0
"""What the model hears at once."""

_UNSPACED = frozenset(("zh", "ja", "th", "lo", "my", "yue"))
"""Languages written without spaces between words, as OpenAI's tokenizer.py lists them: each character is a word."""


def hear_whisper(
    recognizer: Recognizer, recordings: Sequence[tuple[str, NDArray[np.float32]]], *, times: bool
) -> list[Transcript]:
    """(name, samples (n,) at the model's rate) -> what was said."""
    whole = [not times and len(samples) <= WINDOW_S * recognizer.frontend.rate_hz for _, samples in recordings]
    together = iter(_together(recognizer, [r for r, is_whole in zip(recordings, whole, strict=True) if is_whole]))
    return [
        next(together) if is_whole else _along_marks(recognizer, *recording, times=times)
        for recording, is_whole in zip(recordings, whole, strict=True)
    ]


def _together(recognizer: Recognizer, recordings: Sequence[tuple[str, NDArray[np.float32]]]) -> list[Transcript]:
    """One window each, without time marks."""
    if not recordings:
        return []
    model: Any = recognizer.model
    frontend, tokenizer = recognizer.frontend, recognizer.tokenizer
    batch = collate([SpeechSample(name, frontend.features_of(samples, None), (), "") for name, samples in recordings])
    prompted = _languages(recognizer, batch.feats, batch.feats_lengths)
    settings = settings_of(model, recognizer.options, tokenizer, prompted)
    found: list[Hypothesis] = model.decode(batch.feats, batch.feats_lengths, **settings)
    return [
        Transcript(
            file=name,
            text=tokenizer.decode(h.tokens).strip(),
            tokens=h.tokens,
            seconds=len(samples) / frontend.rate_hz,
            score=h.score,
            language=language,
            nbest=tuple(
                (tokenizer.decode(tokens).strip(), score) for tokens, score in zip(h.nbest, h.nbest_scores, strict=True)
            ),
        )
        for (name, samples), h, language in zip(recordings, found, prompted, strict=True)
    ]


def _along_marks(recognizer: Recognizer, name: str, samples: NDArray[np.float32], *, times: bool) -> Transcript:
    options, tokenizer = recognizer.options, recognizer.tokenizer
    seconds = len(samples) / recognizer.frontend.rate_hz
    conf = recognizer.frontend.log_mel_spectrogram_conf
    padded = conf.model_copy(update={"pad_or_trim": seconds <= WINDOW_S})
    frontend = recognizer.frontend.model_copy(update={"log_mel_spectrogram_conf": padded})
    feats = torch.from_numpy(frontend.features_of(samples, None))
    language = _languages(recognizer, feats[None], torch.tensor([len(feats)]))[0]
    settings = settings_of(recognizer.model, options, tokenizer, [language])
    found = decode_long(
        recognizer.model,
        feats,
        heard=min(len(feats), math.ceil(len(samples) / conf.hop_length)),
        beam=settings["beam"],
        language=language,
        task=options.task,
        prompt_tokens=settings["prompt_tokens"],
        length_penalty=options.length_penalty or 1.0,
        token_times=times,
        fallback=settings["fallback"],
    )
    segments = [Timed(s.start_s, min(s.end_s, seconds), tokenizer.decode(s.tokens).strip()) for s in found]
    spaced = language not in _UNSPACED
    return Transcript(
        file=name,
        text="".join(tokenizer.decode(s.tokens) for s in found).strip(),
        tokens=tuple(t for segment in found for t in segment.tokens),
        token_times_s=tuple(begin for segment in found for begin, _ in segment.spans),
        seconds=seconds,
        language=language,
        words=tuple(w for s in found if s.spans for w in spoken_words(tokenizer, s.tokens, s.spans, spaced=spaced)),
        segments=tuple(s for s in segments if s.text),
    )


def _languages(recognizer: Recognizer, feats: torch.Tensor, lengths: torch.Tensor) -> list[str]:
    """What each row is prompted with: the option's, else by the model's own judgement."""
    model: Any = recognizer.model
    if recognizer.options.language not in ("", "auto"):
        return [recognizer.options.language] * len(lengths)
    found: list[str] = model.language(feats, lengths)
    return found
