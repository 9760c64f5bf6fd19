"""The mistakes of a recogniser as one page: each utterance's alignment beside its sound. No other file is needed."""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from thawline.data.audio import decode
from thawline.data.utterance import TarRef, Utterance, pipe_command
from thawline.errors import DataError
from thawline.tasks.scoring import confusions

_KINDS = {
    ".wav": "audio/wav", ".mp3": "audio/mpeg", ".ogg": "audio/ogg", ".opus": "audio/ogg", ".flac": "audio/flac",
    ".m4a": "audio/mp4",
}  # fmt: skip
SOUND_BYTES = 1_000_000
"""A longer encoded recording is not put into the page."""
PAGE_BYTES = 24_000_000
"""Once so many bytes of sound are in the page, the rest is named only. Worst utterances come first."""

_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .5rem 0 1.5rem }
th, td { text-align: left; padding: .15rem .8rem .15rem 0; vertical-align: top }
.n { text-align: right; font-variant-numeric: tabular-nums }
section { border-top: 1px solid #8884; padding: .8rem 0 }
.words { display: flex; flex-wrap: wrap; gap: .35rem; margin: .4rem 0 }
.w { display: grid; border-radius: .3rem; padding: 0 .35rem }
.w span:empty::before { content: "\\2205"; opacity: .4 }
.substitute { background: #e6a70040 } .delete { background: #d0342c40 } .insert { background: #2c6fd040 }
audio { height: 2rem; max-width: 100% }
small { opacity: .7 }
"""


def error_table(rows: Sequence[Mapping[str, Any]], *, most: int = 20) -> dict[str, Any]:
    """The commonest substitutions, deletions and insertions over the rows of an evaluation."""
    return confusions([row["alignment"] for row in rows], most=most)


def evaluation_page(
    rows: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, float],
    utterances: Mapping[str, Utterance],
    *,
    title: str,
) -> str:
    """HTML of an evaluation: figures, the commonest errors, and every utterance with its alignment, worst first.

    utterances: key -> where its sound is; a key that is not there has no sound in the page
    """
    spent = 0
    sections: list[str] = []
    for row in sorted(rows, key=lambda r: (-r["errors"], r["key"])):
        sound, size = _sound(utterances.get(row["key"]), PAGE_BYTES - spent)
        spent += size
        words = "".join(_word(word) for word in row["alignment"])
        why = f"<small>not read: {escape(str(row['unreadable']))}</small>" if row.get("unreadable") else ""
        sections.append(
            f"<section><b>{escape(row['key'])}</b> <small>{row['errors']} wrong</small> {sound}{why}"
            f'<div class="words">{words}</div></section>'
        )
    figures = "".join(
        f'<tr><th>{escape(name)}</th><td class="n">{_figure(name, value)}</td></tr>' for name, value in metrics.items()
    )
    table = error_table(rows)
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style><body><h1>{escape(title)}</h1>"
        f"<table>{figures}</table><h2>Commonest errors</h2>{_tables(table)}"
        f"<h2>Utterances, worst first</h2>{''.join(sections)}</body></html>\n"
    )
    return page.encode("utf-8", "backslashreplace").decode()  # a byte of a name that is not UTF-8: \udcXX, as in JSON


def _figure(name: str, value: float) -> str:
    return f"{value:.2%}" if name in ("wer", "cer") else f"{value:g}"


def _tables(table: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    out = ""
    for kind, found in table.items():
        lines = "".join(
            f'<tr class="{kind}"><td class="n">{row["count"]}</td><td>{escape(row["ref"])}</td>'
            f"<td>{escape(row['hyp'])}</td></tr>"
            for row in found
        )
        out += (
            f"<h3>{kind}</h3><table><tr><th>times</th><th>said</th><th>heard</th></tr>{lines}</table>" if lines else ""
        )
    return out or "<p>none</p>"


def _word(word: Mapping[str, str]) -> str:
    second = "" if word["op"] == "equal" else f"<span>{escape(word['hyp'])}</span>"
    return f'<span class="w {word["op"]}"><span>{escape(word["ref"])}</span>{second}</span>'


def _sound(utterance: Utterance | None, budget: int) -> tuple[str, int]:
    """An audio element with the sound in it, and its bytes; words where it cannot be or is too large."""
    if utterance is None:
        return "", 0
    try:
        kind, data = _encoded(utterance)
    except (DataError, OSError) as error:
        what = error.what if isinstance(error, DataError) else str(error)
        return f"<small>no sound: {escape(what)}</small>", 0
    if len(data) > min(SOUND_BYTES, budget):
        return f"<small>sound left out, {len(data) / 1e6:.1f} MB: {escape(utterance.wav)}</small>", 0
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return f'<audio controls preload="none" src="{source}"></audio>', len(data)


def _encoded(utterance: Utterance) -> tuple[str, bytes]:
    """The recording's own bytes where it is a whole small file that browsers play, else its stretch as 16-bit wav."""
    wav = utterance.wav
    plain = TarRef.parse(wav) is None and pipe_command(wav) is None
    kind = _KINDS.get(Path(wav).suffix.lower())
    if plain and kind and utterance.start_s is None and utterance.end_s is None:
        path = Path(wav)
        if path.stat().st_size <= SOUND_BYTES:
            return kind, path.read_bytes()
    samples, rate = decode(wav, start_s=utterance.start_s, end_s=utterance.end_s)
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return "audio/wav", out.getvalue()
