"""A VideoChat2 model with its tokenizers, from a language model's directory and a configuration.

Only the language model's weights are loaded. The files of the stages come afterwards (`loading.load_parts_`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thawline.errors import CheckpointError, RecipeError
from thawline.models.videochat.config import VideoChatConfig, from_upstream
from thawline.models.videochat.llm import ChatTokenizer, InstructionTokenizer, family_of, load_llm, random_llm
from thawline.models.videochat.model import VideoChat


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """instruction_tokenizer: None where the Q-Former takes no text."""

    model: VideoChat
    tokenizer: ChatTokenizer
    instruction_tokenizer: InstructionTokenizer | None


def read_config(llm: Path, bert: Path | None, upstream: Mapping[str, Any]) -> VideoChatConfig:
    """The configuration that upstream's `model` section means with these directories.

    upstream: the section itself, or a whole configuration that has it under "model"
    Raises RecipeError where it names a key that would be passed over, or wants a BERT vocabulary and none is given.
    """
    section = upstream.get("model", upstream)
    family = family_of(llm)
    settings = None
    if bert is not None:
        path = bert / "config.json"
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as exc:
            raise CheckpointError(f"the Q-Former's BERT configuration cannot be read: {exc}", where=str(path)) from exc
    return from_upstream(section, family=family, bert=settings)


def build(
    config: VideoChatConfig,
    llm: Path,
    bert: Path | None = None,
    *,
    dtype: str = "float32",
    random_weights: bool = False,
) -> Opened:
    """The model and its tokenizers.

    bert:  directory of the Q-Former's vocabulary; needed where it takes text
    dtype: of the language model's weights; the rest is float32
    random_weights: a language model of the directory's shape with random weights, for trying things out
    Raises RecipeError where the directory is of another family than the configuration, or the vocabulary is missing;
    CheckpointError where a directory is not whole, or the vocabulary has another size than the configuration says.
    """
    family = family_of(llm)
    if family != config.family:
        raise RecipeError(
            f"the configuration is for {config.family} and the language model is {family}",
            where=str(llm),
            fix="give the language model that the weights were trained with",
        )
    words = None
    if config.qformer.text_input:
        if bert is None:
            raise RecipeError(
                "this model's Q-Former reads instructions, and no vocabulary for it is given",
                fix="bert: the directory of bert-base-uncased (vocab.txt, config.json)",
            )
        limit = min(config.max_text_tokens, config.qformer.max_positions)
        words = InstructionTokenizer.load(bert, max_tokens=limit)
        if len(words) != config.qformer.vocab_size:
            raise CheckpointError(
                f"the vocabulary has {len(words)} words with [DEC], the embedding {config.qformer.vocab_size} rows",
                where=str(bert),
                fix="give the vocabulary that the weights were trained with",
            )
    tokenizer = ChatTokenizer.load(llm)
    inner = random_llm(llm, dtype=dtype) if random_weights else load_llm(llm, dtype=dtype)
    model = VideoChat(config, inner, bos_id=tokenizer.bos_id, pad_id=tokenizer.pad_id)
    return Opened(model=model, tokenizer=tokenizer, instruction_tokenizer=words)


def for_stage(config: VideoChatConfig, stage: int) -> VideoChatConfig:
    """The configuration of a stage: 2 has no text in the Q-Former and no adapters, 3 and later have what is configured.

    Raises RecipeError for stage 1, which trains another model (contrastive and matching losses) than is built here.
    """
    if stage == 2:
        return config.for_captions()
    if stage < 2:
        raise RecipeError("stage 1 is not built here", fix="start from its file, umt_l16_qformer.pth")
    return dataclasses.replace(config)
