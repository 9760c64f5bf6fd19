"""Samples and batches of video chat: an instruction file's dialogues with their clips, as numbers.

Every choice of a sample (frames, crop, flip, order of turns, caption order) is drawn from one generator that follows
from (seed, epoch, sample id), so a sample is the same whichever worker reads it, and after any resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor

from thawline.core.rng import derive
from thawline.data.conversation import Dialogue, Dialogues, shuffled
from thawline.data.conversation_templates import Targets, Template
from thawline.data.conversation_tokens import Encoded, Tokenizer, encode
from thawline.data.video import (
    IMAGENET,
    Clip,
    How,
    Normalisation,
    prepare,
    random_crop,
    read_image,
    read_video,
    to_tiles,
)
from thawline.errors import DataError, RecipeError

CAPTION_PROMPTS: Mapping[str, tuple[str, ...]] = {
    "video": (
        "Describe the following video concisely.",
        "Provide a brief description of the given video clip.",
        "Offer a succinct explanation of the footage presented.",
        "Summarize the visual content of the following video.",
    ),
    "image": (
        "Describe the following image concisely.",
        "Provide a brief description of the given image.",
        "Offer a succinct explanation of the picture presented.",
        "Summarize the visual content of the following image.",
    ),
}
"""Orders in front of captions: the first of upstream's (`prompts/concise_*description.txt`)."""


class InstructionTokenizer(Protocol):
    """The Q-Former's tokenizer."""

    pad_id: int

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSettings:
    """How clips become tensors.

    frames:     per video
    size:       side of a frame in pixels, or of a tile
    sampling:   how frames are chosen in training; evaluation uses "uniform"
    augment:    random crop and mirror image in training (never with tiles, as upstream)
    max_tiles:  0 for one view; else the HD variant
    say_times:  whether the conversation says when the frames were taken (upstream's add_second_msg)

    Raises RecipeError for what no clip can become.
    """

    frames: int = 8
    size: int = 224
    sampling: How = "random"
    augment: bool = True
    max_tiles: int = 0
    tile_padding: bool = False
    normalisation: Normalisation = IMAGENET
    say_times: bool = True

    def __post_init__(self) -> None:
        counts = (("frames a video", self.frames, 1), ("pixels a side", self.size, 1), ("tiles", self.max_tiles, 0))
        for what, count, least in counts:
            if type(count) is not int or count < least:
                raise RecipeError(f"{count!r} {what} cannot be meant", fix=f"a whole number from {least}")
        if self.sampling not in get_args(How):
            raise RecipeError(f"{self.sampling!r} is no way to choose frames", fix=", ".join(get_args(How)))
        mean, std = self.normalisation.mean, self.normalisation.std
        if len(mean) != 3 or len(std) != 3 or not min(std) > 0:
            raise RecipeError(
                f"pixels cannot be brought to mean {mean} and deviation {std}", fix="three of each, above 0"
            )


@dataclass(frozen=True, slots=True)
class ChatSample:
    """One dialogue, ready: clips each (T, 3, H, W) float32; instruction: the Q-Former's token numbers."""

    key: str
    clips: tuple[Tensor, ...]
    encoded: Encoded
    instruction: tuple[int, ...]
    turns: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatBatch:
    """A micro-batch.

    clips:   all clips of all samples in order; prompts: pieces and labels of each sample
    text_ids, text_mask: (B, words) int64, or None where the Q-Former takes no text
    weights: {"utterances": B, "tokens": learnt tokens}
    """

    keys: tuple[str, ...]
    clips: tuple[Tensor, ...]
    prompts: tuple[Encoded, ...]
    text_ids: Tensor | None
    text_mask: Tensor | None
    weights: Mapping[str, float]

    def rows(self, start: int, stop: int) -> ChatBatch:
        """The samples from `start` to `stop` with their clips. Instructions keep their padded width."""
        prompts = self.prompts[start:stop]
        first = sum(len(p.pieces) - 1 for p in self.prompts[:start])
        clips = sum(len(p.pieces) - 1 for p in prompts)
        return replace(
            self,
            keys=self.keys[start:stop],
            clips=self.clips[first : first + clips],
            prompts=prompts,
            text_ids=None if self.text_ids is None else self.text_ids[start:stop],
            text_mask=None if self.text_mask is None else self.text_mask[start:stop],
            weights=_weights(prompts),
        )

    def to(self, device: Any) -> ChatBatch:
        return replace(
            self,
            clips=tuple(c.to(device, non_blocking=True) for c in self.clips),
            text_ids=None if self.text_ids is None else self.text_ids.to(device, non_blocking=True),
            text_mask=None if self.text_mask is None else self.text_mask.to(device, non_blocking=True),
        )


class DialogueSamples:
    """Rows of an instruction or caption file by number, and what is drawn for each: what the stages share.

    training: random frames, crops and orders; else the middle frames, whole, in the file's order
    """

    def __init__(self, dialogues: Dialogues, settings: ClipSettings, *, training: bool, seed: int) -> None:
        self.dialogues = dialogues
        self.settings = settings
        self.training = training
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dialogues)

    @property
    def fingerprint(self) -> str:
        return self.dialogues.fingerprint

    @property
    def left_out(self) -> tuple[()]:
        """None: a malformed entry keeps its number, and counts as a bad sample when it is read."""
        return ()

    def key(self, id: int) -> str:
        """What the sample is called in reports."""
        return self.dialogues.key(id)

    def draws(self, id: int, epoch: int) -> np.random.Generator | None:
        """What every choice of a sample is drawn from; None in evaluation, where nothing is."""
        return np.random.default_rng(derive(self.seed, "clip", epoch, id)) if self.training else None


class ChatSamples(DialogueSamples):
    """Dialogues by number: read, collate, length.

    instruction_tokenizer: None where the Q-Former takes no text (stage 2)
    padding: side on which shorter instructions are padded
    visual_tokens: tokens that one view of a clip becomes, for `length`
    """

    def __init__(
        self,
        dialogues: Dialogues,
        *,
        template: Template,
        tokenizer: Tokenizer,
        instruction_tokenizer: InstructionTokenizer | None,
        settings: ClipSettings,
        training: bool,
        seed: int,
        max_text_tokens: int = 512,
        padding: Literal["left", "right"] = "left",
        shuffle_turns: bool = True,
        targets: Targets = "answers",
        visual_tokens: int = 96,
        caption_prompts: Mapping[str, Sequence[str]] = CAPTION_PROMPTS,
    ) -> None:
        super().__init__(dialogues, settings, training=training, seed=seed)
        self.template = template
        self.tokenizer = tokenizer
        self.instruction_tokenizer = instruction_tokenizer
        self.max_text_tokens = max_text_tokens
        self.padding = padding
        self.shuffle_turns = shuffle_turns
        self.targets: Targets = targets
        self.visual_tokens = visual_tokens
        self.caption_prompts = caption_prompts

    def length(self, id: int) -> float:
        """An estimate of the language model's row: visual tokens, and a token for every four characters."""
        try:
            dialogue = self.dialogues[id]
        except DataError:
            return 1.0  # it will be counted as a bad sample when it is read
        said = sum(len(t.question) + len(t.answer) for t in dialogue.turns) + len(dialogue.caption)
        return len(dialogue.media) * self.visual_tokens + min(said / 4, self.max_text_tokens) + 1

    def read(self, id: int, epoch: int) -> ChatSample:
        """The sample's tensors and numbers. Raises DataError for a malformed entry, a bad file, or nothing to learn."""
        dialogue = self.dialogues[id]
        rng = self.draws(id, epoch)
        clips = [read_clip(dialogue, path, self.settings, rng) for path in dialogue.media]
        times = clips[0].times_s if clips and clips[0].times_s and self.settings.say_times else None
        turns = dialogue.turns
        if dialogue.caption:
            orders = self.caption_prompts[dialogue.kind]
            order = orders[0] if rng is None else orders[int(rng.integers(len(orders)))]
            rendered = self.template.caption(dialogue, order)
        else:
            if rng is not None and self.shuffle_turns and len(turns) > 1:
                turns = shuffled(turns, rng)
            rendered = self.template.render(dialogue, turns=turns, times_s=times, targets=self.targets)
        encoded = encode(
            rendered,
            self.tokenizer,
            max_tokens=self.max_text_tokens,
            template=self.template,
            targets=self.targets,
            where=dialogue.key,
        )
        words: tuple[int, ...] = ()
        if self.instruction_tokenizer is not None:
            words = tuple(self.instruction_tokenizer.encode(rendered.instruction))
        return ChatSample(
            key=dialogue.key,
            clips=tuple(to_tensor(clip, self.settings, rng) for clip in clips),
            encoded=encoded,
            instruction=words,
            turns=tuple((t.question, t.answer) for t in turns),
        )

    def collate(self, samples: Sequence[ChatSample]) -> ChatBatch:
        """One micro-batch. The samples' own padding cannot move each other: instructions are masked."""
        ids = mask = None
        if self.instruction_tokenizer is not None:
            ids, mask = pad_words([s.instruction for s in samples], self.instruction_tokenizer.pad_id, self.padding)
        return ChatBatch(
            keys=tuple(s.key for s in samples),
            clips=tuple(c for s in samples for c in s.clips),
            prompts=tuple(s.encoded for s in samples),
            text_ids=ids,
            text_mask=mask,
            weights=_weights([s.encoded for s in samples]),
        )


def read_clip(dialogue: Dialogue, path: str, settings: ClipSettings, rng: np.random.Generator | None) -> Clip:
    """The frames of one of a dialogue's files that are shown: drawn from `rng` in training, which is None elsewhere."""
    if dialogue.kind == "image":
        return read_image(path)
    how = "uniform" if rng is None and settings.sampling == "random" else settings.sampling
    return read_video(path, settings.frames, how, rng=rng, start_s=dialogue.start_s, end_s=dialogue.end_s)


def to_tensor(clip: Clip, settings: ClipSettings, rng: np.random.Generator | None = None) -> Tensor:
    """The clip as the model sees it, (T, 3, H, W) float32: tiled, cropped as `rng` draws it (in training), or whole."""
    s = settings
    if s.max_tiles:
        return to_tiles(clip.frames, s.size, s.max_tiles, padding=s.tile_padding, normalisation=s.normalisation)
    height, width = clip.frames.shape[1:3]
    crop = random_crop(height, width, rng) if rng is not None and s.augment else None
    return prepare(clip.frames, s.size, normalisation=s.normalisation, crop=crop)


def _weights(prompts: Sequence[Encoded]) -> dict[str, float]:
    return {"utterances": float(len(prompts)), "tokens": float(sum(p.n_learnt for p in prompts))}


def pad_words(rows: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Token numbers of different lengths as (B, longest) int64, with a mask that is 0 at padding."""
    longest = max((len(r) for r in rows), default=0)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[number, place] = torch.tensor(row, dtype=torch.long)
        mask[number, place] = 1
    return ids, mask
