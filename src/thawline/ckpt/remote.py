"""Files on object stores and other remote storage, by fsspec's URLs (s3://, gs://, memory://, ...).

A file is sent within a transaction of its file system, so that it appears whole, and is read again and compared.
Network and credentials are fsspec's matter. `file://` is a local path, with all guarantees of `store`. What folders
mean is not decided here; see `transfer`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Final, cast

from thawline.ckpt.manifest import FileEntry
from thawline.ckpt.store import file_hasher
from thawline.core.extras import need
from thawline.errors import CheckpointError, MissingExtra

_URL = re.compile(r"([a-z][a-z0-9+.-]+)://")
_PIECE: Final = 8 << 20


def is_url(place: str | Path) -> bool:
    """Whether a place is remote. A `pathlib.Path` never is: it would have lost a slash.

    >>> is_url("s3://bucket/run"), is_url("file:///tmp/run"), is_url("runs/a")
    (True, False, False)
    """
    match = _URL.match(place) if isinstance(place, str) else None
    return match is not None and match[1] != "file"


def local_path(place: str | Path) -> Path:
    """The path that a local place means, `file://` taken off."""
    return Path(place.removeprefix("file://")) if isinstance(place, str) else place


class Place:
    """A remote file or folder.

    Raises CheckpointError for every failure of the storage, MissingExtra where its package is not installed.
    """

    def __init__(self, url: str) -> None:
        fsspec = need("fsspec", extra="remote")
        self.url = url.rstrip("/")
        try:
            self._fs, self._path = fsspec.core.url_to_fs(self.url)
        except ImportError as exc:
            raise MissingExtra(str(exc), fix="pip install 'thawline[remote]', or fsspec's package for it") from exc
        except ValueError as exc:
            raise CheckpointError(f"is no place that is known: {exc}", where=url, fix="check the URL") from exc

    @property
    def name(self) -> str:
        return PurePosixPath(self._path).name

    def __truediv__(self, name: str) -> Place:
        return Place(f"{self.url}/{name}")

    def files(self) -> dict[str, int]:
        """Size of every file below, by its name relative to this folder; empty if there is none."""
        with self._errors():
            self._fs.invalidate_cache()
            found = self._fs.find(self._path, detail=True)
        root = self._path.rstrip("/") + "/"
        sizes = {path.removeprefix(root): int(entry["size"]) for path, entry in found.items() if path.startswith(root)}
        for name in sizes:
            if ".." in PurePosixPath(name).parts or name.startswith("/"):
                raise CheckpointError(f"holds the name {name!r}", where=self.url, fix="do not trust this folder")
        return sizes

    def exists(self) -> bool:
        """Whether there is a file, or a folder with a file in it."""
        with self._errors():
            self._fs.invalidate_cache()
            return bool(self._fs.exists(self._path))

    def is_file(self) -> bool:
        with self._errors():
            self._fs.invalidate_cache()
            return bool(self._fs.isfile(self._path))

    def read(self) -> bytes:
        """The content of a small file. Raises CheckpointError if it is not there."""
        with self._errors():
            data: bytes = self._fs.cat_file(self._path)
        return data

    def write(self, data: bytes) -> None:
        """A small file in one piece."""
        with self._errors():
            self._make_parent()
            self._fs.pipe_file(self._path, data)

    def bring(self, target: Path) -> None:
        """Copy the file here."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._errors():
            self._fs.get_file(self._path, str(target))

    def send(self, source: Path) -> FileEntry:
        """Copy a local file there, read it again and compare; it appears whole. Its size and digest."""
        with self._errors():
            self._make_parent()
            with self._fs.transaction:
                self._fs.put_file(str(source), self._path)
            self._fs.invalidate_cache()
            with self._fs.open(self._path, "rb") as file:
                there = entry_of(file)
        with open(source, "rb") as file:
            if entry_of(file) != there:
                raise CheckpointError(
                    "reading it again gives other bytes than were sent",
                    where=self.url,
                    fix="the storage or the way to it is failing: try again",
                )
        return there

    def remove(self) -> None:
        """Remove the file, or the folder with all in it."""
        with self._errors():
            self._fs.rm(self._path, recursive=True)

    def _make_parent(self) -> None:
        if not self._fs.async_impl:  # object stores have no folders to make, and would make a bucket
            self._fs.makedirs(self._fs._parent(self._path), exist_ok=True)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as exc:
            raise CheckpointError("does not exist", where=self.url, fix="check the URL") from exc
        except _storage_errors() as exc:
            raise CheckpointError(
                f"the storage refuses: {exc}", where=self.url, fix="check address, credentials and free space"
            ) from exc


def entry_of(file: Any) -> FileEntry:
    """Size and digest of an open file's content."""
    hasher = file_hasher()
    size = 0
    while piece := file.read(_PIECE):
        hasher.update(piece)
        size += len(piece)
    return FileEntry(size=size, digest=str(hasher.hexdigest()))


def _storage_errors() -> tuple[type[Exception], ...]:
    """OSError, and what a storage's own package raises besides, as far as it is loaded."""
    loaded = sys.modules.get("botocore.exceptions")
    return (
        (OSError,)
        if loaded is None
        else (
            OSError,
            cast(type[Exception], loaded.BotoCoreError),
        )
    )
