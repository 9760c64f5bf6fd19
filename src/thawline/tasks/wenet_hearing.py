"""Recordings through a WeNet model: in one piece or in windows, and when each word was said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from thawline.data.features import frames_per_second
from thawline.data.speech import SpeechSample, collate
from thawline.errors import DataError
from thawline.models.decode.align import ctc_align
from thawline.models.decode.hypothesis import Hypothesis
from thawline.tasks.speech_decoding import default_mode, settings_of
from thawline.tasks.speech_windows import LONGEST_S, quiet_windows
from thawline.tasks.transcript import Timed, Transcript, words_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from thawline.tasks.recognition import Recognizer

_TOGETHER = 8  # pieces decoded in one batch


@dataclass(frozen=True, slots=True)
class _Part:
    """A piece of a recording, decoded. begins_s: of each token, and words with their times; empty where not asked for,
    else in seconds from the begin of the recording."""

    hypothesis: Hypothesis
    begins_s: tuple[float, ...] = ()
    words: tuple[Timed, ...] = ()


def hear_wenet(
    recognizer: Recognizer, recordings: Sequence[tuple[str, NDArray[np.float32]]], *, times: bool
) -> list[Transcript]:
    """(name, samples (n,) at the model's rate) -> what was said; more than LONGEST_S in windows cut at quiet places."""
    model: Any = recognizer.model
    rate = recognizer.frontend.rate_hz
    pieces: list[tuple[int, float, SpeechSample]] = []  # recording, its begin in seconds, features
    for number, (name, samples) in enumerate(recordings):
        ranges = quiet_windows(samples, rate) if len(samples) > LONGEST_S * rate else [(0, len(samples))]
        for begin, end in ranges:
            feats = recognizer.frontend.features_of(samples[begin:end], None)
            heard_at_all = model.config.encoder_frames(len(feats)) > 0
            if not heard_at_all and len(ranges) == 1:
                what = f"{len(samples)} samples at {rate} Hz are less than one frame of the encoder"
                raise DataError(what, where=name, fix="leave it out, or take the whole recording")
            if heard_at_all:
                pieces.append((number, begin / rate, SpeechSample(name, feats, (), "")))
    heard: list[list[_Part]] = [[] for _ in recordings]
    for at in range(0, len(pieces), _TOGETHER):
        group = pieces[at : at + _TOGETHER]
        batch = collate([sample for _, _, sample in group])
        parts = _decode(recognizer, batch.feats, batch.feats_lengths, [start_s for _, start_s, _ in group], times=times)
        for (number, _, _), part in zip(group, parts, strict=True):
            heard[number].append(part)
    return [
        _joined(recognizer, name, len(samples) / rate, parts)
        for (name, samples), parts in zip(recordings, heard, strict=True)
    ]


def _decode(
    recognizer: Recognizer, feats: torch.Tensor, lengths: torch.Tensor, starts_s: Sequence[float], *, times: bool
) -> list[_Part]:
    """A batch of pieces that start at `starts_s` in their recordings."""
    model: Any = recognizer.model
    options, tokenizer = recognizer.options, recognizer.tokenizer
    found: list[Hypothesis] = model.decode(
        feats, lengths, **settings_of(model, options, tokenizer, [options.language or "en"] * len(lengths))
    )
    if not times:
        return [_Part(h) for h in found]
    shift_s = 1.0 / frames_per_second(recognizer.frontend.rate_hz, recognizer.frontend.feature_conf)
    parts: list[_Part] = []
    frames = _begins(recognizer, feats, lengths, found)
    for h, begins, length, start_s in zip(found, frames, lengths.tolist(), starts_s, strict=True):
        begins_s = tuple(start_s + frame * model.config.encoder.subsampling_rate * shift_s for frame in begins)
        words = words_of(tokenizer, h.tokens, begins_s, start_s + length * shift_s, h.tokens_confidence or ())
        parts.append(_Part(h, begins_s, tuple(words)))
    return parts


def _begins(
    recognizer: Recognizer, feats: torch.Tensor, lengths: torch.Tensor, found: Sequence[Hypothesis]
) -> list[tuple[int, ...]]:
    """The encoder frame at which each token begins: CTC's own, or where CTC would best have said the text."""
    if all(h.times is not None for h in found):
        return [h.times or () for h in found]
    model: Any = recognizer.model
    if default_mode(model) != "ctc_greedy_search":
        raise DataError("this model has no CTC head that was trained, so there are no times to give")
    options = recognizer.options
    out, frames = model.encode(feats, lengths, chunk_size=options.chunk_size, left_chunks=options.left_chunks)
    begins: list[tuple[int, ...]] = []
    for h, row, n in zip(found, model.ctc_log_probs(out), frames.tolist(), strict=True):
        try:
            begins.append(ctc_align(row[:n], h.tokens, blank=model.config.blank))
        except DataError:  # a text of more tokens than frames, as attention may loop
            begins.append(tuple(min(i, n - 1) for i in range(len(h.tokens))))
    return begins


def _joined(recognizer: Recognizer, name: str, seconds: float, parts: Sequence[_Part]) -> Transcript:
    tokenizer = recognizer.tokenizer
    texts = [tokenizer.decode(part.hypothesis.tokens).strip() for part in parts]
    notes: tuple[str, ...] = ()
    nbest: tuple[tuple[str, float], ...] = ()
    if len(parts) > 1:
        notes = (
            f"decoded in {len(parts)} windows cut at quiet places: attention over all of it would need more memory",
        )
    elif parts:
        best = parts[0].hypothesis
        nbest = tuple(
            (tokenizer.decode(tokens).strip(), score)
            for tokens, score in zip(best.nbest, best.nbest_scores, strict=True)
        )
    return Transcript(
        file=name,
        text=" ".join(text for text in texts if text),
        tokens=tuple(t for part in parts for t in part.hypothesis.tokens),
        token_times_s=tuple(t for part in parts for t in part.begins_s),
        seconds=seconds,
        score=sum(part.hypothesis.score for part in parts),
        words=tuple(word for part in parts for word in part.words),
        windows=max(len(parts), 1),
        nbest=nbest,
        notes=notes,
    )
