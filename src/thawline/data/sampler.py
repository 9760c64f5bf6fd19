"""Which samples form which batch: a pure function of (seed, epoch, position), never a history.

An epoch is a permutation of the sample ids that is computed per position (a keyed Feistel network with cycle walking,
no list of n anywhere), cut into windows of a fixed number of positions. Inside a window samples are sorted by length,
cut into batches, and the batches put into a keyed order. So a position is (epoch, window, batch), and reaching it costs
one window, wherever it lies. Nothing is read here; lengths come from the caller. This module does not import torch.

The permutation is Black and Rogaway's generalised Feistel construction over Z_a x Z_b ("Ciphers with arbitrary finite
domains", 2002, section 4) with a * b barely above n, so that a walk out of the domain happens about once in sqrt(n).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from thawline.core.config import Strict
from thawline.core.rng import derive
from thawline.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DEFAULT_WINDOW = 4096
"""Positions per window: wide enough to sort similar lengths together, planned in a few milliseconds."""

_ROUNDS = 8
_PLANNED_WINDOWS = 4  # kept in memory: the current one and those a look-ahead or a retry touches


@dataclass(frozen=True, order=True, slots=True)
class Cursor:
    """The position of one batch.

    epoch:  whole passes over the data before this one
    window: windows of this epoch before this one
    batch:  batches of this window before this one, in the order in which they are read
    """

    epoch: int = 0
    window: int = 0
    batch: int = 0


class Batching(Strict):
    """How samples become batches: exactly one of a count, a bound on padded frames, or length buckets."""

    size: int | None = Field(default=None, ge=1)
    """Samples per batch. 8 where nothing else is given. Only the last batch of an epoch may be smaller."""

    frames: int | None = Field(default=None, ge=1)
    """At most this many frames per batch after padding (longest sample x samples; 10 ms each). A single sample that
    is longer makes a batch of its own, so memory is bounded by the longest sample. Bounds neither attention, which is
    quadratic in length, nor label length: set filter_conf for those."""

    bucket_boundaries: tuple[int, ...] = ()
    """Ascending lengths in frames; bucket i holds lengths below boundary i and not below boundary i - 1."""

    bucket_sizes: tuple[int, ...] = ()
    """Samples per batch in each bucket: one more entry than boundaries, the last for the longest samples."""

    sort: bool = True
    """Sort by length inside a window before cutting, so that a batch holds similar lengths. Has no effect on an
    evaluation plan, which keeps the manifest's order."""

    @model_validator(mode="after")
    def _one_way(self) -> Batching:
        ways = [self.size is not None, self.frames is not None, bool(self.bucket_boundaries)]
        if sum(ways) > 1:
            raise ValueError("give one of size, frames and bucket_boundaries, not several")
        if self.bucket_sizes and not self.bucket_boundaries:
            raise ValueError("bucket_sizes needs bucket_boundaries")
        if self.bucket_boundaries:
            if list(self.bucket_boundaries) != sorted(set(self.bucket_boundaries)):
                raise ValueError("bucket_boundaries must ascend")
            if len(self.bucket_sizes) != len(self.bucket_boundaries) + 1:
                raise ValueError(
                    f"{len(self.bucket_boundaries)} bucket_boundaries need "
                    f"{len(self.bucket_boundaries) + 1} bucket_sizes, not {len(self.bucket_sizes)}"
                )
            if min(self.bucket_sizes) < 1:
                raise ValueError("bucket_sizes must be at least 1")
        return self

    @property
    def static_size(self) -> int | None:
        """Samples per batch where that is fixed, else None."""
        if self.frames is not None or self.bucket_boundaries:
            return None
        return 8 if self.size is None else self.size


class Permutation:
    """A keyed permutation of range(n), computed per index: O(1) memory, any index at the same cost.

    >>> sorted(Permutation(5, key=1)(range(5)).tolist())
    [0, 1, 2, 3, 4]
    """

    def __init__(self, n: int, *, key: int) -> None:
        if n < 0:
            raise ValueError(f"a permutation of {n} items")
        self.n = n
        # isqrt, not a float root: exact for any n
        self._left = max(1, math.isqrt(max(n - 1, 0)) + 1)
        self._right = max(1, -(-n // self._left))
        self._keys = [derive(key, "feistel", r) for r in range(_ROUNDS)]

    def __call__(self, indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Images of `indices`, each in range(n). Shape (k,) in, (k,) int64 out. Raises IndexError outside range(n)."""
        import numpy as np

        asked = np.asarray(indices, dtype=np.int64)
        if asked.size == 0:
            return asked.copy()
        if int(asked.min()) < 0 or int(asked.max()) >= self.n:
            raise IndexError(f"indices must lie in range({self.n})")
        x = self._rounds(asked.astype(np.uint64))
        # Cycle walking: what fell outside range(n) is permuted again until it falls inside.
        outside = np.flatnonzero(x >= self.n)
        while outside.size:
            x[outside] = self._rounds(x[outside])
            outside = outside[x[outside] >= self.n]
        return x.astype(np.int64)

    def _rounds(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        import numpy as np

        left_size, right_size = np.uint64(self._left), np.uint64(self._right)
        left, right = x // right_size, x % right_size
        for r, key in enumerate(self._keys):
            if r % 2 == 0:
                left = (left + _mix(right, key) % left_size) % left_size
            else:
                right = (right + _mix(left, key) % right_size) % right_size
        return left * right_size + right


def _mix(values: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """Keyed hash of each value to 53 bits: the finaliser of splitmix64 (Steele, Lea and Flood 2014).

    Own arithmetic and not numpy's Generator, whose streams may change between numpy versions.
    """
    import numpy as np

    z = (values + np.uint64(key)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) >> np.uint64(11)


class BatchPlan:
    """Batches of sample ids 0..n-1, each id once per epoch, at any position without going through those before it.

    n:        number of samples, at least 1
    seed:     the run's seed; orders are derived from (seed, epoch, window)
    batching: how a window is cut
    length:   frames of sample i, by call or by index; needed unless batches are static and unsorted (or `shuffle` is
              False and batches are static). Must be the same for the whole run
    shuffle:  False keeps the manifest's order throughout: no permutation, no sorting, no reordering of batches
    window:   positions per window; rounded up to whole batches where their size is fixed. Sorting, cutting and the
              order of batches happen inside a window; memory is O(window)

    With fixed sizes everything is O(1) in the position. With frames or buckets `batches`, `batch` and `next_cursor` are
    too, since a Cursor is what a checkpoint keeps; only `batches_in_epoch` and `cursor_at` have to count the batches of
    the windows they pass (once per epoch, then remembered: one integer per window).
    """

    def __init__(
        self,
        n: int,
        *,
        seed: int,
        batching: Batching,
        length: Callable[[int], float] | Sequence[float] | NDArray[Any] | None,
        shuffle: bool = True,
        window: int = DEFAULT_WINDOW,
    ) -> None:
        if n < 1:
            raise DataError("there are no samples to make batches of", fix="check the data list and filter_conf")
        if window < 1:
            raise ValueError(f"a window of {window} positions")
        self.n = n
        self.seed = seed
        self.batching = batching
        self.shuffle = shuffle
        size = batching.static_size
        self.window = window if size is None else -(-window // size) * size
        self.windows = -(-n // self.window)
        """Windows per epoch."""
        self._sorts = batching.sort and shuffle
        if length is None and size is None:
            raise ValueError("batches by frames or buckets need the length of each sample")
        if length is None:
            self._sorts = False
        self._length = length
        self._planned: OrderedDict[tuple[int, int], tuple[tuple[int, ...], ...]] = OrderedDict()
        self._ends: OrderedDict[int, tuple[int, ...]] = OrderedDict()
        self._order: tuple[int, Permutation] | None = None

    def batches(self, cursor: Cursor) -> Iterator[tuple[Cursor, tuple[int, ...]]]:
        """Each batch from `cursor` to the end of its epoch, with its own position."""
        first = cursor.batch
        for window in range(cursor.window, self.windows):
            plan = self._plan(cursor.epoch, window)
            for batch in range(first, len(plan)):
                yield Cursor(cursor.epoch, window, batch), plan[batch]
            first = 0

    def batch(self, cursor: Cursor) -> tuple[int, ...]:
        """Ids of the batch at `cursor`. Raises DataError where there is no such batch."""
        if 0 <= cursor.window < self.windows:
            plan = self._plan(cursor.epoch, cursor.window)
            if 0 <= cursor.batch < len(plan):
                return plan[cursor.batch]
        raise DataError(
            f"{cursor} is outside this plan of {self.n} samples in {self.windows} windows",
            fix="the data list or the batch settings differ from those the position was recorded with",
        )

    def next_cursor(self, cursor: Cursor) -> Cursor:
        """The position after `cursor`; after the last batch of an epoch, the first of the next epoch."""
        if cursor.batch + 1 < len(self._plan(cursor.epoch, cursor.window)):
            return Cursor(cursor.epoch, cursor.window, cursor.batch + 1)
        if cursor.window + 1 < self.windows:
            return Cursor(cursor.epoch, cursor.window + 1, 0)
        return Cursor(cursor.epoch + 1, 0, 0)

    def batches_in_epoch(self, epoch: int) -> int:
        """Number of batches of `epoch`; differs between epochs where batches are cut by frames or buckets."""
        size = self.batching.static_size
        if size is not None:
            return -(-self.n // size)
        return self._window_ends(epoch)[-1]

    def cursor_at(self, epoch: int, index: int) -> Cursor:
        """Position of batch `index` of `epoch`; `index` = batches_in_epoch gives the first of the next epoch."""
        total = self.batches_in_epoch(epoch)
        if not 0 <= index <= total:
            raise DataError(f"epoch {epoch} has {total} batches; there is no batch {index}")
        if index == total:
            return Cursor(epoch + 1, 0, 0)
        size = self.batching.static_size
        if size is not None:
            return Cursor(epoch, *divmod(index, self.window // size))
        ends = self._window_ends(epoch)
        window = bisect_right(ends, index)
        return Cursor(epoch, window, index - (ends[window - 1] if window else 0))

    def index_of(self, cursor: Cursor) -> int:
        """How many batches of its epoch lie before `cursor`: the inverse of `cursor_at`."""
        size = self.batching.static_size
        if size is not None:
            return cursor.window * (self.window // size) + cursor.batch
        return (self._window_ends(cursor.epoch)[cursor.window - 1] if cursor.window else 0) + cursor.batch

    def _window_ends(self, epoch: int) -> tuple[int, ...]:
        if epoch not in self._ends:
            counts = (len(self._cut(epoch, w)) for w in range(self.windows))
            self._ends[epoch] = tuple(accumulate(counts))
            while len(self._ends) > _PLANNED_WINDOWS:
                self._ends.popitem(last=False)
        return self._ends[epoch]

    def _plan(self, epoch: int, window: int) -> tuple[tuple[int, ...], ...]:
        """The batches of one window in reading order."""
        at = (epoch, window)
        if at in self._planned:
            self._planned.move_to_end(at)
            return self._planned[at]
        batches = self._cut(epoch, window)
        if self.shuffle:
            import numpy as np

            # A key per batch, sorted: a shuffle that does not depend on a library's generator. The last batch of the
            # epoch may be smaller; it moves as the others do, so no position is special.
            key = derive(self.seed, "batches", epoch, window)
            order = np.argsort(_mix(np.arange(len(batches), dtype=np.uint64), key), kind="stable")
            batches = tuple(batches[i] for i in order)
        self._planned[at] = batches
        while len(self._planned) > _PLANNED_WINDOWS:
            self._planned.popitem(last=False)
        return batches

    def _cut(self, epoch: int, window: int) -> tuple[tuple[int, ...], ...]:
        """The batches of one window before their order is shuffled."""
        import numpy as np

        begin = window * self.window
        ids = np.arange(begin, min(begin + self.window, self.n), dtype=np.int64)
        if self.shuffle:
            ids = self._permutation(epoch)(ids)
        size = self.batching.static_size
        lengths = self._lengths(ids) if self._sorts or size is None else np.zeros(0)
        if self._sorts:
            order = np.argsort(lengths, kind="stable")
            ids, lengths = ids[order], lengths[order]
        rows = ids.tolist()
        if size is not None:
            return tuple(tuple(rows[i : i + size]) for i in range(0, len(rows), size))
        if self.batching.frames is not None:
            ends = _ends_by_frames(lengths.tolist(), self.batching.frames)
            return tuple(tuple(rows[a:b]) for a, b in zip([0, *ends], ends, strict=False))
        return self._buckets(rows, lengths)

    def _permutation(self, epoch: int) -> Permutation:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, Permutation(self.n, key=derive(self.seed, "shuffle", epoch))
        return self._order[1]

    def _buckets(self, rows: list[int], lengths: NDArray[np.float64]) -> tuple[tuple[int, ...], ...]:
        import numpy as np

        which = np.searchsorted(np.asarray(self.batching.bucket_boundaries), lengths, side="right").tolist()
        filling: list[list[int]] = [[] for _ in self.batching.bucket_sizes]
        out: list[tuple[int, ...]] = []
        for row, bucket in zip(rows, which, strict=True):
            filling[bucket].append(row)
            if len(filling[bucket]) == self.batching.bucket_sizes[bucket]:
                out.append(tuple(filling[bucket]))
                filling[bucket] = []
        out.extend(tuple(rest) for rest in filling if rest)
        return tuple(out)

    def _lengths(self, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        import numpy as np

        if callable(self._length):
            return np.fromiter(map(self._length, ids.tolist()), dtype=np.float64, count=ids.size)
        if isinstance(self._length, np.ndarray):
            return self._length[ids].astype(np.float64)
        assert self._length is not None  # refused in __init__ wherever lengths are needed
        column = self._length
        return np.fromiter((column[i] for i in ids.tolist()), dtype=np.float64, count=ids.size)


def _ends_by_frames(lengths: Sequence[float], frames: int) -> list[int]:
    """End positions of consecutive batches whose longest sample x samples stays within `frames`."""
    ends: list[int] = []
    begin, longest = 0, 0.0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if i > begin and longest * (i - begin + 1) > frames:
            ends.append(i)
            begin, longest = i, length
    ends.append(len(lengths))
    return ends
