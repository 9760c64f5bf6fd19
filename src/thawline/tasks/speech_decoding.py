"""From options to a model's own decoding arguments, and from batches to hypotheses; refusals before any computing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from thawline.data.speech import SpeechBatch
from thawline.data.text import Tokenizer
from thawline.errors import RecipeError
from thawline.models.decode.context import ContextGraph
from thawline.models.decode.hypothesis import Hypothesis
from thawline.models.wenet.model import U2Model
from thawline.models.whisper_long import Fallback
from thawline.tasks.speech_options import SpeechOptions

_PREFIXES = ("ctc_prefix_beam_search", "attention_rescoring")


def decode(model: Any, batch: SpeechBatch, options: SpeechOptions, tokenizer: Tokenizer) -> list[Hypothesis]:
    """The best hypothesis of each utterance. Raises RecipeError for what this model cannot do."""
    found: list[Hypothesis] = model.decode(
        batch.feats, batch.feats_lengths, **settings_of(model, options, tokenizer, languages(batch, options))
    )
    return found


def settings_of(
    model: Any, options: SpeechOptions, tokenizer: Tokenizer | None, prompted: Sequence[str]
) -> dict[str, Any]:
    """The arguments of `model.decode` for utterances in the languages `prompted` ("auto": the model decides)."""
    mode = options.mode or default_mode(model)
    beam = options.beam or (10 if mode in _PREFIXES else 1)
    tasks = [options.task] * len(prompted)
    if not isinstance(model, U2Model):
        return _whisper_settings(model, options, tokenizer, mode, beam, prompted) | {"tasks": tasks}
    if mode == "whisper":
        raise RecipeError(
            "mode whisper is for Whisper in Hugging Face's or OpenAI's form",
            where="mode",
            fix="attention, or convert it: thawline convert SRC DST --to hf",
        )
    for name in ("prompt", "fallback"):
        if getattr(options, name):
            raise RecipeError(f"{name} is for Whisper alone", where=name, fix="leave it out")
    if options.task == "translate" and not model.config.is_whisper:
        raise RecipeError("this model cannot translate; it writes what it hears", where="task", fix="leave it out")
    settings: dict[str, Any] = {
        "mode": mode,
        "beam": beam,
        "ctc_weight": options.ctc_weight,
        "reverse_weight": options.reverse_weight,
        "length_penalty": options.length_penalty,
        "blank_penalty": options.blank_penalty,
        "chunk_size": options.chunk_size,
        "left_chunks": options.left_chunks,
        "streaming": options.streaming,
        "context": context_of(options, tokenizer),
    }
    if model.config.is_whisper:
        settings |= {"languages": ["en" if lang == "auto" else lang for lang in prompted], "tasks": tasks}
    return settings


def default_mode(model: Any) -> str:
    """How a model is decoded where nobody says: greedily, by CTC where it was trained with CTC."""
    ctc = getattr(getattr(model, "config", None), "ctc_weight", 0.0)
    return "ctc_greedy_search" if ctc > 0 else "attention"


def languages(batch: SpeechBatch, options: SpeechOptions) -> list[str]:
    """The language of each utterance: the option's, else the row's own, else English."""
    if options.language:
        return [options.language] * len(batch.keys)
    return [lang or "en" for lang in (batch.langs or [""] * len(batch.keys))]


def context_of(options: SpeechOptions, tokenizer: Tokenizer | None) -> ContextGraph | None:
    """The automaton of the hotwords. Raises RecipeError naming a phrase that the vocabulary cannot spell."""
    if not options.hotwords:
        return None
    if tokenizer is None:
        raise RecipeError("hotwords need the model's tokenizer", where="hotwords")
    phrases = []
    for phrase in options.hotwords:
        unknown = tokenizer.unknown(phrase)
        if unknown:
            raise RecipeError(
                f"{phrase!r} cannot be spelled with this model's units: {', '.join(map(repr, unknown[:5]))}",
                where="hotwords",
                fix="spell it as the transcripts are spelled (upper or lower case?)",
            )
        phrases.append(tuple(tokenizer.encode(phrase)))
    return _graph(tuple(phrases), options.hotword_score)


@lru_cache(maxsize=8)
def _graph(phrases: tuple[tuple[int, ...], ...], score: float) -> ContextGraph:
    return ContextGraph(phrases, score=score)


def prompt_ids(options: SpeechOptions, tokenizer: Tokenizer | None) -> torch.Tensor | None:
    """Whisper's prompt: the start of the previous text and its words (n,), as transformers' get_prompt_ids gives it."""
    if not options.prompt:
        return None
    identify = getattr(tokenizer, "id", None)
    if tokenizer is None or identify is None:
        raise RecipeError("a prompt needs Whisper's tokenizer", where="prompt")
    return torch.tensor([identify("<|startofprev|>"), *tokenizer.encode(" " + options.prompt.strip())])


def fallback_of(options: SpeechOptions) -> Fallback | None:
    """When a Whisper tries a window again; None: never."""
    if not options.fallback:
        return None
    return Fallback(compression_ratio=options.compression_ratio, log_prob=options.log_prob, no_speech=options.no_speech)


def _whisper_settings(
    model: Any, options: SpeechOptions, tokenizer: Tokenizer | None, mode: str, beam: int, prompted: Sequence[str]
) -> dict[str, Any]:
    if mode not in ("attention", "whisper"):
        raise RecipeError(f"Whisper has no CTC and is not decoded by {mode!r}", where="mode", fix="whisper")
    ours = SpeechOptions()
    for name in ("ctc_weight", "reverse_weight", "blank_penalty", "chunk_size", "left_chunks", "streaming", "hotwords"):
        if getattr(options, name) != getattr(ours, name):
            raise RecipeError(f"{name} means nothing to Whisper", where=name, fix="leave it out")
    settings: dict[str, Any] = {
        "mode": "attention",
        "beam": beam,
        "prompt_tokens": prompt_ids(options, tokenizer),
        "fallback": fallback_of(options),
    }
    if options.length_penalty:
        settings["length_penalty"] = options.length_penalty
    if model.is_multilingual:
        settings["languages"] = None if "auto" in prompted else list(prompted)
    return settings
