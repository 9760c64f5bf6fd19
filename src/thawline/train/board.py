"""The metrics for TensorBoard, in `tensorboard/` of the run directory. A sink: it changes nothing, and stops no run.

Each stretch of a run writes a file of its own. A run that is taken up after an earlier step than it had reached takes
those steps again; the file then begins with a mark that makes TensorBoard forget the first ones (what its writers call
`purge_step`). Written record by record and not through `SummaryWriter`, whose thread dies on a full disk and leaves its
callers waiting.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from thawline.core.extras import need


class Board:
    """Writes figures to `folder` for a run that is after `step`. Raises MissingExtra without the extra `tensorboard`.

    What the storage refuses is missing there, and nowhere else: `metrics.jsonl` has every figure.
    """

    def __init__(self, folder: Path, *, step: int) -> None:
        records = need("tensorboard.summary.writer.record_writer", extra="tensorboard")
        self._events = need("tensorboard.compat.proto.event_pb2", extra="tensorboard")
        self._summaries = need("tensorboard.compat.proto.summary_pb2", extra="tensorboard")
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 1000}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("xb")
        self._records = records.RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        self._write(step=step + 1, session_log=self._events.SessionLog(status=self._events.SessionLog.START))

    def scalars(self, step: int, figures: Mapping[str, Any], *, under: str = "") -> None:
        """Figures of a step, their names below `under`; those that are not numbers ("nan", "empty") leave a gap."""
        values = [
            self._summaries.Summary.Value(tag=under + name, simple_value=figure)
            for name, figure in figures.items()
            if isinstance(figure, (int, float)) and name != "step"
        ]
        self._write(step=step, summary=self._summaries.Summary(value=values))

    def flush(self) -> None:
        """Write out what is pending: before a checkpoint, so that a kill after it loses no step before it."""
        with suppress(OSError):
            self._file.flush()

    def close(self) -> None:
        """End the file."""
        with suppress(OSError):
            self._file.close()

    def _write(self, **event: Any) -> None:
        with suppress(OSError):
            self._records.write(self._events.Event(wall_time=time.time(), **event).SerializeToString())
