"""The checkpoints of a run under way: when one is due, which are kept, and what happens where the storage refuses one.

A refusal never touches the checkpoints that are there. Behind the training it is recorded, and the run goes on or stops
as `run.checkpoint.on_error` says; where the run waits for its save (its last one, or when it was told to stop) it is
raised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from thawline.ckpt.delta import BaseRef
from thawline.ckpt.load import newest_whole
from thawline.ckpt.mirror import mirror_checkpoint
from thawline.ckpt.retention import Keep, prune
from thawline.ckpt.save import Handle, Saver
from thawline.ckpt.store import StorageError
from thawline.errors import CheckpointError, Stopped, ThawlineError
from thawline.train.recipe import CheckpointSettings
from thawline.train.rundir import RowLog, RunDirectory

Scores = Mapping[int, float]
"""Step of an evaluation -> its figure by `run.checkpoint.best`, the smaller the better."""


@dataclass(slots=True)
class Keeper:
    """Writes and prunes the checkpoints of one run.

    rows:   the metric log: a checkpoint must not outlive the rows that lead to it
    scores: of the evaluations so far, by the metric that `best` names; empty without one
    also:   steps whose checkpoints are kept besides
    tell:   told in a line what the storage refused
    waited: told how long the training stopped for a save
    """

    files: RunDirectory
    settings: CheckpointSettings
    base: BaseRef
    rows: RowLog
    scores: Callable[[], Scores]
    also: Callable[[], Sequence[int]]
    tell: Callable[[str], None]
    waited: Callable[[float], None]
    saved: int | None = field(init=False, default=None)
    """Step of the last checkpoint that was handed over for writing."""
    _saver: Saver = field(init=False)
    _under_way: Handle | None = field(init=False, default=None)
    _saved_at: float = field(init=False)

    def __post_init__(self) -> None:
        self._saved_at = monotonic()
        self._saver = Saver(self.files.checkpoints, base=self.base, after=self._prune, report=self.tell)

    @property
    def minutes(self) -> float:
        """Since the last checkpoint, or since the run was taken up."""
        return (monotonic() - self._saved_at) / 60

    def save(self, *, step: int, wait: bool, **parts: Any) -> None:
        """Write a checkpoint of these parts (as for `Saver.save`), behind the training or waiting for it.

        Raises StorageError where that was refused and the run waits for it, or may not go on without.
        """
        began = self._saved_at = monotonic()
        self.drain()
        self.look_after()
        try:
            self.rows.flush()
        except StorageError as exc:
            self.tell(f"checkpoint of step {step} was not written: {exc}")
            self._refused(step, exc, go_on=not wait)
            return
        self._under_way = self._saver.save(step=step, **parts)
        self.saved = step
        if wait:
            self.drain()
            self.look_after(go_on=False)
        self.waited(monotonic() - began)

    def look_after(self, *, go_on: bool = True) -> None:
        """See what became of the last save. Raises StorageError where it was refused and the run has to stop.

        go_on: whether the run can go on without it, if the recipe lets it
        """
        handle = self._under_way
        error = None if handle is None else handle.error
        if handle is None or error is None:
            return
        self.saved = self._under_way = None
        if not isinstance(error, StorageError):
            raise error
        self._refused(handle.step, error, go_on=go_on)

    def drain(self) -> None:
        """Wait for the save under way."""
        self._saver.drain()

    def close(self) -> None:
        """Wait for the save under way, and write no more."""
        self._saver.close()

    def _refused(self, step: int, refusal: StorageError, *, go_on: bool) -> None:
        self.files.event("not saved", step=step, reason=str(refusal))
        if not go_on or self.settings.on_error == "stop":
            raise refusal

    def _prune(self, newest: Path) -> None:
        """In the writing thread, once a checkpoint is on the device."""
        scores = self.scores()
        rule = Keep(last=self.settings.keep, best=1 if scores else 0, every=self.settings.keep_every or 0)
        prune(self.files.checkpoints, rule, scores=scores, trusted=newest, also=self.also())
        if self.settings.mirror is not None:
            mirror_checkpoint(newest, self.settings.mirror, keep=rule, scores=scores)


def end_of(refusal: StorageError, files: RunDirectory, tell: Callable[[str], None]) -> ThawlineError:
    """What a run ends with whose storage refuses: exit code 75 where there is a checkpoint to go on from."""
    try:
        whole = newest_whole(files.checkpoints, report=tell)
    except CheckpointError:
        return refusal
    return Stopped(
        f"the storage refuses: {refusal.what}; the last whole checkpoint is {whole.name}",
        where=refusal.where,
        fix=f"{refusal.fix}; then thawline resume {files.path}",
    )
