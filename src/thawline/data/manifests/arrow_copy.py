"""The files that hold a table, and a copy that can be mapped of those that cannot be.

The copy is an uncompressed Arrow file of plain columns in the cache folder. Its name says the digest of the table that
it was made of and its own, and both are computed anew before it is used: it is never stale, and damage is noticed.
"""

from __future__ import annotations

import atexit
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from thawline.core.extras import need
from thawline.data import cache as keeping
from thawline.errors import DataError, ThawlineError

BATCH_ROWS = 65536
"""Rows of one record batch in tables that we write: small enough to be looked at whole, large enough to be few."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_VERSION = 1  # of the copy's layout; another one is another name
Kind = Literal["file", "stream", "parquet"]


@dataclass(frozen=True, slots=True)
class Container:
    """A file that holds a table. kind: an Arrow file, an Arrow stream, or Parquet."""

    path: Path
    kind: Kind

    @property
    def may_be_mapped(self) -> bool:
        return self.kind == "file"

    def schema(self) -> Any:
        """Names and types of its columns."""
        pa = need("pyarrow", extra="tables")
        if self.kind == "parquet":
            return need("pyarrow.parquet", extra="tables").read_schema(self.path)
        with pa.OSFile(str(self.path), "rb") as file:
            return (pa.ipc.open_file if self.kind == "file" else pa.ipc.open_stream)(file).schema

    def embeds(self, column: str) -> bool:
        """Whether the struct `column` holds the sound itself in `bytes`, by its first row."""
        pa = need("pyarrow", extra="tables")
        if not any(child.name == "bytes" for child in self.schema().field(column).type):
            return False
        if self.kind == "parquet":
            with need("pyarrow.parquet", extra="tables").ParquetFile(self.path) as file:
                first = next(file.iter_batches(1, columns=[f"{column}.bytes"]), None)
        else:
            first = next(self.batches([column]), None)
        if first is None or not first.num_rows:
            return False
        inside = first.column(column)
        return bool(pa.compute.struct_field(inside, "bytes")[0].is_valid)

    def batches(self, columns: list[str]) -> Iterator[Any]:
        """Its record batches, read one after the other."""
        pa = need("pyarrow", extra="tables")
        if self.kind == "parquet":
            with need("pyarrow.parquet", extra="tables").ParquetFile(self.path) as file:
                schema = file.schema_arrow
                # Of a struct only the path: sound that lies beside it would be read too.
                wanted = [f"{c}.path" if _is_struct(schema.field(c).type) else c for c in columns]
                yield from (batch.select(columns) for batch in file.iter_batches(BATCH_ROWS, columns=wanted))
            return
        with pa.OSFile(str(self.path), "rb") as file:
            if self.kind == "stream":
                yield from (batch.select(columns) for batch in pa.ipc.open_stream(file))
                return
            reader = pa.ipc.open_file(file)
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number).select(columns)


def kind_of(path: Path) -> Kind | None:
    """Which kind of table a file holds, told by its first bytes; None for any other file. Raises OSError."""
    with path.open("rb") as file:
        head = file.read(8)
    if head.startswith(b"ARROW1"):
        return "file"
    if head.startswith(b"PAR1"):
        return "parquet"
    return "stream" if head.startswith(b"\xff\xff\xff\xff") else None


def container_of(path: Path) -> Container:
    """What `path` holds. Raises DataError for what is no table."""
    try:
        kind = kind_of(path)
        size = path.stat().st_size
    except OSError as exc:
        raise DataError(f"cannot be read: {exc.strerror}", where=str(path)) from exc
    if kind is not None:
        return Container(path, kind)
    if not size:
        raise DataError("the table is empty (0 bytes)", where=str(path), fix="check that it was written")
    raise DataError(
        "neither Arrow nor Parquet by its first bytes",
        where=str(path),
        fix="write it with pyarrow, pandas or polars, or with: thawline data table LIST OUT.arrow",
    )


def copy_of(container: Container, names: Mapping[str, str], *, cache: Path | None) -> Path:
    """An Arrow file that can be mapped, with the columns of `names` (field -> column) in that order; made where needed.

    cache: where it is kept; None is the user's cache folder. Where nothing can be kept it is made in the system's
    temporary folder, and goes when this process ends. Raises ThawlineError where there is no room for it either.
    """
    layout = keeping.name_for((_VERSION, sorted(names.items())))[:8]
    origin = f"{container.path.stem}-{keeping.file_digest(container.path)[:32]}-{layout}"
    home = cache
    if home is None:
        own = keeping.folder()
        home = own / "tables" if own is not None else None
    if home is not None:
        for found in sorted(home.glob(f"{_escaped(origin)}-*.arrow")) if home.is_dir() else ():
            try:
                if keeping.file_digest(found)[:32] == found.stem.rpartition("-")[2]:
                    return found
            except OSError:
                continue
        try:
            return _made(container, names, home, origin)
        except OSError:
            pass  # read-only or full
    try:
        passing = Path(tempfile.mkdtemp(prefix="thawline-table-"))
        atexit.register(shutil.rmtree, passing, ignore_errors=True)
        return _made(container, names, passing, origin)
    except OSError as exc:
        if exc.errno not in _NO_ROOM:
            raise
        raise ThawlineError(
            f"there is no room for a copy of this table, neither in {home or 'a cache folder (no home)'} nor in "
            f"{tempfile.gettempdir()}: {os.strerror(exc.errno)}",
            where=str(container.path),
            fix="free space there, name other folders (XDG_CACHE_HOME, TMPDIR), or write the table as an uncompressed "
            "Arrow file, which is not copied: thawline data table LIST OUT.arrow",
        ) from exc


def _made(container: Container, names: Mapping[str, str], home: Path, origin: str) -> Path:
    pa = need("pyarrow", extra="tables")
    with keeping.new_file(home) as temporary:
        writer = None
        with pa.OSFile(str(temporary), "wb") as sink:
            for batch in container.batches(list(names.values())):
                columns = [plain(batch.column(name)) for name in names.values()]
                schema = pa.schema([(field, column.type) for field, column in zip(names, columns, strict=True)])
                if writer is None:
                    writer = pa.ipc.new_file(sink, schema)
                writer.write_batch(pa.record_batch(columns, schema=schema))
            if writer is None:
                writer = pa.ipc.new_file(sink, pa.schema([(field, pa.string()) for field in names]))
            writer.close()
        made = home / f"{origin}-{keeping.file_digest(temporary)[:32]}.arrow"
        temporary.replace(made)
    return made


def plain(column: Any) -> Any:
    """A column as one of text, of whole numbers or of seconds, without dictionaries, views and structs."""
    pa = need("pyarrow", extra="tables")
    types = pa.types
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if types.is_struct(column.type):
        number = column.type.get_field_index("path")
        column = column.flatten()[number]
        return plain(column)
    if types.is_floating(column.type) or types.is_decimal(column.type):
        return column.cast(pa.float64())
    if types.is_integer(column.type) or types.is_large_string(column.type):
        return column
    return column.cast(pa.string())


def is_text(kind: Any) -> bool:
    """Whether a type is one of Arrow's texts."""
    types = need("pyarrow", extra="tables").types
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_struct(kind: Any) -> bool:
    return bool(need("pyarrow", extra="tables").types.is_struct(kind))


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
