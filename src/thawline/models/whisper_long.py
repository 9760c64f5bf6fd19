"""Whisper over recordings of any length: windows that follow its own time marks, times of words, second attempts.

All of it is transformers' long form (generation_whisper.py), which is OpenAI's transcribe.py; here it is asked, and its
answer becomes plain values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thawline.core.rng import derive
from thawline.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    """When a window is decoded once more, by drawing at the next temperature (Radford 2022, section 4.5).

    temperatures:      tried in turn; 0 is the beam or greedy search itself
    compression_ratio: what is more repetitive than this is tried again. Of the tokens' bytes under zlib, as
                       transformers measures it: 1.35 is about OpenAI's 2.4, which is of the text
    log_prob:          what is less probable than this, in ln per token, is tried again
    no_speech:         ... unless silence is more probable than this: then the window is left out
    """

    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    compression_ratio: float = 1.35
    log_prob: float = -1.0
    no_speech: float = 0.6

    def __post_init__(self) -> None:
        if not self.temperatures or min(self.temperatures) < 0:
            raise RecipeError(
                f"temperatures of {list(self.temperatures)}", where="temperatures", fix="0 and up, in rising order"
            )

    def settings(self) -> dict[str, Any]:
        """What transformers' `generate` is told."""
        return {
            "temperature": self.temperatures,
            "compression_ratio_threshold": self.compression_ratio,
            "logprob_threshold": self.log_prob,
            "no_speech_threshold": self.no_speech,
        }


@dataclass(frozen=True, slots=True)
class TimedTokens:
    """A segment of a recording: seconds from its begin, and text tokens (special ones above the end included).

    spans: begin and end of each token in seconds, by its attention to the sound; empty where not asked for
    """

    start_s: float
    end_s: float
    tokens: tuple[int, ...]
    spans: tuple[tuple[float, float], ...] = ()


@torch.no_grad()
def decode_long(
    model: Any,
    feats: Tensor,
    *,
    heard: int | None = None,
    beam: int = 1,
    language: str = "en",
    task: str = "transcribe",
    prompt_tokens: Tensor | None = None,
    length_penalty: float = 1.0,
    token_times: bool = False,
    fallback: Fallback | None = None,
) -> list[TimedTokens]:
    """model: a `Whisper`, feats (T, bins) of any length -> what was said, in segments with times.

    A window of 30 s is decoded with time marks, and the next begins at the last mark (Radford 2022, section 3.8).
    heard: how many of the frames hold sound, where the recording was padded to a window; None is all of them.
    token_times: each token's place in the sound as well, by dynamic time warping over the cross attention of the heads
    that generation_config.json names (or of all heads in the upper half of the decoder, as OpenAI does where nothing is
    known). fallback: None decodes each window once; with one, draws are keyed by nothing but the recording itself, so
    the same recording gives the same text.
    """
    frames = feats.size(0)
    heard = frames if heard is None else heard
    if frames <= 2 * int(model.config.max_source_positions):
        whole = model.window(feats[None], torch.tensor([frames], device=feats.device))
    else:
        whole = feats.T[None].to(model.dtype)  # (1, bins, T)
    mask = (torch.arange(whole.size(2), device=whole.device) < heard).long()[None]
    settings: dict[str, Any] = model.search_settings(beam, length_penalty)
    if model.is_multilingual:
        model.prompt(1, feats.device, [language], [task])  # refuses unknown names
        settings |= {"language": language, "task": task}
    if prompt_tokens is not None:
        settings["prompt_ids"] = prompt_tokens
    if fallback is not None:
        settings |= fallback.settings()
    timing = _attending(model) if token_times else nullcontext()
    with model.generating(), timing, keyed(feats.device):
        found = model.generate(
            whole,
            attention_mask=mask,
            return_timestamps=True,
            return_segments=True,
            return_token_timestamps=token_times,
            **settings,
        )
    first_time = int(model.generation_config.no_timestamps_token_id) + 1
    return [_plain(segment, first_time, heard / 100.0) for segment in found["segments"][0]]


def _plain(segment: Any, first_time: int, end_s: float) -> TimedTokens:
    """A segment of transformers' without its time tokens, and inside the recording."""
    tokens = segment["tokens"].tolist()
    start_s = float(segment["start"])
    stop_s = min(max(float(segment["end"]), start_s), max(end_s, start_s))
    text = [n for n, token in enumerate(tokens) if token < first_time]
    spans: list[tuple[float, float]] = []
    if "token_timestamps" in segment:
        # A token is over where the attention leaves it; it begins where the one before it is over.
        over = [start_s, *segment["token_timestamps"].tolist()]
        spans = [(over[n], over[n + 1]) for n in text]
    return TimedTokens(start_s, stop_s, tuple(tokens[n] for n in text), tuple(spans))


@contextmanager
def _attending(model: Any) -> Iterator[None]:
    """Attention that can be looked at, for as long as times are wanted: it is slower, and rounds otherwise."""
    config, generation = model.config, model.generation_config
    implementation, known = config._attn_implementation, getattr(generation, "alignment_heads", None)
    if known is None:
        generation.alignment_heads = [
            [layer, head]
            for layer in range(config.decoder_layers // 2, config.decoder_layers)
            for head in range(config.decoder_attention_heads)
        ]
    try:
        yield
    finally:
        config._attn_implementation = implementation
        if known is None:
            del generation.alignment_heads


@contextmanager
def keyed(device: torch.device) -> Iterator[None]:
    """Draws of the global generators from a key of their own; the generators are left as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive(0, "whisper fallback"))
        yield
