"""The run directory: which file lies where, and the logs that grow while a run goes on.

`metrics.jsonl` holds only what is a function of the step (no clock times), so that a run that was killed and resumed
leaves the same bytes as one that was not. What depends on the machine goes to `speed.jsonl`, what happened to
`events.jsonl`.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from thawline.ckpt.store import atomic_file
from thawline.core.config import dump_yaml
from thawline.errors import RecipeError
from thawline.train.recipe import Recipe


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The folder of one run."""

    path: Path

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
    def speed(self) -> Path:
        return self.path / "speed.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def audit(self) -> Path:
        return self.path / "audit.json"

    @property
    def begun(self) -> bool:
        return self.recipe.exists()

    @property
    def finished(self) -> bool:
        return self.model.is_dir()

    def create(self, recipe: Recipe) -> None:
        """Make the folder and write the resolved recipe."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_text(self.recipe, dump_yaml(recipe.resolved()))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run: two trainers in one folder would tear each other's logs. Freed when the process ends, however
        it ends."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as exc:
                raise RecipeError(
                    "another process is training in this folder",
                    where=str(self.path),
                    fix="wait for it, or give another folder with --run",
                ) from exc
            yield

    def event(self, kind: str, **details: Any) -> None:
        """Append one event, with the time."""
        row = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": kind, **details}
        append_row(self.events, row)

    def rewind_metrics(self, step: int) -> None:
        """Drop the rows after `step`, and a torn last line: the run goes on from there and writes them again."""
        rows = read_rows(self.metrics)
        kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
        write_text(self.metrics, kept)


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line in a single write, so that a kill leaves at most one torn line at the end."""
    with path.open("ab") as handle:
        handle.write((json.dumps(row) + "\n").encode())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines log; a torn last line, left by a kill, is passed over."""
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        rows.append(json.loads(line))
    return rows


def flush(path: Path) -> None:
    """Force what was appended to the disk: a checkpoint must not be newer than the log it belongs to."""
    if path.exists():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())


def write_text(path: Path, text: str) -> None:
    """Replace a small text file, whole or not at all."""
    with atomic_file(path, force=True) as handle:
        handle.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
