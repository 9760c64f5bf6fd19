"""Transcripts as a recogniser has to learn them: what its units cannot spell, and what CTC has too few frames for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

from thawline.data.speech import SpeechSamples

_SHOWN = 8


def ctc_frames_needed(ids: Sequence[int]) -> int:
    """Encoder frames that CTC needs at least: one per token, and a blank between two equal ones."""
    return len(ids) + sum(a == b for a, b in pairwise(ids))


def conv2d_frames(frames: int) -> int:
    """Encoder frames after WeNet's usual subsampling by 4: two convolutions of 3 frames in steps of 2."""
    return max(0, ((frames - 1) // 2 - 1) // 2)


def what_is_not_learnt(
    samples: SpeechSamples, *, encoder_frames: Callable[[int], int] | None = None
) -> tuple[str, ...]:
    """One sentence for each thing in the transcripts of `samples` that training would pass over in silence.

    encoder_frames: of so many input frames; None for a model without CTC. The CTC loss of a target that needs more of
    them is zero. Lengths are those of the recordings as they are: at a higher speed there are fewer frames still.
    """
    if samples.tokenizer is None:
        return ()
    unknown: Counter[str] = Counter()
    total, too_long, first = 0, 0, ""
    for row in samples.manifest:
        ids = samples.tokenizer.encode(row.txt)
        total += len(ids)
        unknown.update(samples.tokenizer.unknown(row.txt))
        if encoder_frames is not None:
            frames = encoder_frames(samples.frontend.n_frames(row.duration_s or 0.0))
            needed = ctc_frames_needed(ids)
            if needed > frames:
                too_long += 1
                first = first or f"{row.key}: {len(ids)} tokens need {needed} encoder frames, it has {frames}"
    notes: list[str] = []
    if unknown:
        often = ", ".join(f"{token!r} {n}" for token, n in unknown.most_common(_SHOWN))
        notes.append(f"{unknown.total()} of {total} tokens are outside the vocabulary and become <unk>: {often}")
    if too_long:
        notes.append(
            f"{too_long} of {len(samples)} targets are longer than CTC can align, and teach CTC nothing; the first, "
            f"{first}"
        )
    return tuple(notes)
