"""How long recordings are, remembered from one run to the next: a list that does not say is measured once.

What is remembered of a file counts only while its size and times are what they were when it was measured. A file that
was written less than two seconds before may still be written within one tick of its clock, and is not remembered. Times
are kept to the last bit: batches are cut by them.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from thawline.data import byte_range, cache
from thawline.data.audio import stretch_s, whole_s
from thawline.data.utterance import TarRef, Utterance, is_url, pipe_command

_KIND = "durations 1"
_FRESH_NS = 2_000_000_000
WORTH_KEEPING = 64
"""Fewer measurements than this are not written down: they take less time than a file is worth."""


class Durations:
    """Durations of the recordings of one list.

    place: the file that keeps them; None remembers nothing
    measured: how many headers were read
    """

    def __init__(self, place: Path | None) -> None:
        self.place = place
        self.measured = 0
        self._stamps: dict[str, tuple[object, ...] | None] = {}
        self._used: dict[str, list[object]] = {}
        self._known: dict[str, list[object]] | None = None

    @classmethod
    def of(cls, manifest: Path) -> Durations:
        """Those of the list at `manifest`, in the user's cache folder."""
        home = cache.folder()
        return cls(None if home is None else home / "durations" / f"{cache.name_for(manifest)}.json")

    def seconds(self, row: Utterance) -> float:
        """Seconds of `row`, from its header or from memory. Raises DataError as `audio.duration_s` does."""
        stamp = self._stamp(row.wav)
        if stamp is None:
            self.measured += 1
            return stretch_s(row, whole_s(row.wav))
        for source in (self._used, self._remembered()):
            found = source.get(row.wav)
            if found is not None and found[:-1] == list(stamp):
                self._used[row.wav] = found
                return stretch_s(row, _number(found[-1]))
        self.measured += 1
        whole = whole_s(row.wav)
        if self._stamp(row.wav, again=True) == stamp:
            self._used[row.wav] = [*stamp, whole]
        return stretch_s(row, whole)

    def keep(self) -> None:
        """Write down what was measured, where that is worth it and possible. Writers may do so at the same time: the
        last one's file stays, whole."""
        if self.place is None or self.measured < WORTH_KEEPING:
            return
        now = time.time_ns()
        settled = {wav: row for wav, row in self._used.items() if not _is_fresh(row, now)}
        if settled:
            cache.keep(self.place, _KIND, settled)

    def _remembered(self) -> dict[str, list[object]]:
        if self._known is None:
            found = None if self.place is None else cache.kept(self.place, _KIND)
            self._known = found if isinstance(found, dict) else {}
        return self._known

    def _stamp(self, wav: str, *, again: bool = False) -> tuple[object, ...] | None:
        """What changes when the file is written; None where that cannot be known."""
        ref = TarRef.parse(wav)
        place = ref.tar if ref else wav
        if again or place not in self._stamps:
            if len(self._stamps) > 4096 and ref is None:
                self._stamps.clear()  # each recording has its own file; only shards come again
            self._stamps[place] = _stamp_of(place)
        return self._stamps[place]


def _stamp_of(place: str) -> tuple[object, ...] | None:
    if pipe_command(place) is not None:
        return None
    if is_url(place):
        return byte_range.stamp(place)
    try:
        status = os.stat(place)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _is_fresh(row: list[object], now_ns: int) -> bool:
    times = [t for t in row[1:-1] if isinstance(t, int)]
    return any(t > now_ns - _FRESH_NS for t in times)


def _number(value: object) -> float:
    assert isinstance(value, (int, float))  # the file carries its digest, so it is what `keep` wrote
    return float(value)
