"""Lists with named fields: WeNet's raw lists and other JSON lines, AudioFolder's metadata, Common Voice's tables."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from thawline.data.manifests.rows import TXT_NAMES, WAV_NAMES, Placed, Rows, lines_of
from thawline.errors import DataError


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no field is there twice; Python would take the last one without a word."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} is there twice")
    return fields


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def json_lines(rows: Rows, path: Path) -> Iterator[Placed]:
    """One JSON object a line."""
    for number, line in lines_of(path):
        if not line:
            continue
        where = f"{path}:{number}"
        try:
            fields = _DECODER.decode(line)
        except (
            ValueError,
            RecursionError,
        ) as exc:  # of the latter: brackets within brackets, or a number of 5000 digits
            reason = f"{exc.msg} at column {exc.colno}" if isinstance(exc, json.JSONDecodeError) else str(exc)
            rows.refuse(
                DataError(
                    f"not JSON: {reason}: {line[:60]!r}",
                    where=where,
                    fix='a line looks like {"key": "a1", "wav": "a1.wav", "txt": "hello"}',
                )
            )
            continue
        if not isinstance(fields, dict):
            rows.refuse(DataError(f"not a JSON object: {line[:60]!r}", where=where))
            continue
        row = rows.row(fields, where, path.parent)
        if row:
            yield row


def audiofolder(rows: Rows, path: Path) -> Iterator[Placed]:
    """metadata.csv or metadata.jsonl, or the folder that holds one."""
    if path.is_dir():
        found = [path / n for n in ("metadata.csv", "metadata.jsonl") if (path / n).is_file()]
        if not found:
            raise DataError("no metadata.csv or metadata.jsonl in this folder", where=str(path))
        path = found[0]
    yield from _table(rows, path, ",") if path.suffix.lower() == ".csv" else json_lines(rows, path)


def commonvoice(rows: Rows, path: Path) -> Iterator[Placed]:
    """A .tsv with its audio in clips/ beside it, and perhaps clip_durations.tsv."""
    clips = path.parent / "clips"
    durations: dict[str, float] = {}
    measured = path.parent / "clip_durations.tsv"
    if measured.is_file():
        for _, line in lines_of(measured):
            clip, _, milliseconds = line.partition("\t")
            if milliseconds.isdigit():
                durations[clip] = int(milliseconds) / 1000
    for where, row in _table(rows, path, "\t", root=clips if clips.is_dir() else path.parent):
        name = os.path.basename(row.wav)
        yield where, replace(row, duration_s=durations[name]) if name in durations else row


def _table(rows: Rows, path: Path, delimiter: str, root: Path | None = None) -> Iterator[Placed]:
    lines = list(lines_of(path, strip="\r\n"))  # an empty first cell must stay one
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    # A quoted field may hold a line break, so the reader sees whole text and tells its line numbers.
    table = csv.reader(
        io.StringIO("\n".join(line for _, line in lines)), delimiter=delimiter, quoting=quoting, strict=True
    )
    header: list[str] | None = None
    for where, cells in _cells_of(table, path):
        if not cells or not any(cells):
            continue
        if header is None:
            header = [c.strip() for c in cells]
            for names, what in ((WAV_NAMES, "audio path"), (TXT_NAMES, "text")):
                if not set(names) & set(header) and (what != "text" or rows.text_required):
                    raise DataError(
                        f"no column with the {what}; the columns are {', '.join(header)}",
                        where=where,
                        fix=f"name it one of: {', '.join(names)}",
                    )
            twice = next((name for name in header if header.count(name) > 1 and name), None)
            if twice is not None:
                raise DataError(f"two columns are called {twice!r}", where=where, fix="rename or remove one of them")
            continue
        if len(cells) > len(header):
            rows.refuse(DataError(f"{len(cells)} cells in a table of {len(header)} columns", where=where))
            continue
        row = rows.row(dict(zip(header, cells, strict=False)), where, root or path.parent)
        if row:
            yield row


def _cells_of(table: Any, path: Path) -> Iterator[tuple[str, list[str]]]:
    """Where each row of a csv reader ends, and its cells. Raises DataError for quotes that do not close."""
    begin = 1
    while True:
        try:
            cells = next(table, None)
        except csv.Error as exc:
            what = "a quoted cell does not end" if "unexpected end" in str(exc) else str(exc)
            raise DataError(
                f"not a table from here: {what}",
                where=f"{path}:{begin}",
                fix='close the quote; a quote inside a quoted cell is written twice ("")',
            ) from exc
        if cells is None:
            return
        yield f"{path}:{table.line_num}", cells
        begin = table.line_num + 1
