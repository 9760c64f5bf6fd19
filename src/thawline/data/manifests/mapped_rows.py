"""Rows of an Arrow table that stay on disk: an utterance is made when it is asked for, from memory-mapped columns.

What is held in memory is one number a row (which rows, how many seconds) at most. Pages of the file that were read are
given back to the system again and again, so that a process stays small whatever the table's size; they remain in the
system's file cache. A copy in another process (a loader's worker) maps the same file itself.
"""

from __future__ import annotations

import mmap
import os
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

from thawline.core.extras import need
from thawline.data.manifests.rows import absolute, nfc
from thawline.data.utterance import Utterance
from thawline.errors import DataError

FIELDS = ("key", "wav", "txt", "speaker", "start", "end", "duration", "lang", "task")
"""What a column may hold, in the order in which a table that we write has them."""

_READS = 32  # rows made between two looks at the file: at most so many pages a column are resident
_IDENTITY = tuple(FIELDS.index(f) for f in ("key", "wav", "txt", "start", "end", "duration"))
_PIECE = 65536  # rows that are looked at together when a table is checked
_SLICE = 4096  # rows that are made together when all are asked for

Stamp = tuple[int, ...]


class MappedRows(Sequence[Utterance]):
    """Utterances of a table whose buffers can be used where they lie in the file. Opened by `arrow_table.open_table`.

    path:    the table as the user named it; messages say this, and relative audio paths start at its folder
    place:   the file that is mapped: the same, or a copy in the cache
    columns: field (one of FIELDS) -> number of its column in `place`
    stamp:   what `file_stamp` must say of `place`; None takes what it says now
    """

    def __init__(
        self,
        path: Path,
        place: Path,
        columns: Mapping[str, int],
        *,
        stamp: Stamp | None = None,
        rows: array[int] | None = None,
        seconds: array[float] | None = None,
    ) -> None:
        pa = need("pyarrow", extra="tables")
        self.path = path
        self.place = place
        self.columns = dict(columns)
        self._rows = rows
        self._seconds = seconds
        self._reads = 0
        with place.open("rb") as file:
            # The descriptor is kept, so that a change of this very file is seen though its name has moved on.
            self._descriptor = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._descriptor)
            self.stamp = file_stamp(self._descriptor)
            if stamp is not None and stamp != self.stamp:
                raise _changed(path)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.reader = pa.ipc.open_file(pa.py_buffer(self._map))
        self._ends: list[int] = []
        self._cells: list[list[Any]] = []
        """Of each record batch, the array of each field in the order of FIELDS; None where there is no column."""

    def load(self) -> MappedRows:
        """Look up where the record batches lie. Raises pyarrow's errors for a file that is damaged there."""
        batches = [self.reader.get_batch(i) for i in range(self.reader.num_record_batches)]
        self._ends = list(accumulate(batch.num_rows for batch in batches))
        numbers = [self.columns.get(field) for field in FIELDS]
        self._cells = [[None if n is None else batch.column(n) for n in numbers] for batch in batches]
        return self

    @property
    def address(self) -> tuple[int, int]:
        """Where in memory the file lies: begin and end."""
        pa = need("pyarrow", extra="tables")
        begin = int(pa.py_buffer(self._map).address)
        return begin, begin + len(self._map)

    def batches(self) -> Iterator[tuple[int, list[Any]]]:
        """The whole file in pieces: the number of the first row, and its columns in the order of FIELDS."""
        begin = 0
        for end, cells in zip(self._ends, self._cells, strict=True):
            for at in range(0, end - begin, _PIECE):
                yield begin + at, [None if column is None else column.slice(at, _PIECE) for column in cells]
                self._give_back()
            begin = end

    def take(self, indices: Sequence[int], seconds: Sequence[float] | None = None) -> MappedRows:
        """These rows, in this order; `seconds` are their durations where other than the table's."""
        rows = array("q", indices if self._rows is None else (self._rows[i] for i in indices))
        if seconds is None and self._seconds is not None:
            seconds = [self._seconds[i] for i in indices]
        mine = None if seconds is None else array("d", seconds)
        # Most often all are meant; a table of all rows needs no list of them.
        every = len(rows) == (self._ends[-1] if self._ends else 0) and all(a == b for a, b in enumerate(rows))
        return _opened(self.path, self.place, self.columns, self.stamp, None if every else rows, mine)

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self.path, self.place, self.columns, self.stamp, self._rows, self._seconds)

    def __len__(self) -> int:
        if self._rows is not None:
            return len(self._rows)
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Utterance: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Utterance]: ...
    def __getitem__(self, index: int | slice) -> Utterance | Sequence[Utterance]:
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        self._count(1)
        row = number if self._rows is None else self._rows[number]
        batch = bisect_right(self._ends, row)
        at = row - (self._ends[batch - 1] if batch else 0)
        cells = [None if column is None else column[at].as_py() for column in self._cells[batch]]
        return self._made(cells, None if self._seconds is None else self._seconds[number])

    def __iter__(self) -> Iterator[Utterance]:
        for number, cells in enumerate(self._all(range(len(FIELDS)))):
            yield self._made(cells, None if self._seconds is None else self._seconds[number])

    def identities(self) -> Iterator[tuple[str, str, str, float | None, float | None]]:
        """Key, audio path, text, begin and end of every row, as its utterance has them: what a fingerprint is of."""
        root, where = self.path.parent, str(self.path)
        for key, wav, txt, start, end, duration in self._all(_IDENTITY):
            begin, stop, _ = _stretch(start, end, duration)
            yield key_of(key, wav), absolute(wav, root, where), nfc(txt or ""), begin, stop

    def _all(self, fields: Sequence[int]) -> Iterator[tuple[Any, ...]]:
        """The cells of every row in these columns."""
        for batch, rows in self._runs():
            self._count(len(rows))
            cells = self._cells[batch]
            columns = [
                [None] * len(rows) if column is None else _part(column, rows).to_pylist()
                for column in (cells[n] for n in fields)
            ]
            yield from zip(*columns, strict=True)

    def _runs(self) -> Iterator[tuple[int, range | list[int]]]:
        """All rows in order: a record batch, and some of its rows."""
        begin = 0
        if self._rows is None:
            for batch, end in enumerate(self._ends):
                for at in range(0, end - begin, _SLICE):
                    yield batch, range(at, min(at + _SLICE, end - begin))
                begin = end
            return
        run: list[int] = []
        current, begin, end = -1, 0, 0
        for row in self._rows:
            if not begin <= row < end or len(run) == _SLICE:
                if run:
                    yield current, run
                run = []
                current = bisect_right(self._ends, row)
                begin, end = self._ends[current - 1] if current else 0, self._ends[current]
            run.append(row - begin)
        if run:
            yield current, run

    def _made(self, cells: Sequence[Any], seconds: float | None) -> Utterance:
        key, wav, txt, speaker, start, end, duration, lang, task = cells
        start, end, duration = _stretch(start, end, duration)
        return Utterance(
            key=key_of(key, wav),
            wav=absolute(wav, self.path.parent, str(self.path)),
            txt=nfc(txt or ""),
            speaker=nfc(speaker or ""),
            start_s=start,
            end_s=end,
            duration_s=duration if seconds is None else seconds,
            lang=nfc(lang or ""),
            task=nfc(task or ""),
        )

    def _count(self, rows: int) -> None:
        self._reads += rows
        if self._reads >= _READS:
            self._give_back()

    def _give_back(self) -> None:
        """Let the system take the pages that were read; refuse to go on where the file is no longer what it was."""
        self._reads = 0
        if file_stamp(self._descriptor) != self.stamp:
            raise _changed(self.path)
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def key_of(key: Any, wav: str) -> str:
    """The key of a row: its cell, or, where the table has no such column, the audio path without its suffix."""
    return nfc(key) if key is not None else nfc(Path(wav).with_suffix("").as_posix())


def _stretch(start: Any, end: Any, duration: Any) -> tuple[float | None, float | None, float | None]:
    """Begin, end and duration in seconds; the third from the other two."""
    start = None if start is None else float(start)
    end = None if end is None else float(end)
    duration = None if duration is None else float(duration)
    if end is None and start is not None and duration is not None:
        end = start + duration  # NeMo writes offset and duration
    if start is not None and end is not None:
        duration = end - start
    return start, end, duration


def file_stamp(file: int | Path) -> Stamp:
    """What changes when a file is written: size in bytes, time of its content in nanoseconds. Raises OSError."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def _part(column: Any, rows: range | list[int]) -> Any:
    if isinstance(rows, range):
        return column.slice(rows.start, len(rows))
    return column.take(need("pyarrow", extra="tables").array(rows))


def _opened(
    path: Path,
    place: Path,
    columns: Mapping[str, int],
    stamp: Stamp,
    rows: array[int] | None,
    seconds: array[float] | None,
) -> MappedRows:
    try:
        return MappedRows(path, place, columns, stamp=stamp, rows=rows, seconds=seconds).load()
    except OSError as exc:
        raise DataError(f"the table cannot be read again: {exc.strerror or exc}", where=str(place)) from exc


def _changed(path: Path) -> DataError:
    return DataError(
        "the table changed while it was in use", where=str(path), fix="write a new file, and leave this one as it is"
    )
