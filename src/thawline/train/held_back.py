"""What a run's model made of each held-back sample: the rows of its last and of its best evaluation, one file each.

They are for people and for pages. Nothing of a run depends on them, so where the storage refuses them it goes on, and
whoever reads them does without.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from thawline.ckpt import store
from thawline.ckpt.save import step_name
from thawline.ckpt.store import StorageError
from thawline.train.rundir import RunDirectory, read_rows, write_text


def keep_rows(
    files: RunDirectory,
    step: int,
    rows: Sequence[Mapping[str, Any]],
    *,
    best: int | None,
    tell: Callable[[str], None],
) -> None:
    """Write the rows of the evaluation of `step`, and retire those of every other but the best.

    Retiring comes first: rows of a future that the run has gone back from must not pass for the ones refused here.
    """
    target = _file(files, step)
    try:
        with store.storage(files.evaluations):
            for old in sorted(files.evaluations.glob("step-*.jsonl")):
                if best in (None, step) or old != _file(files, best):
                    store.SYSTEM.remove(old)
        if rows:
            write_text(target, "".join(json.dumps(row, default=str) + "\n" for row in rows))
    except StorageError as exc:
        files.event("rows not kept", step=step, reason=str(exc))
        tell(f"the rows of the evaluation of step {step} are not kept: {exc}")


def kept_rows(files: RunDirectory, step: int) -> Sequence[Mapping[str, Any]]:
    """The rows of the evaluation of `step`; empty where they are not kept."""
    return read_rows(_file(files, step))


def _file(files: RunDirectory, step: int) -> Path:
    return files.evaluations / f"{step_name(step)}.jsonl"
