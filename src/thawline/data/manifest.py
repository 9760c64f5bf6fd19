"""What utterances there are: lists and folders of many kinds become one sequence of plain rows.

Formats: WeNet raw lists and shard (tar) lists, Kaldi directories, Hugging Face AudioFolder, Common Voice tables, a
plain folder with `.txt` beside the audio, JSON lines, Arrow and Parquet tables; `manifests/` has a reader for each. No
audio is decoded here and torch is not imported; tar shards are indexed once, so that a sample is later read by offset;
the rows of a table stay on disk.

A present but empty text is kept (silence may be meant); a missing one is an error unless `text="optional"`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, overload

from blake3 import blake3

from thawline.data.manifests import arrow_table, folder, kaldi, shards, tables
from thawline.data.manifests.mapped_rows import MappedRows
from thawline.data.manifests.rows import Placed, Report, Rows, missing
from thawline.data.manifests.sniff import FORMATS, sniff
from thawline.data.utterance import TarRef, Utterance, pipe_command
from thawline.errors import DataError

Format = Literal["auto", "raw", "shard", "kaldi", "audiofolder", "commonvoice", "folder", "jsonl", "arrow", "parquet"]

_HASHED_TOGETHER = 1024  # rows
_quoted = json.encoder.encode_basestring  # as JSON, letters outside of ASCII as they are

_READERS: Mapping[str, Callable[[Rows, Path], Iterator[Placed]]] = {
    "raw": tables.json_lines,
    "shard": shards.shards,
    "kaldi": kaldi.kaldi,
    "audiofolder": tables.audiofolder,
    "commonvoice": tables.commonvoice,
    "folder": folder.folder,
    "jsonl": tables.json_lines,
}


class Manifest(Sequence[Utterance]):
    """Utterances in the order of their list; immutable. Those of a table stay on disk until they are asked for.

    path:        the list or folder it was read from
    format:      which of FORMATS it was
    fingerprint: BLAKE3 over every row (key, path below the list's folder, text, stretch); the same data moved to
                 another folder, or written as another format beside it, keeps its fingerprint
    """

    __slots__ = ("_fingerprint", "_rows", "format", "path")

    def __init__(self, rows: Iterable[Utterance], *, path: Path, format: str) -> None:
        self._rows: Sequence[Utterance] = rows if isinstance(rows, MappedRows) else tuple(rows)
        self.path = path
        self.format = format
        self._fingerprint = ""

    @property
    def fingerprint(self) -> str:
        if not self._fingerprint:
            self._fingerprint = _fingerprint(self._rows, self.path if self.path.is_dir() else self.path.parent)
        return self._fingerprint

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Utterance: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Utterance]: ...
    def __getitem__(self, index: int | slice) -> Utterance | Sequence[Utterance]:
        return self._rows[index]

    def __iter__(self) -> Iterator[Utterance]:
        return iter(self._rows)

    def __repr__(self) -> str:
        return f"Manifest({self.path}, {self.format}, {len(self)} utterances)"

    def keep(self, indices: Sequence[int], seconds: Sequence[float] | None = None) -> Manifest:
        """A manifest of these rows, in this order; `seconds` are their durations where the list's are not meant."""
        if isinstance(self._rows, MappedRows):
            return Manifest(self._rows.take(indices, seconds), path=self.path, format=self.format)
        rows = [self._rows[i] for i in indices]
        if seconds is not None:
            rows = [
                row if row.duration_s == length else replace(row, duration_s=length)
                for row, length in zip(rows, seconds, strict=True)
            ]
        return Manifest(rows, path=self.path, format=self.format)


def read_manifest(
    path: Path,
    *,
    format: Format = "auto",
    text: Literal["required", "optional"] = "required",
    allow_pipes: bool = False,
    cache: Path | None = None,
    report: Report | None = None,
) -> Manifest:
    """Read the utterances that `path` (a file or a folder) lists.

    format:      one of FORMATS, or "auto" to tell by content
    text:        "required" makes a row without text an error; "optional" is for recognition without references
    allow_pipes: a Kaldi wav.scp may name shell commands; they run when read, so they are refused unless allowed
    cache:       folder for the indexes of tar shards and for copies of tables that cannot be mapped; None is beside
                 each shard, for remote shards and tables the user's cache folder. A folder that cannot be written is
                 left alone, and the work is done again next time
    report:      called with each bad row, which is then left out; None raises at the first one

    Raises DataError (exit code 3): nothing there (with near names), no known format (with those looked for), empty, not
    UTF-8, a bad row, two rows of one key; always with file:line.
    """
    path = Path(path)
    if not path.exists():
        raise missing(path)
    absolute = Path(os.path.abspath(path))
    kind: str = format
    if format == "auto":
        absolute, kind = sniff(absolute)
    elif format not in FORMATS:
        raise DataError(f"there is no data format {format!r}", fix=f"one of: {', '.join(FORMATS)}")
    refused: list[DataError] = []

    def refuse(error: DataError) -> None:
        refused.append(error)
        if report is None:
            raise error
        report(error)

    reader = Rows(text == "required", allow_pipes, cache, refuse)
    rows: Sequence[Utterance]
    if kind in ("arrow", "parquet"):
        rows = arrow_table.open_table(reader, absolute, cache=cache)
    else:
        rows = list(reader.unique(_READERS[kind](reader, absolute)))
    if not rows and refused:
        raise DataError(
            f"none of its {len(refused)} rows can be used; the first: {refused[0].what}",
            where=refused[0].where,
            fix=refused[0].fix,
        )
    if not rows:
        raise DataError(
            f"there are no utterances in this {FORMATS[kind].split(':')[0]}",
            where=str(path),
            fix="check that the list was written, and that its audio lies where it says",
        )
    _check_root(rows, absolute)
    return Manifest(rows, path=absolute, format=kind)


def fill_durations(
    manifest: Manifest, measure: Callable[[Utterance], float], *, report: Report | None = None
) -> Manifest:
    """The same manifest with `duration_s` of every row known; `measure` (`audio.duration_s`) reads one header.

    Rows that cannot be measured are given to `report` and left out; without `report` the first one raises.
    """
    kept: list[int] = []
    seconds: list[float] = []
    for number, row in enumerate(manifest):
        try:
            length = measure(row) if row.duration_s is None else row.duration_s
        except DataError as error:
            if report is None:
                raise
            report(error)
            continue
        kept.append(number)
        seconds.append(length)
    return manifest.keep(kept, seconds)


def _check_root(rows: Sequence[Utterance], path: Path) -> None:
    """Refuse a list none of whose first files exists: the folder is wrong, not a sample."""
    probe = [rows[i].wav for i in range(min(16, len(rows)))]
    if any(TarRef.parse(w) or pipe_command(w) or os.path.exists(w) for w in probe):
        return
    wav = Path(probe[0])
    nearest = wav
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    raise DataError(
        f"none of the first {len(probe)} audio files exists; of {str(wav)!r} there is {str(nearest)!r}",
        where=str(path),
        fix=f"relative paths in it start at {path if path.is_dir() else path.parent}; move the list or rewrite them",
    )


def _fingerprint(rows: Iterable[Utterance], root: Path) -> str:
    identities = (
        rows.identities() if isinstance(rows, MappedRows) else ((r.key, r.wav, r.txt, r.start_s, r.end_s) for r in rows)
    )
    digest = blake3()
    prefix = str(root).rstrip("/") + "/"
    lines: list[str] = []
    for key, wav, txt, start, end in identities:
        # What json.dumps gives for the five, in a third of its time: a corpus has millions.
        texts = ", ".join((_quoted(key), _quoted(wav.removeprefix(prefix)), _quoted(txt)))
        lines.append(f"[{texts}, {'null' if start is None else repr(start)}, {'null' if end is None else repr(end)}]\n")
        if len(lines) == _HASHED_TOGETHER:
            digest.update("".join(lines).encode("utf-8", "surrogatepass"))
            lines.clear()
    digest.update("".join(lines).encode("utf-8", "surrogatepass"))
    return str(digest.hexdigest())
