"""Recordings and transcripts into padded batches.

Every draw comes from one generator keyed by (seed, epoch, sample), so that a sample looks the same in whatever batch,
worker or process it is read. The filter is applied where batches are planned, on durations and token counts, and once
more on what was really read.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from thawline.data.audio import decode, resample
from thawline.data.durations import Durations
from thawline.data.manifest import Manifest
from thawline.data.speech_frontend import SpeechFrontend
from thawline.data.text import Tokenizer
from thawline.data.utterance import Utterance
from thawline.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

LONGEST_S = 3600.0
"""What is longer is no utterance but a recording that nobody has cut yet: it would be held in memory whole."""

PADDING = -1
"""What fills `target` after its end."""


@dataclass(frozen=True, slots=True)
class SpeechSample:
    """One utterance as the model sees it: feats (frames, bins) float32, target ids."""

    key: str
    feats: NDArray[np.float32]
    target: tuple[int, ...]
    text: str
    lang: str = ""
    task: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechBatch:
    """Utterances padded to one length.

    keys:           names, in the order of the rows
    feats:          (B, T, bins) float32, zero after each utterance's end
    feats_lengths:  (B,) int64, frames
    target:         (B, L) int64, -1 after each utterance's end; L is 0 without a tokenizer
    target_lengths: (B,) int64
    texts, langs, tasks: as the list has them
    weights:        {"utterances": B, "tokens": sum of target_lengths}: the denominators of losses
    """

    keys: tuple[str, ...]
    feats: Tensor
    feats_lengths: Tensor
    target: Tensor
    target_lengths: Tensor
    texts: tuple[str, ...]
    langs: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def input_features(self) -> Tensor:
        """(B, bins, T): what Whisper of transformers calls it; (B, 80, 3000) with pad_or_trim."""
        return self.feats.transpose(1, 2)

    def rows(self, start: int, stop: int) -> SpeechBatch:
        """The utterances from `start` to `stop`. The padded width stays: a convolution without a mask sees the padding
        of a batch in an utterance's last frames, so cutting it would change them."""
        lengths = self.target_lengths[start:stop]
        return replace(
            self,
            keys=self.keys[start:stop],
            feats=self.feats[start:stop],
            feats_lengths=self.feats_lengths[start:stop],
            target=self.target[start:stop],
            target_lengths=lengths,
            texts=self.texts[start:stop],
            langs=self.langs[start:stop],
            tasks=self.tasks[start:stop],
            weights={"utterances": float(stop - start), "tokens": float(lengths.sum())},
        )

    def to(self, device: torch.device | str) -> SpeechBatch:
        """The same batch with its tensors on `device`."""
        return replace(
            self,
            feats=self.feats.to(device, non_blocking=True),
            feats_lengths=self.feats_lengths.to(device, non_blocking=True),
            target=self.target.to(device, non_blocking=True),
            target_lengths=self.target_lengths.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An utterance that the plan does not contain, and why: by the filter, or because it cannot be read."""

    key: str
    reason: str
    unreadable: bool = False


class SpeechSamples:
    """The utterances of a manifest by number, for the loader.

    manifest:  what there is; rows without a duration are measured from their headers now, if not in an earlier run
    frontend:  WeNet's dataset_conf
    tokenizer: None reads without targets
    training:  augments, and leaves out what filter_conf says; evaluation does neither, and keeps the order
    encoder_frames: how many the encoder gives for so many of features; an utterance with none cannot be used
    """

    def __init__(
        self,
        manifest: Manifest,
        frontend: SpeechFrontend,
        tokenizer: Tokenizer | None = None,
        *,
        training: bool,
        encoder_frames: Callable[[int], int] | None = None,
    ) -> None:
        self.frontend = frontend
        self.encoder_frames = encoder_frames
        self.tokenizer = tokenizer
        self.training = training
        kept, lengths = array("q"), array("d")  # a corpus may have more rows than a list of Python numbers has room for
        left_out: list[LeftOut] = []
        measured = Durations.of(manifest.path)
        all_known = True
        for number, row in enumerate(manifest):
            unreadable = False
            all_known = all_known and row.duration_s is not None
            try:
                length = measured.seconds(row) if row.duration_s is None else row.duration_s
                reason = self._reason(length, self._target(row)) if training else ""
            except DataError as error:
                # An evaluation keeps it, so that it is counted where it is read.
                length, reason = 0.0, str(error) if training else ""
                unreadable = True
            if reason:
                left_out.append(LeftOut(row.key, reason, unreadable))
            else:
                kept.append(number)
                lengths.append(length)
        measured.keep()
        if not kept:
            raise DataError(
                f"none of the {len(manifest)} utterances is left; the first was left out because {left_out[0].reason}",
                where=str(manifest.path),
                fix="check filter_conf and the files, e.g. with: thawline data check",
            )
        self.manifest = manifest.keep(kept, None if all_known else lengths)
        self._seconds = lengths
        self.left_out = tuple(left_out)

    def __len__(self) -> int:
        return len(self.manifest)

    @property
    def fingerprint(self) -> str:
        """Of the utterances that are left, in their order."""
        return self.manifest.fingerprint

    def key(self, id: int) -> str:
        """The name of utterance `id`."""
        return self.manifest[id].key

    def length(self, id: int) -> float:
        """Frames of utterance `id`, at most (before the exact rounding of windows; at the slowest speed)."""
        return self.frontend.longest_frames(self._seconds[id], training=self.training)

    def read(self, id: int, epoch: int) -> SpeechSample:
        """Utterance `id`. Augmentation is keyed by the global generator of `random`, which the loader seeds.

        `epoch` is in that key. Raises DataError for an utterance that cannot be used.
        """
        row = self.manifest[id]
        conf = self.frontend
        if row.duration_s is not None and row.duration_s > LONGEST_S:
            raise DataError(
                f"{row.duration_s / 3600:.2f} hours are too much for one utterance",
                where=row.wav,
                fix=f"cut it into segments (start and end in the list) of {LONGEST_S / 3600:g} hour at most",
            )
        samples, native_hz = decode(
            row.wav, start_s=row.start_s, end_s=row.end_s, channel=conf.singal_channel_conf.channel
        )
        target = self._target(row)
        reason = self._reason(samples.size / native_hz, target) if self.training else ""
        if reason:
            raise DataError(reason, where=row.wav)
        rng = np.random.Generator(np.random.PCG64(random.getrandbits(63))) if self.training else None
        try:
            feats = conf.features_of(resample(samples, native_hz, conf.rate_hz), rng)
        except DataError as error:
            raise DataError(error.what, where=row.wav, fix=error.fix) from error
        if len(feats) == 0:
            raise DataError(f"{samples.size} samples at {native_hz} Hz are less than one frame", where=row.wav)
        if self.encoder_frames is not None and self.encoder_frames(len(feats)) == 0:
            raise DataError(f"{len(feats)} frames are too few for one frame of the encoder", where=row.wav)
        return SpeechSample(row.key, feats, target or (), row.txt, row.lang, row.task)

    def collate(self, samples: Sequence[SpeechSample]) -> SpeechBatch:
        """Pad the utterances, in their order."""
        return collate(samples)

    def _target(self, row: Utterance) -> tuple[int, ...] | None:
        return tuple(self.tokenizer.encode(row.txt)) if self.tokenizer is not None else None

    def _reason(self, seconds: float, target: tuple[int, ...] | None) -> str:
        return self.frontend.filter_conf.reason(round(seconds * 100, 3), None if target is None else len(target))


def collate(samples: Sequence[SpeechSample]) -> SpeechBatch:
    """Pad utterances to one length, features with 0 and targets with -1. Order is kept."""
    frames = [len(s.feats) for s in samples]
    tokens = [len(s.target) for s in samples]
    feats = np.zeros((len(samples), max(frames), samples[0].feats.shape[1]), np.float32)
    target = np.full((len(samples), max(tokens)), PADDING, np.int64)
    for i, s in enumerate(samples):
        feats[i, : frames[i]] = s.feats
        target[i, : tokens[i]] = s.target
    return SpeechBatch(
        keys=tuple(s.key for s in samples),
        feats=torch.from_numpy(feats),
        feats_lengths=torch.tensor(frames, dtype=torch.int64),
        target=torch.from_numpy(target),
        target_lengths=torch.tensor(tokens, dtype=torch.int64),
        texts=tuple(s.text for s in samples),
        langs=tuple(s.lang for s in samples),
        tasks=tuple(s.task for s in samples),
        weights={"utterances": float(len(samples)), "tokens": float(sum(tokens))},
    )
