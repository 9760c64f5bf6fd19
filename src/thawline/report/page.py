"""One self-contained HTML page about a run, read from its directory: no script, no other file, nothing fetched.

Works for any task, for a run that is under way, stopped or finished, and after a kill in the middle of a line. What
only a model can say (a confusion matrix, the worst mistakes) comes in as plain data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from thawline.ckpt.store import atomic_file
from thawline.errors import RecipeError
from thawline.report.charts import Line, Mark, line_chart, matrix, number, smoothed, table
from thawline.train.rundir import RunDirectory, read_rows

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2329;--soft:#68727c;--ground:#fff;--line:#d9dee3;--good:#2a8a4a;--bad:#b03030}
@media(prefers-color-scheme:dark){:root{--ink:#e4e8ec;--soft:#97a1ab;--ground:#15191d;--line:#323a42}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--ground);max-width:1180px;margin:2em auto;
padding:0 1em}h1{font-size:1.5em;margin:0}h2{font-size:1.1em;margin:2em 0 .6em;border-bottom:1px solid var(--line)}
p.soft,.soft{color:var(--soft)}.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(440px,1fr));gap:1em}
svg{width:100%;height:auto}svg text{font:11px system-ui,sans-serif;fill:var(--soft)}svg .title{font-weight:600;
fill:var(--ink);font-size:12px}svg .grid{stroke:var(--line);fill:none}svg .mark{stroke:var(--soft);
stroke-dasharray:4 3;fill:none}svg .line{fill:none;stroke-width:1.6;stroke-linejoin:round}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.2em .7em;text-align:left;
border-bottom:1px solid var(--line)}table.matrix td{text-align:center;min-width:2em;padding:.25em}
table.matrix th{padding:.25em .5em;font-weight:500}th.turned{height:6.5em;vertical-align:bottom}th.turned span{
writing-mode:vertical-rl;transform:rotate(180deg)}.good{color:var(--good);font-weight:600}.bad{color:var(--bad);
font-weight:600}pre{background:color-mix(in srgb,var(--line) 30%,transparent);padding:.8em;overflow-x:auto;
font-size:13px}.figures{display:flex;flex-wrap:wrap;gap:1.6em;margin:1em 0}.figures b{display:block;font-size:1.5em}
.grid-of-images{display:grid;grid-template-columns:repeat(auto-fill,minmax(118px,1fr));gap:.9em}figure{margin:0}
figure img{width:100%;image-rendering:pixelated;border-radius:3px}figcaption{font-size:12px;line-height:1.35}
"""


def write_page(directory: Path, *, out: Path | None = None, review: Mapping[str, Any] | None = None) -> Path:
    """Write the page of the run in `directory` to `out` (default: report.html in it), whole or not at all.

    review: {"metrics", "classes", "confusion", "mistakes"} of a classifier, or {"missing": why there is none}
    Raises RecipeError where `directory` is no run.
    """
    files = RunDirectory(directory.absolute())
    if not files.begun:
        raise RecipeError(f"{str(directory)!r} is not a run directory", fix="it would hold recipe.yaml and base.json")
    target = out if out is not None else files.path / "report.html"
    with atomic_file(target, force=True) as handle:
        handle.write(page(files, review).encode("utf-8", "backslashreplace"))  # names need not be UTF-8
    return target


def page(files: RunDirectory, review: Mapping[str, Any] | None = None) -> str:
    """The page as text."""
    rows, events = read_rows(files.metrics), read_rows(files.events)
    steps = [row for row in rows if "loss" in row]
    scores = [row for row in rows if any(key.startswith("valid/") for key in row)]
    parts = [
        _head(files, steps, scores, events),
        _section("Curves", _curves(steps, scores, events, read_rows(files.speed))),
        _section("Phases", _phases(events)),
        _section("What changed", _audit(files)),
        _review(review) if review else "",
        _section("Evaluations", table([_rounded(row) for row in scores])),
        _section("What happened", _happenings(events)),
        _section("Recipe", f"<pre>{escape(files.recipe.read_text(encoding='utf-8'))}</pre>"),
    ]
    title = escape(files.path.name)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _head(
    files: RunDirectory,
    steps: Sequence[Mapping[str, Any]],
    scores: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
) -> str:
    last = events[-1] if events else {}
    if files.finished:
        state = '<span class="good">finished</span>'
    elif last.get("event") == "stopped":
        state = f'<span class="bad">stopped</span>: {escape(str(last.get("reason", "")))}'
    else:
        state = "under way, or ended without a word"
    figures = [("steps", steps[-1]["step"] if steps else 0), ("epochs", steps[-1]["epoch"] if steps else 0.0)]
    figures += [(k, v) for k, v in (scores[-1] if scores else {}).items() if k.startswith("valid/")]
    shown = "".join(
        f"<div><b>{escape(number(v) if isinstance(v, (int, float)) else str(v))}</b>{escape(k)}</div>"
        for k, v in figures
    )
    begun = f" · begun {escape(str(events[0]['time']))}" if events and "time" in events[0] else ""
    return (
        f'<h1>{escape(files.path.name)}</h1><p class="soft">{state}{begun}</p><div class="figures">{shown}</div>'
        f'<p class="soft">Figures named valid/ are of the last evaluation.</p>'
    )


def _curves(
    steps: Sequence[Mapping[str, Any]],
    scores: Sequence[Mapping[str, Any]],
    events: Sequence[Mapping[str, Any]],
    speed: Sequence[Mapping[str, Any]],
) -> str:
    marks = [Mark(float(e["step"]), f"phase {e['phase']}") for e in _entered(events)]
    loss = _points(steps, "loss")
    charts = [
        line_chart(
            "loss",
            [
                Line("training", loss, faint=True),
                Line("training, smoothed", smoothed(loss)),
                Line("held back", _points(scores, "valid/loss")),
            ],
            marks=marks,
        )
    ]
    names = dict.fromkeys(k for row in scores for k in row if k.startswith("valid/"))
    for name in names:
        short = name.removeprefix("valid/")
        if short == "loss" or _is_constant(_points(scores, name), short):
            continue
        lines = [Line("held back", _points(scores, name))]
        if any(short in row for row in steps):
            lines.insert(0, Line("training, smoothed", smoothed(_points(steps, short))))
        charts.append(line_chart(short, lines, marks=marks))
    charts.append(line_chart("learning rate", [Line("lr", _points(steps, "lr"))], marks=marks))
    norm = _points(steps, "grad_norm")
    charts.append(
        line_chart(
            "gradient norm before clipping",
            [Line("raw", norm, faint=True), Line("smoothed", smoothed(norm))],
            marks=marks,
        )
    )
    charts.append(line_chart("samples a second", [Line("rate", _points(speed, "samples_per_s"))]))
    return f'<div class="charts">{"".join(f"<div>{chart}</div>" for chart in charts if chart)}</div>'


def _is_constant(points: Sequence[tuple[float, float]], name: str) -> bool:
    """Counts such as images or utterances are the same every time and tell nothing as a curve."""
    return name in ("images", "utterances", "words") and len({y for _, y in points}) <= 1


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of every row that has a number there; a loss that was not finite is a word."""
    return [(float(row["step"]), float(row[key])) for row in rows if isinstance(row.get(key), (int, float))]


def _entered(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Each phase once: a run that was killed after entering one enters it again."""
    return list({(e["step"], e["phase"]): e for e in events if e["event"] == "phase"}.values())


def _phases(events: Sequence[Mapping[str, Any]]) -> str:
    rows = [{"phase": e["phase"], "from step": e["step"], "tensors that train": e["trains"]} for e in _entered(events)]
    return table(rows) if rows else '<p class="soft">One phase from beginning to end.</p>'


def _audit(files: RunDirectory) -> str:
    if not files.audit.is_file():
        return '<p class="soft">Not audited yet: the run has not ended.</p>'
    report = json.loads(files.audit.read_text(encoding="utf-8"))
    found = [
        {"finding": key.replace("_", " "), "tensors": len(names), "first": ", ".join(names[:6])}
        for key, names in report.items()
        if isinstance(names, list) and names
    ]
    verdict = (
        '<span class="bad">The plan law is broken.</span>'
        if report["broken"]
        else '<span class="good">The plan law holds.</span>'
    )
    return (
        f"<p>{verdict} {report['frozen']} frozen parameters and {report['buffers']} buffers were compared bit for bit; "
        f"{report['trained']} parameters were to train.</p>{table(found)}"
    )


def _review(review: Mapping[str, Any]) -> str:
    if "missing" in review:
        return _section("Mistakes", f'<p class="soft">{escape(str(review["missing"]))}</p>')
    metrics = "  ·  ".join(f"{escape(k)} {number(v)}" for k, v in review["metrics"].items())
    text = f'<p class="soft">The exported model on {escape(str(review["data"]))}: {metrics}</p>'
    pictures = "".join(
        f'<figure><img alt="{escape(m["key"])}" src="{escape(m["image"])}"><figcaption title="{escape(m["key"])}">'
        f"is <b>{escape(m['label'])}</b> ({m['label_probability']:.0%})<br>taken for <b>{escape(m['predicted'])}</b> "
        f"({m['probability']:.0%})</figcaption></figure>"
        for m in review["mistakes"]
    )
    return _section(
        "Confusion matrix",
        text
        + '<p class="soft">Rows: what an image is; columns: what it was taken for.</p>'
        + matrix(review["classes"], review["confusion"]),
    ) + _section("Worst mistakes", f'<div class="grid-of-images">{pictures}</div>' if pictures else "<p>None.</p>")


def _happenings(events: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for event in events:
        rest = {k: v for k, v in event.items() if k not in ("time", "event", "step", "environment", "data")}
        words = "; ".join(f"{k} {_short(v)}" for k, v in rest.items())
        rows.append({"time": event.get("time", ""), "event": event["event"], "step": event.get("step", ""), "": words})
    if len(rows) > 200:
        left_out = len(rows) - 200
        return f'<p class="soft">{left_out} in the middle left out.</p>' + table([*rows[:100], *rows[-100:]])
    return table(rows)


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 160 else text[:157] + "..."


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: number(v) if isinstance(v, (int, float)) and math.isfinite(v) else v for k, v in row.items()}
