"""Global CMVN statistics of a data set: what a recogniser that starts from nothing normalises its features with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from thawline.data.speech import LeftOut, SpeechSamples
from thawline.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class CmvnSums:
    """What WeNet's tools/compute_cmvn_stats.py writes, in double precision.

    mean_stat: per bin, the sum of the features over all frames
    var_stat:  per bin, the sum of their squares
    frame_num: frames
    left_out:  recordings that could not be read; they are not in the sums
    """

    mean_stat: tuple[float, ...]
    var_stat: tuple[float, ...]
    frame_num: int
    left_out: tuple[LeftOut, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The content of a `global_cmvn` file."""
        return {"mean_stat": list(self.mean_stat), "var_stat": list(self.var_stat), "frame_num": self.frame_num}


def cmvn_sums(samples: SpeechSamples) -> CmvnSums:
    """The statistics of the features that `samples` (opened with `training=False`: no augmentation) reads.

    Raises DataError where not one recording can be read.
    """
    total = squares = np.zeros(0)
    frames = 0
    left_out: list[LeftOut] = []
    for i in range(len(samples)):
        try:
            feats = samples.read(i, 0).feats.astype(np.float64)  # (frames, bins)
        except DataError as error:
            left_out.append(LeftOut(samples.manifest[i].key, str(error), unreadable=True))
            continue
        if not frames:
            total, squares = np.zeros(feats.shape[1]), np.zeros(feats.shape[1])
        total += feats.sum(axis=0)
        squares += (feats**2).sum(axis=0)
        frames += len(feats)
    if not frames:
        raise DataError(
            f"none of the {len(samples)} recordings can be read; the first: {left_out[0].reason}",
            where=str(samples.manifest.path),
            fix="`thawline data check` lists what is wrong with them",
        )
    return CmvnSums(
        mean_stat=tuple(total.tolist()),
        var_stat=tuple(squares.tolist()),
        frame_num=frames,
        left_out=tuple(left_out),
    )
