"""What must be saved because it cannot be computed: where the run is, and what was measured on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from thawline.data.sampler import Cursor


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """The counters of a run. Tensors are kept beside it, by name.

    step:      optimizer updates taken, skipped ones included
    cursor:    position of the next batch to be read
    index:     batches of this epoch before the cursor
    phase:     index of the plan's phase in force
    history:   every evaluation so far, oldest first: {"step", "epoch", "valid/loss", ...}
    in_a_row:  skipped (non-finite) steps directly before this one
    split:     pieces that each micro-batch is cut into, because it did not fit into memory whole
    seen, bad: training samples asked for and those among them that could not be read
    """

    step: int = 0
    cursor: Cursor = Cursor()
    index: int = 0
    phase: int = 0
    history: tuple[Mapping[str, float], ...] = ()
    in_a_row: int = 0
    split: int = 1
    seen: int = 0
    bad: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "cursor": [self.cursor.epoch, self.cursor.window, self.cursor.batch],
            "index": self.index,
            "phase": self.phase,
            "history": [dict(row) for row in self.history],
            "in_a_row": self.in_a_row,
            "split": self.split,
            "seen": self.seen,
            "bad": self.bad,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunState:
        return cls(
            step=data["step"],
            cursor=Cursor(*data["cursor"]),
            index=data["index"],
            phase=data["phase"],
            history=tuple(data["history"]),
            in_a_row=data["in_a_row"],
            split=data["split"],
            seen=data["seen"],
            bad=data["bad"],
        )
