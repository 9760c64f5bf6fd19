"""Global mean and variance normalisation of the features, from WeNet's two kinds of statistics files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from thawline.errors import DataError

_VARIANCE_FLOOR = 1.0e-20


@dataclass(frozen=True, slots=True, kw_only=True)
class CmvnStatistics:
    """Per feature bin: the mean and one over the standard deviation."""

    mean: tuple[float, ...]
    istd: tuple[float, ...]


class GlobalCMVN(nn.Module):
    """(x - mean) * istd; both are buffers and travel in the checkpoint."""

    mean: Tensor
    istd: Tensor

    def __init__(self, size: int, statistics: CmvnStatistics | None = None) -> None:
        """Without statistics the buffers are NaN: they must come from a checkpoint, and forgetting that shows at
        once."""
        super().__init__()
        if statistics is not None and len(statistics.mean) != size:
            raise DataError(
                f"the CMVN statistics are for {len(statistics.mean)} bins, the model takes {size}",
                fix="compute them anew from features of this model's settings",
            )
        nan = [math.nan] * size
        self.register_buffer("mean", torch.tensor(statistics.mean if statistics else nan).float())
        self.register_buffer("istd", torch.tensor(statistics.istd if statistics else nan).float())

    def forward(self, feats: Tensor) -> Tensor:
        """feats (batch, frames, bins) -> the same shape."""
        return (feats - self.mean) * self.istd


def read_cmvn(path: Path, *, is_json: bool) -> CmvnStatistics:
    """Statistics from WeNet's JSON (mean_stat, var_stat, frame_num) or from Kaldi's text form.

    Both hold sums of x and of x squared and a frame count. Raises DataError, naming the file, where it is neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise DataError(
            "this is Kaldi's binary form of CMVN statistics, or not a text file",
            where=str(path),
            fix="compute-cmvn-stats --binary=false scp:feats.scp global_cmvn",
        ) from exc
    except OSError as exc:
        raise DataError(f"the CMVN file cannot be read: {exc.strerror}", where=str(path)) from exc
    if text.startswith("\0B"):
        raise DataError(
            "this is Kaldi's binary form of CMVN statistics",
            where=str(path),
            fix="compute-cmvn-stats --binary=false scp:feats.scp global_cmvn",
        )
    try:
        sums, squares, count = _parse_json(text) if is_json else _parse_kaldi(text)
        return _normalise(sums, squares, count)
    except (ValueError, KeyError, TypeError, ZeroDivisionError, IndexError) as exc:
        raise DataError(
            f"these are not {'JSON' if is_json else 'Kaldi text'} CMVN statistics: {exc}",
            where=str(path),
            fix=f"check cmvn_conf.is_json_cmvn (it says {str(is_json).lower()})",
        ) from exc


def _parse_json(text: str) -> tuple[Sequence[float], Sequence[float], float]:
    values = json.loads(text)
    return values["mean_stat"], values["var_stat"], float(values["frame_num"])


def _parse_kaldi(text: str) -> tuple[Sequence[float], Sequence[float], float]:
    """`[ sum_1 .. sum_n count` and, on the next line, `squares_1 .. squares_n 0 ]`."""
    words = text.split()
    if len(words) < 6 or words[0] != "[" or words[-1] != "]" or len(words) % 2:
        raise ValueError("no matrix of two rows in brackets")
    numbers = [float(w) for w in words[1:-1]]
    width = len(numbers) // 2
    if numbers[-1] != 0:
        raise ValueError(f"the second row ends in {numbers[-1]}, not in 0")
    return numbers[: width - 1], numbers[width:-1], numbers[width - 1]


def _normalise(sums: Sequence[float], squares: Sequence[float], count: float) -> CmvnStatistics:
    if len(sums) != len(squares):
        raise ValueError(f"{len(sums)} sums and {len(squares)} sums of squares")
    # Plain float arithmetic in WeNet's order (wenet/utils/cmvn.py), so that the float32 buffers are bitwise the same.
    mean = [s / count for s in sums]
    istd = [1.0 / math.sqrt(max(q / count - m * m, _VARIANCE_FLOOR)) for m, q in zip(mean, squares, strict=True)]
    return CmvnStatistics(mean=tuple(mean), istd=tuple(istd))
