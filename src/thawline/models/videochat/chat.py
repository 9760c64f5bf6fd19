"""One answer to one question about clips: token after token, with nothing random that is not asked for.

The prompt's wording is the caller's (`data.conversation_templates.Template.prompt`); here it becomes tokens around the
clips' visual tokens, and the language model goes on from there. The first token is bos with its true embedding, as in
upstream's demos, whatever training wrote in its place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from thawline.errors import DataError, RecipeError
from thawline.models.videochat.model import IGNORE, Prompt, VideoChat


class Tokenizer(Protocol):
    """What is needed of the language model's tokenizer (`llm.ChatTokenizer`)."""

    eos_id: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class TextTokenizer(Protocol):
    """What is needed of the Q-Former's tokenizer (`llm.InstructionTokenizer`)."""

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    temperature: 0 takes the likeliest token (greedy); above, tokens are drawn from the softmax of logits / temperature
    top_p:       only the likeliest tokens that hold this share of the probability together may be drawn
    seed:        of the draws; the global generators are neither read nor moved
    """

    max_new_tokens: int = 200
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise RecipeError(
                f"max_new_tokens {self.max_new_tokens}, temperature {self.temperature}, top_p {self.top_p}: not meant",
                fix="max_new_tokens >= 1, temperature >= 0, 0 < top_p <= 1",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """text: without the stop sign; tokens: all that were generated; ended: by a stop sign, eos, or the limit."""

    text: str
    tokens: tuple[int, ...]
    ended: str


@torch.inference_mode()
def chat(
    model: VideoChat,
    clips: Sequence[Tensor],
    prompt: Sequence[str],
    *,
    tokenizer: Tokenizer,
    instruction: str = "",
    instruction_tokenizer: TextTokenizer | None = None,
    stop: Sequence[str] = (),
    sampling: Sampling | None = None,
    on_text: Callable[[str], None] | None = None,
    visual: Sequence[Tensor] | None = None,
) -> Answer:
    """Ask about clips.

    clips:       each (T, 3, H, W) float, normalised; T = 1 for a still image
    prompt:      the text around the clips, one piece more than there are clips, the last one ending where the answer
                 begins
    instruction: what the Q-Former reads, where it takes text; needs `instruction_tokenizer` then
    stop:        an answer ends before any of these, and at eos
    on_text:     called with each new stretch of the answer as it comes
    visual:      what `look` made of the clips, which are then not looked at again

    Raises DataError where pieces and clips do not fit together, RecipeError where the Q-Former takes text and no
    tokenizer for it is given.
    """
    seen = clips if visual is None else visual
    if len(prompt) != len(seen) + 1:
        raise DataError(f"a prompt of {len(prompt)} pieces leaves {len(prompt) - 1} places for {len(seen)} clips")
    choose = _chooser(sampling or Sampling())
    limit = (sampling or Sampling()).max_new_tokens
    was_training = model.training
    modes = {name: module.training for name, module in model.named_modules()} if was_training else {}
    model.eval()
    try:
        if visual is None:
            visual = look(model, clips, instruction=instruction, instruction_tokenizer=instruction_tokenizer)
        past, logits = _read(model, visual, prompt, tokenizer)
        tokens: list[int] = []
        shown = ""
        ended = "limit"
        while len(tokens) < limit:
            token = choose(logits)
            if token == tokenizer.eos_id:
                ended = "eos"
                break
            tokens.append(token)
            text = tokenizer.decode(tokens)
            cut = min((at for at in (text.find(sign) for sign in stop) if at >= 0), default=-1)
            if cut >= 0:
                shown = _tell(on_text, shown, text[:cut])
                return Answer(text=text[:cut].strip(), tokens=tuple(tokens), ended="stop")
            shown = _tell(on_text, shown, text[: len(text) - _held_back(text, stop)])
            if len(tokens) < limit:
                out = model.llm(
                    inputs_embeds=model.causal_lm.get_input_embeddings()(  # type: ignore[operator]
                        torch.tensor([[token]], device=model.device)
                    ),
                    past_key_values=past,
                    use_cache=True,
                )
                past, logits = out.past_key_values, out.logits[0, -1]
        text = tokenizer.decode(tokens) if tokens else ""
        _tell(on_text, shown, text)
        return Answer(text=text.strip(), tokens=tuple(tokens), ended=ended)
    finally:
        for name, mode in modes.items():
            model.get_submodule(name).training = mode


@torch.inference_mode()
def look(
    model: VideoChat,
    clips: Sequence[Tensor],
    *,
    instruction: str = "",
    instruction_tokenizer: TextTokenizer | None = None,
) -> list[Tensor]:
    """The visual tokens of clips, each (tokens, D): to ask several questions and look once. Put the model in eval mode.

    Raises RecipeError where the Q-Former takes text and no tokenizer for it is given.
    """
    ids = mask = None
    if model.config.qformer.text_input:
        if instruction_tokenizer is None:
            raise RecipeError("this model's Q-Former reads an instruction", fix="give its tokenizer (bert directory)")
        ids = torch.tensor([instruction_tokenizer.encode(instruction)], device=model.device)
        mask = torch.ones_like(ids)
    return model.encode([c.to(model.device) for c in clips], ids, mask, [0] * len(clips)) if clips else []


def _read(
    model: VideoChat, visual: Sequence[Tensor], prompt: Sequence[str], tokenizer: Tokenizer
) -> tuple[object, Tensor]:
    """The language model's memory after the prompt, and its logits (V,) for what follows."""
    pieces = [tokenizer.encode(text) if text else [] for text in prompt]
    labels = [[IGNORE] * len(piece) for piece in pieces]
    inputs = model.assemble([Prompt(pieces=pieces, labels=labels)], visual, bos="embedding")
    out = model.llm(inputs_embeds=inputs.embeds, use_cache=True)
    return out.past_key_values, out.logits[0, -1]


def _chooser(sampling: Sampling) -> Callable[[Tensor], int]:
    if sampling.temperature == 0:
        return lambda logits: int(logits.argmax())
    generator = torch.Generator().manual_seed(sampling.seed)

    def draw(logits: Tensor) -> int:
        shares, order = (logits.float() / sampling.temperature).softmax(-1).cpu().sort(descending=True)
        kept = shares.cumsum(0) - shares < sampling.top_p  # the first is always kept
        return int(order[torch.multinomial(shares * kept, 1, generator=generator)])

    return draw


def _held_back(text: str, stop: Sequence[str]) -> int:
    """Characters at the end of `text` that may be the beginning of a stop sign, or half of a character."""
    held = max((n for sign in stop for n in range(1, len(sign)) if text.endswith(sign[:n])), default=0)
    return max(held, len(text) - len(text.rstrip("\ufffd")))


def _tell(on_text: Callable[[str], None] | None, shown: str, text: str) -> str:
    if on_text is not None and len(text) > len(shown) and text.startswith(shown):
        on_text(text[len(shown) :])
        return text
    return shown
