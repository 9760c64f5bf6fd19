"""The proof over all phases of a model: each stretch between two changes of phase is audited under its own plan.

A resume may load other weights than the last stretch ended with; there the digests of the base close the gap for what
never trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from thawline.errors import RecipeError
from thawline.freeze.audit import AuditReport, Snapshot, audit, snapshot
from thawline.freeze.resolve import Resolution


class Proof:
    """Digests of `model` from now on. base: as it is now; replaced where a resumed loop knows the true one."""

    def __init__(self, model: nn.Module, resolution: Resolution) -> None:
        self.model = model
        self.base = snapshot(model, resolution)
        self._start: Snapshot | None = self.base
        self._past: AuditReport | None = None

    def leave(self, resolution: Resolution) -> Snapshot:
        """End the stretch under `resolution`; the digests that the next one begins with."""
        now = snapshot(self.model, resolution)
        if self._start is not None:
            self._past = self._with_past(audit(self._start, now, resolution))
        return now

    def enter(self, resolution: Resolution, left: Snapshot) -> None:
        """Begin a stretch under `resolution`, where the last one was left with `left`."""
        # Which rows count as frozen belongs to the new phase.
        self._start = snapshot(self.model, resolution) if resolution.rows else left

    def interrupt(self, base: Mapping[str, Any] | None) -> None:
        """Weights may be loaded from here on: the next stretch begins with `go_on`. base: as `Snapshot.to_dict`."""
        if base is not None:
            self.base = Snapshot.from_dict(base)
        self._past = self._start = None

    def go_on(self, resolution: Resolution) -> None:
        """Begin the stretch that `interrupt` left open; else nothing."""
        if self._start is None:
            self._start = snapshot(self.model, resolution)

    def report(self, resolution: Resolution, seen: Sequence[Resolution]) -> AuditReport:
        """What changed since the base. resolution: the one in force; seen: of every phase gone through.

        Raises RecipeError where `interrupt` left no digests to compare with.
        """
        if self._start is None:
            raise no_digests()
        now = snapshot(self.model, resolution)
        report = self._with_past(audit(self._start, now, resolution))
        # Across a resume the stretches do not touch; the base's own digests close the gap for what never trained.
        whole = audit(_without_rows(self.base), _without_rows(now), seen)
        return AuditReport(
            moved_frozen=tuple(dict.fromkeys((*report.moved_frozen, *whole.moved_frozen))),
            moved_buffers=tuple(dict.fromkeys((*report.moved_buffers, *whole.moved_buffers))),
            unmoved=report.unmoved,
            rested=report.rested,
            vanished=report.vanished,
            appeared=report.appeared,
            frozen=whole.frozen,
            trained=whole.trained,
            buffers=whole.buffers,
            stepped=report.stepped,
        )

    def _with_past(self, report: AuditReport) -> AuditReport:
        return report if self._past is None else self._past.merged(report)


def no_digests() -> RecipeError:
    """What asking for a proof without digests is answered with."""
    return RecipeError("there are no digests to compare with", fix="plan.apply(model, audit=True)")


def _without_rows(taken: Snapshot) -> Snapshot:
    return Snapshot(taken.parameters, taken.buffers)
