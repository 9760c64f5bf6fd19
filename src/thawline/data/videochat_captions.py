"""Samples and batches of stage 1: clips with their captions, for a model that learns which belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from thawline.data.conversation import Dialogues
from thawline.data.videochat import ClipSettings, DialogueSamples, pad_words, read_clip, to_tensor
from thawline.errors import DataError, RecipeError


class CaptionTokenizer(Protocol):
    """BERT's: `[CLS]`, the word pieces, `[SEP]`."""

    pad_id: int

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class CaptionSample:
    """clip: (T, 3, H, W) float32; words: token numbers of the caption; media: which file the clip is of."""

    key: str
    clip: Tensor
    words: tuple[int, ...]
    media: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionBatch:
    """A micro-batch. Its samples are each other's false partners, so it means something else when it is cut.

    text_ids, text_mask: (B, words) int64, padded on the right
    media:   which file each clip is of
    owners:  (B,) the same as numbers, counted within the batch
    weights: {"captions": B, "pairs": true and false ones, "words": those that are written}
    """

    keys: tuple[str, ...]
    media: tuple[str, ...]
    clips: tuple[Tensor, ...]
    text_ids: Tensor
    text_mask: Tensor
    owners: Tensor
    weights: Mapping[str, float]

    def rows(self, start: int, stop: int) -> CaptionBatch:
        """Never: raises RecipeError, so that a batch that does not fit into memory is not cut behind one's back."""
        raise RecipeError(
            f"{len(self.keys)} captions do not fit into memory at once, and cut smaller they would be compared with "
            "fewer others, which is another loss",
            fix="a smaller data.batch.size, or more memory",
        )

    def to(self, device: Any) -> CaptionBatch:
        return replace(
            self,
            clips=tuple(c.to(device, non_blocking=True) for c in self.clips),
            text_ids=self.text_ids.to(device, non_blocking=True),
            text_mask=self.text_mask.to(device, non_blocking=True),
            owners=self.owners.to(device, non_blocking=True),
        )


class CaptionSamples(DialogueSamples):
    """Captioned clips by number. Frames, crop and flip follow from (seed, epoch, sample id)."""

    def __init__(
        self, dialogues: Dialogues, *, tokenizer: CaptionTokenizer, settings: ClipSettings, training: bool, seed: int
    ) -> None:
        super().__init__(dialogues, settings, training=training, seed=seed)
        self.tokenizer = tokenizer

    def length(self, id: int) -> float:
        """All clips are of one size, so batches are counted, never measured."""
        return 1.0

    def read(self, id: int, epoch: int) -> CaptionSample:
        """The sample. Raises DataError for a malformed entry, one without one clip and a caption, or a bad file."""
        row = self.dialogues[id]
        if not row.caption or len(row.media) != 1:
            raise DataError("stage 1 learns from one clip with its caption", where=row.key, fix='{"video", "caption"}')
        rng = self.draws(id, epoch)
        clip = read_clip(row, row.media[0], self.settings, rng)
        return CaptionSample(
            key=row.key,
            clip=to_tensor(clip, self.settings, rng),
            words=tuple(self.tokenizer.encode(row.caption)),
            media=row.media[0],
        )

    def collate(self, samples: Sequence[CaptionSample]) -> CaptionBatch:
        ids, mask = pad_words([s.words for s in samples], self.tokenizer.pad_id, "right")
        media = tuple(s.media for s in samples)
        false = 0 if len(set(media)) == 1 else 2 * len(samples)
        return CaptionBatch(
            keys=tuple(s.key for s in samples),
            media=media,
            clips=tuple(s.clip for s in samples),
            text_ids=ids,
            text_mask=mask,
            owners=torch.tensor([media.index(m) for m in media]),
            weights={
                "captions": float(len(samples)),
                "pairs": float(len(samples) + false),
                "words": float(sum(len(s.words) - 1 for s in samples)),
            },
        )
