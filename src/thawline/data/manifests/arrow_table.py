"""Arrow and Parquet tables with a row an utterance: which column is what, and whether every cell can be used.

An uncompressed Arrow file (IPC, also called Feather 2) is mapped where it lies. Whatever cannot be (Parquet, compressed
Arrow, Arrow streams as the datasets library writes them, other types of text) is copied once by `arrow_copy`, and the
copy is mapped. All cells are looked at each time a table is opened, by Arrow's kernels and not row by row: a table that
was edited since is not trusted, and a damaged one cannot lead outside its buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from thawline.core.extras import need
from thawline.data.manifests import arrow_copy
from thawline.data.manifests.mapped_rows import FIELDS, MappedRows, key_of
from thawline.data.manifests.rows import KEY_NAMES, TXT_NAMES, WAV_NAMES, Rows, absolute
from thawline.errors import DataError

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "key": KEY_NAMES,
    "wav": WAV_NAMES,
    "txt": TXT_NAMES,
    "speaker": ("speaker", "client_id"),
    "start": ("start", "start_s", "offset"),
    "end": ("end", "end_s"),
    "duration": ("duration", "duration_s"),
    "lang": ("lang", "language", "locale"),
    "task": ("task",),
}
"""What the column of a field may be called; where a table has several of them, the first counts."""

_TIMES = ("start", "end", "duration")
_WHAT = {"wav": "audio path", "txt": "text"}


def open_table(rows: Rows, path: Path, *, cache: Path | None = None) -> MappedRows:
    """The rows of the table `path`, without those that `rows.refuse` was told of (unless it raised).

    cache: folder for copies of what cannot be mapped; None is the user's cache folder

    Raises DataError: no such columns, wrong types, damaged or cut short; MissingExtra without pyarrow.
    """
    container = arrow_copy.container_of(path)
    with _damage(path):
        schema = container.schema()
        names = columns_of(schema, path, text_required=rows.text_required)
        if need("pyarrow", extra="tables").types.is_struct(schema.field(names["wav"]).type) and container.embeds(
            names["wav"]
        ):
            raise DataError(
                f"the sound itself lies in the column {names['wav']!r} (bytes), where it is not read",
                where=str(path),
                fix="write it to files, and their paths into the column",
            )
        table = _mapped(path, path, {field: schema.names.index(name) for field, name in names.items()}, container)
        if table is None:
            copy = arrow_copy.copy_of(container, names, cache=cache)
            table = MappedRows(path, copy, {field: number for number, field in enumerate(names)}).load()
        bad = _bad_rows(table, names, rows)
    for _, error in sorted(bad.items()):
        rows.refuse(error)
    return table if not bad else table.take([i for i in range(len(table)) if i not in bad])


def columns_of(schema: Any, path: Path, *, text_required: bool) -> dict[str, str]:
    """Field -> name of its column. Raises DataError for a column that is missing, is there twice, or holds no such
    thing."""
    pa = need("pyarrow", extra="tables")
    found: dict[str, str] = {}
    for field, candidates in COLUMNS.items():
        name = next((n for n in candidates if n in schema.names), None)
        if name is None:
            if field in _WHAT and (field != "txt" or text_required):
                raise DataError(
                    f"no column with the {_WHAT[field]}; the columns are {', '.join(schema.names) or 'none'}",
                    where=str(path),
                    fix=f"name it {candidates[0]!r} (also read: {', '.join(candidates[1:])})",
                )
            continue
        if schema.names.count(name) > 1:
            raise DataError(f"{schema.names.count(name)} columns are called {name!r}", where=str(path))
        kind = schema.field(name).type
        if pa.types.is_null(kind) and field not in ("key", "wav", "txt"):
            continue  # a column of which no cell is known
        if not _fits(kind, field):
            wanted = "times in seconds" if field in _TIMES else "text"
            raise DataError(
                f"the column {name!r} holds {kind}, not {wanted}",
                where=str(path),
                fix="cast it to float64, in seconds" if field in _TIMES else "cast it to string",
            )
        found[field] = name
    return found


def _fits(kind: Any, field: str) -> bool:
    types = need("pyarrow", extra="tables").types
    if field in _TIMES:
        return bool(types.is_floating(kind) or types.is_integer(kind) or types.is_decimal(kind))
    if types.is_dictionary(kind):
        kind = kind.value_type
    if field == "key" and types.is_integer(kind):
        return True
    if field == "wav" and types.is_struct(kind):  # the datasets library writes {bytes, path}
        return any(child.name == "path" and arrow_copy.is_text(child.type) for child in kind)
    return types.is_null(kind) or arrow_copy.is_text(kind)


def _mapped(path: Path, place: Path, columns: Mapping[str, int], container: arrow_copy.Container) -> MappedRows | None:
    """The rows of a file that can be used where it lies; None where it has to be copied first."""
    if not container.may_be_mapped or not all(_plain(container.schema().field(n).type) for n in columns.values()):
        return None
    table = MappedRows(path, place, columns)
    # A compressed file is found by its first batch, before all of it is unpacked into memory.
    for number in range(table.reader.num_record_batches):
        batch = table.reader.get_batch(number)
        if batch.num_rows:
            inside = [_lies_in(batch.column(c), table.address) for c in columns.values()]
            if not all(inside):
                return None
            break
    return table.load()


def _plain(kind: Any) -> bool:
    types = need("pyarrow", extra="tables").types
    return bool(
        types.is_string(kind) or types.is_large_string(kind) or types.is_floating(kind) or types.is_integer(kind)
    )


def _lies_in(column: Any, address: tuple[int, int]) -> bool:
    return all(b is None or not b.size or address[0] <= b.address < address[1] for b in column.buffers())


# --- cells ------------------------------------------------------------------------------------------------------------


def _bad_rows(table: MappedRows, names: Mapping[str, str], rows: Rows) -> dict[int, DataError]:
    """What is wrong with a row, the first thing of each, by the row's number from 0."""
    bad: dict[int, DataError] = {}
    for begin, cells in table.batches():
        columns = dict(zip(FIELDS, cells, strict=True))
        for column in cells:
            if column is not None:
                column.validate(full=True)
        for at, what, fix in _findings(columns, names, text_required=rows.text_required):
            bad.setdefault(begin + at, DataError(what, where=_row(table.path, begin + at), fix=fix))
        for at, wav in _odd_paths(columns["wav"]):
            try:
                absolute(wav, table.path.parent, _row(table.path, begin + at))
            except DataError as error:
                bad.setdefault(begin + at, error)
    for number, key, first in _repeated(table, bad.keys()):
        what = f"the key {key!r} is there twice; first at row {first + 1}"
        bad[number] = DataError(what, where=_row(table.path, number), fix="give every utterance its own key")
    return bad


def _row(path: Path, number: int) -> str:
    return f"{path}: row {number + 1}"


def _findings(
    columns: Mapping[str, Any], names: Mapping[str, str], *, text_required: bool
) -> Iterator[tuple[int, str, str]]:
    """(row of the batch, what is wrong, the fix) of every cell that cannot be used."""
    import numpy as np

    pc = need("pyarrow.compute", extra="tables")
    types = need("pyarrow", extra="tables").types
    for field in ("key", "wav", "txt"):
        column = columns[field]
        if column is None:
            continue
        if column.null_count and (field != "txt" or text_required):
            for at in np.flatnonzero(_numbers(column.is_null())):
                yield int(at), f"the cell {names[field]!r} is null", "fill it, or leave the row out"
        if field != "txt" and not types.is_integer(column.type):
            for at in np.flatnonzero(_numbers(pc.equal(pc.binary_length(column), 0).fill_null(False))):
                yield int(at), f"the cell {names[field]!r} is empty", "fill it, or leave the row out"
    times = {}
    for field in _TIMES:
        column = columns[field]
        if column is None:
            continue
        seconds = _numbers(column.cast("float64").fill_null(0.0))
        for at in np.flatnonzero(~((seconds >= 0) & (seconds < np.inf))):
            yield int(at), f"{names[field]} is not a time in seconds: {column[int(at)].as_py()!r}", ""
        times[field] = seconds, _numbers(column.is_valid())
    if "start" in times and "end" in times:
        (start, has_start), (end, has_end) = times["start"], times["end"]
        for at in np.flatnonzero(has_start & has_end & (end <= start)):
            yield int(at), f"the stretch ends at {end[at]:g} s, before it starts at {start[at]:g} s", ""


def _numbers(array: Any) -> Any:
    return array.to_numpy(zero_copy_only=False)


def _odd_paths(wavs: Any) -> Iterator[tuple[int, str]]:
    """The audio paths that may be refused (addresses, NUL bytes), with their rows in the batch."""
    import numpy as np

    pc = need("pyarrow.compute", extra="tables")
    odd = pc.or_(pc.match_substring(wavs, "://"), pc.match_substring(wavs, "\0"))
    for at in np.flatnonzero(_numbers(odd.fill_null(False))):
        yield int(at), wavs[int(at)].as_py()


def _repeated(table: MappedRows, without: Any) -> Iterator[tuple[int, str, int]]:
    """(row, its key, the row that had it first) of every key that is there before; rows `without` do not count.

    Eight bytes a row: keys are compared by hash first, and by themselves only where hashes are equal.
    """
    import numpy as np

    hashes = np.empty(len(table), np.int64)
    for begin, keys in _keys(table):
        hashes[begin : begin + len(keys)] = np.fromiter(map(hash, keys), np.int64, len(keys))
    ordered = np.sort(hashes)
    suspects = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    if not suspects.size:
        return
    first: dict[str, int] = {}
    for begin, keys in _keys(table):
        for at in np.flatnonzero(np.isin(hashes[begin : begin + len(keys)], suspects)).tolist():
            if begin + at in without:
                continue
            seen = first.setdefault(keys[at], begin + at)
            if seen != begin + at:
                yield begin + at, keys[at], seen


def _keys(table: MappedRows) -> Iterator[tuple[int, list[str]]]:
    """The keys of each record batch as rows have them, after the number of its first row; "" where there is none."""
    for begin, cells in table.batches():
        keys, wavs = cells[FIELDS.index("key")], cells[FIELDS.index("wav")]
        if keys is not None:
            yield begin, ["" if key is None else key_of(key, "") for key in keys.to_pylist()]
        else:
            yield begin, ["" if not wav else key_of(None, wav) for wav in wavs.to_pylist()]


class _damage:
    """pyarrow's complaints of a file as DataError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        pa = need("pyarrow", extra="tables")
        if isinstance(error, DataError) or not isinstance(error, (pa.ArrowException, OSError, ValueError)):
            return
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"cannot be read: {error.strerror or error}", where=str(self._path)) from error
        said = (str(error).splitlines() or ["no reason given"])[0].rstrip(".")
        raise DataError(
            f"this table is damaged or cut short: {said}", where=str(self._path), fix="write it again from its source"
        ) from error
