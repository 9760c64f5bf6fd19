"""Any manifest as an Arrow or Parquet table: rows that stay on disk, and durations that nobody has to measure again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from thawline.core.extras import need
from thawline.data.manifests.arrow_copy import BATCH_ROWS
from thawline.data.manifests.mapped_rows import FIELDS
from thawline.data.utterance import Utterance, is_url, pipe_command
from thawline.errors import DataError

_TIMES = ("start", "end", "duration")
_SUFFIXES = {".arrow": False, ".feather": False, ".ipc": False, ".parquet": True, ".pq": True}


@dataclass(frozen=True, slots=True)
class TableReport:
    """What was written. unmeasured: key and reason of the rows whose duration stays open, because a file is bad."""

    rows: int
    seconds: float
    unmeasured: tuple[tuple[str, str], ...]


def is_parquet(out: Path) -> bool:
    """Which of the two `out` asks for by its suffix. Raises DataError for any other."""
    if out.suffix.lower() not in _SUFFIXES:
        raise DataError(
            f"the suffix {out.suffix!r} does not say which kind of table is meant",
            where=str(out),
            fix=".arrow is read where it lies; .parquet is smaller, and copied before it is read",
        )
    return _SUFFIXES[out.suffix.lower()]


def write_table(
    rows: Sequence[Utterance],
    file: BinaryIO,
    *,
    folder: Path,
    parquet: bool = False,
    seconds: Callable[[Utterance], float] | None = None,
) -> TableReport:
    """Write the utterances of a manifest to `file`, a batch at a time.

    folder:  where the table will lie: audio below it is named relative to it, so that both can be moved together
    seconds: measures a row without a duration; one that it refuses (DataError) is kept with none. None measures nothing

    Raises DataError for a row that a table cannot hold: sound that a shell command makes.
    """
    pa = need("pyarrow", extra="tables")
    schema = pa.schema([(f, pa.float64() if f in _TIMES else pa.string()) for f in FIELDS])
    prefix = str(folder).rstrip("/") + "/"
    unmeasured: list[tuple[str, str]] = []
    total = 0.0

    def cells() -> Iterator[tuple[object, ...]]:
        nonlocal total
        for row in rows:
            if pipe_command(row.wav) is not None:
                raise DataError(
                    f"the sound of {row.key!r} is made by a shell command, which a table does not hold",
                    where=row.wav,
                    fix="run the commands once, and list the files that they make",
                )
            length = row.duration_s
            if length is None and seconds is not None:
                try:
                    length = seconds(row)
                except DataError as error:
                    unmeasured.append((row.key, str(error)))
            total += length or 0.0
            wav = row.wav if is_url(row.wav) else row.wav.removeprefix(prefix)
            yield row.key, wav, row.txt, row.speaker, row.start_s, row.end_s, length, row.lang, row.task

    count = 0
    opened: Any = need("pyarrow.parquet", extra="tables").ParquetWriter if parquet else pa.ipc.new_file
    with opened(file, schema) as writer:
        for batch in _batched(cells()):
            try:
                columns = [
                    pa.array(column, field.type) for column, field in zip(zip(*batch, strict=True), schema, strict=True)
                ]
            except UnicodeEncodeError as exc:
                raise DataError(
                    f"a table holds Unicode only, and this name is none: {exc.object!r}", fix="rename the file"
                ) from exc
            writer.write_batch(pa.record_batch(columns, schema=schema))
            count += len(batch)
    return TableReport(count, total, tuple(unmeasured))


def _batched(rows: Iterator[tuple[object, ...]]) -> Iterator[list[tuple[object, ...]]]:
    batch: list[tuple[object, ...]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch
