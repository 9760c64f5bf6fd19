"""Long recordings in pieces that a recogniser can hold, cut where it is quiet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LONGEST_S = 60.0
"""Up to this, a recording is decoded in one piece by models whose attention sees it whole."""
WINDOW_S = 30.0
"""Pieces of a longer recording are at most this long."""

_HOP_S = 0.02
_QUIET_S = 0.2


def quiet_windows(
    samples: NDArray[np.float32], rate_hz: int, *, longest_s: float = WINDOW_S, search_s: float = 10.0
) -> list[tuple[int, int]]:
    """Ranges of samples that cover the recording: each at most `longest_s`, its end in the quietest 0.2 s of its last
    `search_s`. samples (n,) -> [(begin, end), ...] without gaps or overlaps; one range where it is short.

    Attention over T' encoder frames takes memory in proportion to T' squared; a window has no memory of the one before.
    """
    window, search = int(longest_s * rate_hz), int(search_s * rate_hz)
    hop, quiet = int(_HOP_S * rate_hz), round(_QUIET_S / _HOP_S)
    ranges: list[tuple[int, int]] = []
    begin = 0
    while len(samples) - begin > window:
        first = begin + window - search
        tail = samples[first : begin + window].astype(np.float64)
        energy = np.square(tail[: len(tail) // hop * hop].reshape(-1, hop)).sum(axis=1)
        around = np.convolve(energy, np.ones(quiet), mode="valid")
        end = first + (int(np.argmin(around)) + quiet // 2) * hop
        ranges.append((begin, end))
        begin = end
    ranges.append((begin, len(samples)))
    return ranges
