"""A resolution by block, as data and as the text that `thawline plan` prints. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from thawline.freeze.resolve import Decision, Resolution


class Block(NamedTuple):
    """One row of the table. lr: smallest and largest multiplier among what trains; phases: when it began to."""

    name: str
    tensors: int
    parameters: int
    trained: int
    moving_buffers: int
    lr: tuple[float, float] | None
    since: tuple[int, ...]
    eval_mode: bool


def blocks_of(decisions: Sequence[Decision], pinned: set[str]) -> tuple[Block, ...]:
    """The decisions by block, in model order; equal neighbouring layers are one row."""
    lists = _layer_lists(decisions)
    groups: dict[str, list[Decision]] = {}
    for d in decisions:
        groups.setdefault(_block_of(d.name, lists), []).append(d)
    rows = [_block(name, group, pinned) for name, group in groups.items()]
    merged: list[tuple[Block, int, int]] = []
    for row in rows:
        head, _, last = row.name.rpartition(".")
        layer = int(last) if last.isdecimal() and head in lists else -1
        if layer >= 0 and merged:
            before, first, until = merged[-1]
            same = before.name == f"{head}[{first}:{until}]" and until == layer
            if same and _alike(before, row, until - first):
                merged[-1] = (_sum(before, row, f"{head}[{first}:{layer + 1}]"), first, layer + 1)
                continue
        name = f"{head}[{layer}:{layer + 1}]" if layer >= 0 else row.name
        merged.append((row._replace(name=name), layer, layer + 1))
    return tuple(
        row._replace(name=f"{row.name.partition('[')[0]}.{first}".lstrip("."))
        if until == first + 1 and first >= 0
        else row
        for row, first, until in merged
    )


def _layer_lists(decisions: Sequence[Decision]) -> set[str]:
    """Paths whose numbered children hold at least two tensors each, twice or more; the outermost of nested ones."""
    counts: dict[str, dict[str, int]] = {}
    for d in decisions:
        parts = d.name.split(".")
        for at, part in enumerate(parts[:-1]):
            if part.isdecimal():
                layers = counts.setdefault(".".join(parts[:at]), {})
                layers[part] = layers.get(part, 0) + 1
    return {path for path, layers in counts.items() if len(layers) > 1 and min(layers.values()) > 1}


def _block_of(name: str, lists: set[str]) -> str:
    parts = name.split(".")
    for at in range(len(parts) - 1):
        if parts[at].isdecimal() and ".".join(parts[:at]) in lists:
            return ".".join(parts[: at + 1])
    return ".".join(parts[: min(2, len(parts) - 1)]) or name


def _block(name: str, group: Sequence[Decision], pinned: set[str]) -> Block:
    params = [d for d in group if not d.is_buffer]
    trained = [d for d in params if d.trains]
    rates = [d.lr for d in trained]
    return Block(
        name,
        len(group),
        sum(d.numel for d in params),
        sum(d.trained_numel for d in trained),
        sum(d.is_buffer and d.trains for d in group),
        (min(rates), max(rates)) if rates else None,
        tuple(sorted({d.since for d in trained})),
        name in pinned,
    )


def _alike(merged: Block, row: Block, layers: int) -> bool:
    return (
        merged.parameters == row.parameters * layers
        and merged.trained == row.trained * layers
        and merged.moving_buffers == row.moving_buffers * layers
        and (merged.lr, merged.since, merged.eval_mode) == (row.lr, row.since, row.eval_mode)
    )


def _sum(a: Block, b: Block, name: str) -> Block:
    return a._replace(
        name=name,
        tensors=a.tensors + b.tensors,
        parameters=a.parameters + b.parameters,
        trained=a.trained + b.trained,
        moving_buffers=a.moving_buffers + b.moving_buffers,
    )


def table_of(resolution: Resolution) -> str:
    """The blocks of a resolution, totals, overrides and notes as text."""
    head = ("block", "parameters", "trained", "share", "lr x", "since phase", "mode", "buffers that move")
    rows = [head]
    for b in blocks_of(resolution.decisions, set(resolution.pinned)):
        rate = "" if b.lr is None else f"{b.lr[0]:g}" if b.lr[0] == b.lr[1] else f"{b.lr[0]:g} to {b.lr[1]:g}"
        rows.append(
            (
                b.name,
                f"{b.parameters:,}",
                f"{b.trained:,}",
                f"{b.trained / b.parameters:.0%}" if b.parameters else "",
                rate,
                ", ".join(map(str, b.since)),
                "eval" if b.eval_mode else "",
                str(b.moving_buffers or ""),
            )
        )
    total, trained = resolution.parameters, resolution.trained_parameters
    rows.append(("all", f"{total:,}", f"{trained:,}", f"{trained / total:.1%}" if total else "", "", "", "", ""))
    widths = [max(len(row[c]) for row in rows) for c in range(len(head))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    count = len(resolution.trainable_names)
    lines.append(f"phase {resolution.phase} of {resolution.phases} (numbered from 0), {count} tensors train")
    for o in resolution.overrides:
        lines.append(f"note: {o.winner} overrides {o.loser} for {o.tensors} tensors, e.g. {o.example}")
    lines += [f"note: {note}" for note in resolution.notes]
    return "\n".join(lines)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [c.ljust(w) if i in (0, 6) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
    return "  ".join(cells).rstrip()
