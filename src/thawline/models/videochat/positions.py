"""Sine position tables of the vision transformer: computed, in no checkpoint.

The pretrained grid is 14 x 14 patches in 4 frames; other grids are bicubic interpolations in space, then linear in time
(`get_sinusoid_encoding_table2` in `video_chat2/models/blip2/vit.py`; its `get_sinusoid_encoding_table`, used for 224
pixels, gives the same numbers).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

GRID = 14
"""Patches along one side of the pretrained grid."""
FRAMES = 4
"""Frames of the pretrained grid."""


def video_table(frames: int, rows: int, columns: int, width: int) -> Tensor:
    """Positions of a clip of `frames` times a grid of patches: (1, frames * rows * columns, width), float32, CPU."""
    return _table(FRAMES, frames, rows, columns, width)


def image_table(rows: int, columns: int, width: int) -> Tensor:
    """Positions of one still image: (1, rows * columns, width), float32, CPU. The first frame of a clip, in effect."""
    return _table(1, 1, rows, columns, width)


@lru_cache(maxsize=32)
def _table(known_frames: int, frames: int, rows: int, columns: int, width: int) -> Tensor:
    # Outside inference mode, so that a table first needed by a generation can serve a training step later.
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        table = torch.from_numpy(_sines(known_frames * GRID * GRID, width)).float()
        table = table.reshape(known_frames, GRID, GRID, width)
        if (rows, columns) != (GRID, GRID):
            planes = table.permute(0, 3, 1, 2)
            planes = functional.interpolate(planes, size=(rows, columns), mode="bicubic", align_corners=False)
            table = planes.permute(0, 2, 3, 1)
        if frames != known_frames:
            lines = table.permute(1, 2, 3, 0).reshape(rows * columns, width, known_frames)
            lines = functional.interpolate(lines, size=frames, mode="linear")
            table = lines.reshape(rows, columns, width, frames).permute(3, 0, 1, 2)
        return table.reshape(1, frames * rows * columns, width)


def _sines(positions: int, width: int) -> npt.NDArray[np.float64]:
    # In float64, as upstream: the table must not depend on the precision of the run.
    channel = np.arange(width)
    angle: npt.NDArray[np.float64] = np.arange(positions)[:, None] / np.power(10000, 2 * (channel // 2) / width)
    angle[:, 0::2] = np.sin(angle[:, 0::2])
    angle[:, 1::2] = np.cos(angle[:, 1::2])
    return angle
