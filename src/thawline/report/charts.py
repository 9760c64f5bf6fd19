"""Charts as inline SVG: lines over steps, and a confusion matrix. Text in, text out; no library, no script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 560, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 26, 34
_MOST_POINTS = 500
_COLOURS = ("#0b6fb8", "#c2541b", "#2a8a4a", "#8a4fb0", "#a8871a", "#b03060")
_SMOOTHING = 0.9


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: (x, y) in order of x; `faint` draws it pale, as the raw values under a smoothed curve."""

    name: str
    points: Sequence[tuple[float, float]]
    faint: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment on the x axis, drawn as a dashed upright line with a word."""

    x: float
    text: str


def line_chart(title: str, lines: Sequence[Line], *, marks: Sequence[Mark] = (), x_name: str = "step") -> str:
    """A chart of `lines`; points that are not finite are left out. Empty text where no point is left."""
    lines = [Line(line.name, _thinned(_finite(line.points)), line.faint) for line in lines]
    points = [p for line in lines for p in line.points]
    if not points:
        return ""
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    y_ticks = ticks(min(p[1] for p in points), max(p[1] for p in points))
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1)
        up = (y - y_low) / ((y_high - y_low) or 1)
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text x="{_LEFT}" y="15" class="title">{escape(title)}</text>',
    ]
    for value in y_ticks:
        _, y = at(x_low, value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value in ticks(x_low, x_high):
        if x_low <= value <= x_high:
            x, _ = at(value, y_low)
            parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 18}" text-anchor="middle">{number(value)}</text>')
    parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">{escape(x_name)}</text>')
    for mark in marks:
        if x_low <= mark.x <= x_high:
            x, _ = at(mark.x, y_low)
            parts.append(f'<path class="mark" d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
            parts.append(f'<text x="{x + 3:.1f}" y="{_TOP + 9}">{escape(mark.text)}</text>')
    named = [line for line in lines if not line.faint]
    colour = {line.name: _COLOURS[i % len(_COLOURS)] for i, line in enumerate(named)}
    for line in lines:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in (at(*p) for p in line.points))
        style = f'stroke="{colour.get(line.name, _COLOURS[0])}"' + (' opacity="0.25"' if line.faint else "")
        if len(line.points) == 1:
            x, y = at(*line.points[0])
            path = f"{x - 2:.1f} {y:.1f}H{x + 2:.1f}"
        parts.append(f'<path class="line" {style} d="M{path}"/>')
    place = _WIDTH - _RIGHT
    for line in reversed(named):
        parts.append(
            f'<text x="{place}" y="15" text-anchor="end" style="fill:{colour[line.name]}">{escape(line.name)}</text>'
        )
        place -= 8 + round(6.6 * len(line.name))
    return "".join(parts) + "</svg>"


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A running mean that forgets (0.9 a point), corrected for its beginning as Adam's moments are."""
    made: list[tuple[float, float]] = []
    mean = weight = 0.0
    for x, y in _finite(points):
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * y
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        made.append((x, mean / weight))
    return made


def ticks(low: float, high: float, *, about: int = 5) -> list[float]:
    """Round numbers that enclose the range from `low` to `high`.

    >>> ticks(0.13, 0.91)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if high <= low:
        around = abs(low) * 0.1 or 1.0
        low, high = low - around, high + around
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number(value: float) -> str:
    """A number as a person writes it in a table or beside an axis."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.4f}".rstrip("0").rstrip(".") if value % 1 else f"{value:.0f}"


def matrix(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """A confusion matrix as a table: rows are what an image is, columns what it was taken for; shade by share of row.

    With more than 40 classes the table would not be read; only the pairs most often confused are listed then.
    """
    if len(classes) > 40:
        return _pairs(classes, counts)
    head = "".join(f'<th class="turned"><span>{escape(name)}</span></th>' for name in classes)
    rows = []
    for i, name in enumerate(classes):
        total = sum(counts[i])
        cells = []
        for j, count in enumerate(counts[i]):
            share = count / total if total else 0.0
            shade = f"rgba({'42,138,74' if i == j else '194,84,27'},{0.75 * share:.2f})" if count else "none"
            text = str(count) if count else ""
            cells.append(
                f'<td style="background:{shade}" title="{escape(name)} taken for {escape(classes[j])}: {count}">'
                f"{text}</td>"
            )
        rows.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>")
    return f'<table class="matrix"><tr><th></th>{head}</tr>{"".join(rows)}</table>'


def _pairs(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    found = [(counts[i][j], i, j) for i in range(len(classes)) for j in range(len(classes)) if i != j and counts[i][j]]
    rows = [{"is": classes[i], "taken for": classes[j], "times": n} for n, i, j in sorted(found, reverse=True)[:30]]
    return table(rows)


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows with the same keys as an HTML table; empty text without rows."""
    if not rows:
        return ""
    keys = list(rows[0])
    head = "".join(f"<th>{escape(key)}</th>" for key in keys)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_cell(row.get(key)))}</td>" for key in keys) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: object) -> str:
    return number(value) if isinstance(value, float) and math.isfinite(value) else str(value)


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about 500 points: of each stretch its least and its greatest, so that no peak is lost."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    width = math.ceil(len(points) / (_MOST_POINTS // 2))
    kept: list[tuple[float, float]] = [points[0]]
    for start in range(0, len(points), width):
        part = points[start : start + width]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]
