"""What must be saved because it cannot be computed: where the run is, and what was measured on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from thawline.data.sampler import Cursor
from thawline.train.scaling import LossScale


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """The counters of a run. Tensors are kept beside it, by name.

    step:      optimizer updates taken, skipped ones included
    cursor:    position of the next batch to be read
    index:     batches of this epoch before the cursor
    phase:     index of the plan's phase in force
    history:   every evaluation so far, oldest first: {"step", "epoch", "valid/loss", ...}
    in_a_row:  skipped (non-finite) steps directly before this one
    anchor:    step of the last checkpoint that is a function of the step (not of a stop or of the clock) and follows
               no skipped step: where the run would go back to; 0 for none yet
    unsettled: epochs completed before the last step, while the evaluation and the phase that may be due after it have
               not been seen to; None afterwards
    passed_over: stretches of batches left out because training on them led to steps that were not finite: (position of
               the first, position after the last)
    split:     pieces that each micro-batch is cut into, because it did not fit into memory whole
    valid_split: the same of the batches of an evaluation
    scale:     of the loss, in fp16
    seen, bad: training samples asked for and those among them that could not be read
    """

    step: int = 0
    cursor: Cursor = Cursor()
    index: int = 0
    phase: int = 0
    history: tuple[Mapping[str, float], ...] = ()
    in_a_row: int = 0
    anchor: int = 0
    unsettled: float | None = None
    passed_over: tuple[tuple[Cursor, Cursor], ...] = ()
    split: int = 1
    valid_split: int = 1
    scale: LossScale = LossScale()
    seen: int = 0
    bad: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "cursor": _plain(self.cursor),
            "index": self.index,
            "phase": self.phase,
            "history": [dict(row) for row in self.history],
            "in_a_row": self.in_a_row,
            "anchor": self.anchor,
            "unsettled": self.unsettled,
            "passed_over": [[_plain(first), _plain(after)] for first, after in self.passed_over],
            "split": self.split,
            "valid_split": self.valid_split,
            "scale": [self.scale.factor, self.scale.steady],
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
            # Runs of before these were kept go on too.
            anchor=data.get("anchor", 0),
            unsettled=data.get("unsettled"),
            passed_over=tuple((Cursor(*first), Cursor(*after)) for first, after in data.get("passed_over", ())),
            split=data["split"],
            valid_split=data.get("valid_split", 1),
            scale=LossScale(*data.get("scale", ())),
            seen=data["seen"],
            bad=data["bad"],
        )


def _plain(cursor: Cursor) -> list[int]:
    return [cursor.epoch, cursor.window, cursor.batch]
