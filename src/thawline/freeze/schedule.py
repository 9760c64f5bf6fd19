"""Which phase a run is in: a pure function of its progress and the evaluations on record. Torch is never imported.

Nothing is counted on the way, so a resumed run is in the right phase by arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from thawline.core.config import near_names
from thawline.core.span import Span
from thawline.errors import RecipeError
from thawline.freeze.plan import FreezePlan, Plateau, Thaw

Row = Mapping[str, float]
"""One evaluation: {"step": 1200, "epoch": 2.0, "valid/loss": 1.3, ...}."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is.

    step:            optimizer updates taken
    epoch:           epochs completed, step / steps_per_epoch
    total_steps:     length of the run; 0 where it is not known (then no share of it can be asked for)
    steps_per_epoch: 0 where it is not known (then epochs are taken from `epoch`)
    """

    step: int = 0
    epoch: float = 0.0
    total_steps: int = 0
    steps_per_epoch: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a phase began: at a step, at an epoch, or both as far as they are known."""

    step: float | None
    epoch: float | None


def phase_at(plan: FreezePlan, progress: Progress, history: Sequence[Row] = ()) -> int:
    """The phase in force: 0 at the beginning, `plan.phases - 1` at the end.

    plan:    expanded (`plan.expanded(index)`) where it thaws over a layer list
    history: evaluations, oldest first; those after `progress` are ignored

    Raises RecipeError where a condition asks for a metric that no evaluation has, or for a share of an unknown length.
    """
    return len(phase_entries(plan, progress, history)) - 1


def phase_entries(plan: FreezePlan, progress: Progress, history: Sequence[Row] = ()) -> tuple[Entry, ...]:
    """Where each phase up to the present one began, the first at step 0."""
    if not plan.is_expanded:
        raise RecipeError("a plan that thaws over a layer list needs the model", fix="use plan.expanded(index)")
    rows = [row for row in history if _reached(row, progress)]
    entries = [Entry(0, 0.0)]
    for i, phase in enumerate(plan.thaw):
        label = f"thaw[{i}]"
        entry = _entry(phase, label, progress, rows, entries[-1])
        if entry is None:
            break
        entries.append(entry)
    return tuple(entries)


def warmup_factor(plan: FreezePlan, since: int, progress: Progress, history: Sequence[Row] = ()) -> float:
    """Factor of the learning rate for what began to train in phase `since`: linear from 0 to 1 over its warm-up.

    The k-th step of a warm-up of n steps is taken at k / n of the rate.
    """
    if since == 0 or plan.thaw[since - 1].warmup is None:
        return 1.0
    phase = plan.thaw[since - 1]
    where = phase.where("warmup") or f"thaw[{since - 1}].warmup"
    span = Span.parse(str(phase.warmup), where=where)
    entries = phase_entries(plan, progress, history)
    if since >= len(entries):
        return 0.0
    start = entries[since]
    if start.step is not None:
        steps = _steps(span, progress)
        if steps is not None:
            return min(1.0, (progress.step - start.step + 1) / max(steps, 1))
    if start.epoch is not None and span.unit == "epochs":
        return min(1.0, max(0.0, (progress.epoch - start.epoch) / span.amount)) if span.amount else 1.0
    raise RecipeError(
        f"a warm-up of {span} cannot be placed: the number of steps in an epoch is not known",
        where=where,
        fix="give steps_per_epoch (and total_steps for %) with the progress",
    )


def _entry(phase: Thaw, label: str, progress: Progress, rows: Sequence[Row], before: Entry) -> Entry | None:
    not_before = _due(phase.after, phase.where("after") or label, progress)
    if phase.when is None:
        if not_before is None or not _is_due(not_before, progress):
            return None
        return _later(not_before, before)
    found = _plateau(phase, label, rows, before, not_before)
    at_latest = _due(phase.by, phase.where("by") or label, progress)
    if at_latest is not None and _is_due(at_latest, progress) and (found is None or _earlier(at_latest, found)):
        return _later(at_latest, before)
    return found


def _due(text: str | None, where: str, progress: Progress) -> Entry | None:
    if text is None:
        return None
    span = Span.parse(text, where=where)
    steps = _steps(span, progress)
    if steps is not None:
        epoch = steps / progress.steps_per_epoch if progress.steps_per_epoch else None
        return Entry(steps, epoch)
    if span.unit == "epochs":
        return Entry(None, span.amount)
    raise RecipeError(
        f"{span} of a run whose length is not known", where=where, fix="give total_steps, or write steps or epochs"
    )


def _steps(span: Span, progress: Progress) -> int | None:
    if span.unit == "steps":
        return int(span.amount)
    if span.unit == "epochs" and progress.steps_per_epoch:
        return round(span.amount * progress.steps_per_epoch)
    if span.unit == "fraction" and progress.total_steps:
        return round(span.amount * progress.total_steps)
    return None


def _is_due(entry: Entry, progress: Progress) -> bool:
    if entry.step is not None:
        return progress.step >= entry.step
    assert entry.epoch is not None
    return progress.epoch >= entry.epoch


def _later(a: Entry, b: Entry) -> Entry:
    """The later of two beginnings: a phase that is overdue begins when the one before it has begun."""
    return b if _earlier(a, b) else a


def _earlier(a: Entry, b: Entry) -> bool:
    if a.step is not None and b.step is not None:
        return a.step < b.step
    if a.epoch is not None and b.epoch is not None:
        return a.epoch < b.epoch
    return False


def _position(row: Row) -> Entry:
    return Entry(row.get("step"), row.get("epoch"))


def _reached(row: Row, progress: Progress) -> bool:
    if "step" in row and (progress.step or not progress.epoch):
        return row["step"] <= progress.step
    return row.get("epoch", 0.0) <= progress.epoch


def _plateau(phase: Thaw, label: str, rows: Sequence[Row], before: Entry, not_before: Entry | None) -> Entry | None:
    """The first evaluation at which the metric has stood still long enough, within the phase before.

    An evaluation taken at the moment that phase began measured the weights of the one before it, and is left out.
    """
    where = phase.where("when") or f"{label}.when"
    rule = Plateau.parse(str(phase.when), where=where)
    known = sorted({key for row in rows for key in row} - {"step", "epoch"})
    if rows and rule.metric not in known:
        near = near_names(rule.metric, known)
        raise RecipeError(
            f"no evaluation has measured {rule.metric!r}",
            where=where,
            fix=f"did you mean {near[0]}? " if near else f"measured: {', '.join(known) or 'nothing'}",
        )
    best, waited = math.inf, 0
    for row in rows:
        if not _earlier(before, _position(row)) or rule.metric not in row:
            continue
        value = -row[rule.metric] if rule.higher_is_better else row[rule.metric]
        if value < best - rule.min_delta or (best == math.inf and math.isfinite(value)):
            best, waited = value, 0
        else:
            waited += 1
        if waited >= rule.patience and (not_before is None or not _earlier(_position(row), not_before)):
            return _position(row)
    return None
