"""The runs that lie in a folder, and how each of them stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thawline.errors import RecipeError, ThawlineError
from thawline.train.evaluation import best_step
from thawline.train.recipe import read_recipe
from thawline.train.rundir import RunDirectory, read_rows


@dataclass(frozen=True, slots=True)
class RunRow:
    """One run.

    status:  finished | running | stopped (it said so) | interrupted (it could not) | unreadable
    metrics: those of the last evaluation
    best:    the best value of the metric that `run.checkpoint.best` names, else None
    bytes:   of everything in the folder
    """

    dir: str
    task: str
    status: str
    step: int
    epoch: float
    metrics: Mapping[str, float]
    best: float | None
    bytes: int


def list_runs(folder: str | Path) -> list[RunRow]:
    """The run `folder` is, or the runs directly inside it, by name. Raises RecipeError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RecipeError(f"there is no folder {str(folder)!r}", fix="give the folder that holds the runs")
    own = RunDirectory(folder.absolute())
    found = [own] if own.begun else [RunDirectory(p) for p in sorted(folder.absolute().iterdir()) if p.is_dir()]
    rows = [_row(files) for files in found if files.begun]
    if not rows:
        raise RecipeError(f"there is no run in {str(folder)!r}", fix="a run directory holds recipe.yaml and base.json")
    return rows


def table(rows: Sequence[RunRow]) -> str:
    """The runs as text, one a line."""
    shown = [
        (
            Path(row.dir).name,
            row.task,
            row.status,
            str(row.step),
            f"{row.epoch:.2f}",
            "  ".join(f"{k.removeprefix('valid/')} {v:.4g}" for k, v in list(row.metrics.items())[:3]) or "-",
            "-" if row.best is None else f"{row.best:.4g}",
            f"{row.bytes / 1e6:.1f} MB",
        )
        for row in rows
    ]
    head = ("run", "task", "status", "step", "epoch", "last evaluation", "best", "size")
    widths = [max(len(line[i]) for line in (head, *shown)) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in (head, *shown)
    )


def to_json(rows: Sequence[RunRow]) -> dict[str, Any]:
    """The runs as plain values."""
    return {"runs": [asdict(row) for row in rows]}


def _row(files: RunDirectory) -> RunRow:
    size = sum(p.stat().st_size for p in files.path.rglob("*") if p.is_file())
    try:
        recipe = read_recipe(files.recipe)
        rows, status = read_rows(files.metrics), _status(files)
    except ThawlineError:
        return RunRow(str(files.path), "?", "unreadable", 0, 0.0, {}, None, size)
    scored = [row for row in rows if any(key.startswith("valid/") for key in row)]
    metric, step = recipe.run.checkpoint.best, best_step(recipe, scored)
    return RunRow(
        dir=str(files.path),
        task=recipe.task,
        status=status,
        step=rows[-1]["step"] if rows else 0,
        epoch=rows[-1]["epoch"] if rows else 0.0,
        metrics={k: v for k, v in scored[-1].items() if k.startswith("valid/")} if scored else {},
        best=next((float(row[metric]) for row in scored if row["step"] == step), None) if metric else None,
        bytes=size,
    )


def _status(files: RunDirectory) -> str:
    if files.in_use:
        return "running"
    events = [row["event"] for row in read_rows(files.events)]
    if files.finished and "finished" in events:
        return "finished"
    return "stopped" if events and events[-1] == "stopped" else "interrupted"
