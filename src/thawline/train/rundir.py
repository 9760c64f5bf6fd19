"""The run directory: which file lies where, and the logs that grow while a run goes on.

`metrics.jsonl` holds only what is a function of the step (no clock times), so that a run that was killed and resumed
leaves the same bytes as one that was not. What depends on the machine goes to `speed.jsonl`, what happened to
`events.jsonl`. A row that a full disk refuses waits in memory, and the run goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from thawline.ckpt import store
from thawline.ckpt.load import checkpoints
from thawline.ckpt.store import atomic_file
from thawline.core.config import dump_yaml
from thawline.errors import CheckpointError, RecipeError
from thawline.train.recipe import Recipe


class RowLog:
    """A JSON-lines file that rows are appended to, from any thread.

    A kill leaves at most one torn line, at the end; the next row takes its place. Rows that the storage refuses wait
    here, in order, and are written before the next ones.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting: deque[bytes] = deque()
        self._lock = threading.Lock()

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row, now or as soon as the storage takes it."""
        with self._lock:
            self._waiting.append((json.dumps(row) + "\n").encode())
            try:
                self._write()
            except OSError:
                return

    def flush(self) -> None:
        """Force every row to the disk: a checkpoint must not outlive the rows that lead to it. Raises StorageError."""
        with self._lock, store.storage(self.path):
            self._write()
            if self.path.exists():
                store.SYSTEM.sync(self.path)

    def _write(self) -> None:
        if not self._waiting:
            return
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _to_end_of_last_row(descriptor)
            while self._waiting:
                line = self._waiting[0]
                while line:
                    line = line[store.SYSTEM.write(descriptor, line) :]
                self._waiting.popleft()
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The folder of one run."""

    path: Path
    _events: RowLog = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_events", RowLog(self.events))

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def base(self) -> Path:
        return self.path / "base.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        return self.path / "evaluations"

    @property
    def speed(self) -> Path:
        return self.path / "speed.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def board(self) -> Path:
        return self.path / "tensorboard"

    @property
    def audit(self) -> Path:
        return self.path / "audit.json"

    @property
    def begun(self) -> bool:
        """Whether this is the folder of a run. A recipe alone makes none: `thawline init` writes one wherever it is
        called, in a model's own folder too."""
        return self.recipe.exists() and (self.base.exists() or bool(checkpoints(self.checkpoints)))

    @property
    def finished(self) -> bool:
        return self.model.is_dir()

    @property
    def in_use(self) -> bool:
        """Whether a process trains in this folder now."""
        lock = self.path / ".lock"
        if not lock.exists():
            return False
        with lock.open() as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of `step`, whole or not. Raises CheckpointError naming those that are kept."""
        kept = dict(checkpoints(self.checkpoints))
        if step not in kept:
            raise CheckpointError(
                f"no checkpoint of step {step}", where=str(self.checkpoints), fix=f"kept are the steps {sorted(kept)}"
            )
        return kept[step]

    def create(self, recipe: Recipe) -> None:
        """Make the folder and write the resolved recipe."""
        with store.storage(self.checkpoints):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.write_recipe(recipe)

    def write_recipe(self, recipe: Recipe) -> None:
        """Write the resolved recipe, at the beginning and where the run goes on with a changed one."""
        write_text(self.recipe, dump_yaml(recipe.resolved()))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run: two trainers in one folder would tear each other's logs. Freed when the process ends, however
        it ends."""
        if self.path.exists() and not self.path.is_dir():
            raise RecipeError(
                "is not a folder", where=str(self.path), fix="give the run a folder of its own with --run"
            )
        with store.storage(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as exc:
                raise RecipeError(
                    "another process is training in this folder",
                    where=str(self.path),
                    fix="wait for it, or give another folder with --run",
                ) from exc
            yield

    def event(self, kind: str, **details: Any) -> None:
        """Append one event, with the time."""
        self._events.append({"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": kind, **details})

    def rewind_metrics(self, step: int) -> None:
        """Drop the rows after `step`, and a torn last line: the run goes on from there and writes them again."""
        rows = read_rows(self.metrics)
        kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
        write_text(self.metrics, kept)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines log; a torn last line, left by a kill, is passed over.

    Raises CheckpointError for a damaged line before it.
    """
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as exc:
            raise CheckpointError(
                "the line is damaged", where=f"{path}:{number}", fix="take the file from a copy, or remove the line"
            ) from exc
    return rows


def write_text(path: Path, text: str) -> None:
    """Replace a small text file, whole or not at all."""
    with atomic_file(path, force=True) as handle:
        handle.write(text.encode())


def _to_end_of_last_row(descriptor: int) -> None:
    """Put the descriptor behind the last whole line, and drop a torn one after it."""
    end = os.lseek(descriptor, 0, os.SEEK_END)
    whole = end
    while whole and os.pread(descriptor, 1, whole - 1) != b"\n":
        whole -= 1
    if whole < end:
        os.ftruncate(descriptor, whole)
        os.lseek(descriptor, whole, os.SEEK_SET)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
