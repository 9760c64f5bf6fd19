"""Speech as it is spoken: samples in pieces of any size, the text so far after each, the final text at the end.

A model that was trained for chunks hears chunk by chunk with caches, and nothing is computed twice. Any other model is
asked anew about everything said so far whenever another second and a half has come: dearer, and it may change its mind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from thawline.core.extras import need
from thawline.data.features import FbankConf, fbank
from thawline.errors import DataError
from thawline.models.wenet.model import LiveRecogniser, U2Model
from thawline.tasks.recognition import Recognizer
from thawline.tasks.speech_decoding import context_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK_FRAMES = 16
"""Encoder frames a chunk where the options say none: 0.64 s at a subsampling of 4."""
AGAIN_S = 1.5
"""Models without chunks: how much more must have been said before they are asked again."""

_RATES_HZ = (8000, 96000)


class LiveSpeech:
    """One speaker. Raises DataError for a rate that no microphone has."""

    def __init__(self, recognizer: Recognizer, *, rate_hz: int) -> None:
        if not _RATES_HZ[0] <= rate_hz <= _RATES_HZ[1]:
            raise DataError(f"{rate_hz} Hz is no rate of a microphone", fix="8000 to 96000")
        self.recognizer = recognizer
        self.rate_hz = rate_hz
        self.seconds = 0.0
        self._resampler: Any = None
        if rate_hz != recognizer.frontend.rate_hz:
            soxr = need("soxr", extra="speech")
            self._resampler = soxr.ResampleStream(rate_hz, recognizer.frontend.rate_hz, 1, dtype="float32")
        self._ear: _Chunks | _Again = _Chunks(recognizer) if can_stream(recognizer) else _Again(recognizer)

    def feed(self, samples: NDArray[np.float32]) -> str | None:
        """samples (n,) in [-1, 1) at `rate_hz` -> all text so far, or None where there is nothing new to say."""
        self.seconds += len(samples) / self.rate_hz
        return self._ear.feed(self._resampled(samples, last=False))

    def finish(self) -> str:
        """The final text."""
        return self._ear.finish(self._resampled(np.zeros(0, np.float32), last=True))

    def _resampled(self, samples: NDArray[np.float32], *, last: bool) -> NDArray[np.float32]:
        if self._resampler is None:
            return samples
        out: NDArray[np.float32] = self._resampler.resample_chunk(samples, last=last)
        return out


def can_stream(recognizer: Recognizer) -> bool:
    """Whether the model hears chunk by chunk with the numbers it was trained for."""
    model = recognizer.model
    if not isinstance(model, U2Model) or not isinstance(recognizer.frontend.feature_conf, FbankConf):
        return False
    encoder = model.config.encoder
    whole = encoder.kind == "conformer" and encoder.use_cnn_module and not encoder.causal
    return encoder.has_chunks and not whole and encoder.input_layer != "conv1d2"


class _Chunks:
    """A chunk model. Features of a frame depend on its own window only, so they are computed as samples come."""

    def __init__(self, recognizer: Recognizer) -> None:
        model, options = recognizer.model, recognizer.options
        assert isinstance(model, U2Model)
        static = model.config.encoder.static_chunk_size
        chunk = options.chunk_size if options.chunk_size > 0 else static if static > 0 else CHUNK_FRAMES
        both = model.decoder is not None and model.config.reverse_weight > 0
        given = options.model_fields_set
        self.live: LiveRecogniser = model.live(
            chunk_size=chunk,
            left_chunks=options.left_chunks,
            beam=options.beam or 10,
            ctc_weight=options.ctc_weight if "ctc_weight" in given else 0.5,
            reverse_weight=options.reverse_weight
            if "reverse_weight" in given
            else (model.config.reverse_weight if both else 0.0),
            blank_penalty=options.blank_penalty,
            context=context_of(options, recognizer.tokenizer),
        )
        self.recognizer = recognizer
        self.rest = np.zeros(0, np.float32)
        self.heard = False

    def feed(self, samples: NDArray[np.float32]) -> str | None:
        feats = self._features(samples)
        if len(feats) == 0:
            return None
        self.heard = True
        found = self.live.feed(torch.from_numpy(feats)[None])
        return None if found is None else self.recognizer.tokenizer.decode(found.tokens).strip()

    def finish(self, samples: NDArray[np.float32]) -> str:
        self.feed(samples)
        if not self.heard:
            return ""
        return self.recognizer.tokenizer.decode(self.live.finish().tokens).strip()

    def _features(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        conf, rate = self.recognizer.frontend.fbank_conf, self.recognizer.frontend.rate_hz
        self.rest = np.concatenate([self.rest, samples])
        feats = fbank(self.rest, rate, conf)
        self.rest = self.rest[len(feats) * int(rate * 0.001 * conf.frame_shift) :]
        return feats


class _Again:
    """Any other model."""

    def __init__(self, recognizer: Recognizer) -> None:
        self.recognizer = recognizer
        self.pieces: list[NDArray[np.float32]] = []
        self.fresh = 0

    def feed(self, samples: NDArray[np.float32]) -> str | None:
        self.pieces.append(samples)
        self.fresh += len(samples)
        if self.fresh < AGAIN_S * self.recognizer.frontend.rate_hz:
            return None
        self.fresh = 0
        return self._text()

    def finish(self, samples: NDArray[np.float32]) -> str:
        self.pieces.append(samples)
        return self._text()

    def _text(self) -> str:
        self.pieces = [np.concatenate(self.pieces)]
        if len(self.pieces[0]) < 0.1 * self.recognizer.frontend.rate_hz:
            return ""
        return self.recognizer.hear([("microphone", self.pieces[0])])[0].text
