"""A look at speech data before training on them: what there is, what cannot be read, and what would go wrong later.

Every file is decoded once. Nothing is changed or left out; the report is a plain value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from blake3 import blake3

from thawline.data.audio import decode, duration_s
from thawline.data.manifest import Format, Manifest, read_manifest
from thawline.data.speech import LONGEST_S
from thawline.data.speech_frontend import SpeechFrontend
from thawline.data.targets import conv2d_frames, ctc_frames_needed
from thawline.data.text import CharTokenizer, Tokenizer, read_units
from thawline.data.utterance import Utterance
from thawline.errors import DataError

_EDGES_S = (0, 0.5, 1, 2, 5, 10, 15, 20, 30, 60, 600, float("inf"))
_SHOWN = 20  # rows of each kind of finding in the table; the JSON holds all
_LOUDEST = 16.0  # of full scale; a little more than 1 is clipping that floating point survived
_TOLERANCE_S = 0.1  # a list may round its durations


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to look at. kind: row | file | long | scale | duration | ctc | leak; where: file:line, path or key."""

    kind: str
    where: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """What `check_data` found.

    histogram:  number of utterances by length in seconds, "from-to" in order
    rates_hz:   number of utterances by sample rate
    unknown:    token -> how often it occurs, for tokens outside the vocabulary
    overlap:    speakers and texts that training and held-back data share: for information, not findings
    """

    path: str
    format: str
    utterances: int
    hours: float
    speakers: int
    histogram: Mapping[str, int]
    rates_hz: Mapping[int, int]
    characters: int
    empty_texts: int
    tokens: int | None = None
    unknown: Mapping[str, int] = field(default_factory=dict)
    overlap: Mapping[str, int] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    @property
    def bad(self) -> tuple[Finding, ...]:
        """Rows and files that cannot be used."""
        return tuple(f for f in self.findings if f.kind in ("row", "file"))

    def to_json(self) -> dict[str, Any]:
        """Plain values, all findings."""
        return asdict(self) | {"rates_hz": {str(k): v for k, v in self.rates_hz.items()}}

    def table(self) -> str:
        """The report as text."""
        lines = [
            f"{self.path}: {self.format}, {self.utterances} utterances, {self.hours:.2f} hours"
            + (f", {self.speakers} speakers" if self.speakers else ""),
            f"  sample rates   {', '.join(f'{hz} Hz: {n}' for hz, n in self.rates_hz.items())}",
            f"  characters     {self.characters} different; {self.empty_texts} empty texts",
            "  length (s)",
        ]
        most = max(self.histogram.values(), default=1)
        lines += [f"    {name:>10} {n:7d} {'#' * round(40 * n / most)}" for name, n in self.histogram.items()]
        if self.tokens is not None:
            missing = sum(self.unknown.values())
            share = missing / self.tokens if self.tokens else 0.0
            lines.append(f"  vocabulary     {missing} of {self.tokens} tokens ({share:.2%}) are outside it")
            top = sorted(self.unknown.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]
            if top:
                lines.append(f"    {', '.join(f'{token!r} {n}' for token, n in top)}")
        for what, n in self.overlap.items():
            lines.append(f"  shared         {n} {what} are in both sets")
        for kind, title in _TITLES.items():
            found = [f for f in self.findings if f.kind == kind]
            if found:
                lines.append(f"  {title}: {len(found)}")
                lines += [f"    {f.where}: {f.what}" for f in found[:_SHOWN]]
                if len(found) > _SHOWN:
                    lines.append(f"    and {len(found) - _SHOWN} more (--json lists all)")
        if not self.findings:
            lines.append("  nothing to complain of")
        return "\n".join(lines)


_TITLES = {
    "row": "rows that cannot be used",
    "file": "files that cannot be read",
    "long": "recordings to be cut into segments first",
    "scale": "recordings of an impossible loudness",
    "duration": "durations that differ from the list",
    "ctc": "targets too long for CTC",
    "leak": "held-back data that training sees",
}


def check_data(
    path: Path,
    *,
    valid: Path | None = None,
    units: Path | None = None,
    tokenizer: Tokenizer | None = None,
    frontend: SpeechFrontend | None = None,
    encoder_frames: Callable[[int], int] | None = conv2d_frames,
    format: Format = "auto",
    allow_pipes: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Check the data at `path`.

    valid:       held-back data; what stands in both is reported as a leak
    units:       a units.txt whose characters the texts should be spelled in; or give a `tokenizer`
    frontend:    how the model hears; None is 80 filter banks at 16 kHz
    encoder_frames: how many the encoder gives for so many frames of features: with a vocabulary, targets that need more
                 are reported, which a CTC loss with zero_infinity would hide; None is a model without CTC
    allow_pipes: run the shell commands that a Kaldi wav.scp names
    progress:    called with (files read, files in all)

    Raises DataError where there is no data at all. A single bad row or file is a finding.
    """
    findings: list[Finding] = []
    manifest = _read(path, format, findings, allow_pipes=allow_pipes)
    if tokenizer is None and units is not None:
        tokenizer = CharTokenizer(read_units(units))
    hearing = frontend or SpeechFrontend()
    held_back = _read(valid, "auto", findings, allow_pipes=allow_pipes) if valid is not None else None
    total = len(manifest) + (len(held_back) if held_back is not None else 0)
    sounds: dict[str, str] = {}
    seconds: list[float] = []
    rates: Counter[int] = Counter()
    unknown: Counter[str] = Counter()
    tokens = 0
    for i, row in enumerate(manifest):
        if progress is not None:
            progress(i, total)
        ids = _tokens(tokenizer, row, findings)
        if tokenizer is not None and ids is not None:
            tokens += len(ids)
            unknown.update(tokenizer.unknown(row.txt))
        heard = _hear(row, findings)
        if heard is None:
            continue
        length_s, rate, sound = heard
        seconds.append(length_s)
        rates[rate] += 1
        sounds.setdefault(sound, row.key)
        if ids is not None and encoder_frames is not None:
            _check_ctc(row, ids, encoder_frames(hearing.n_frames(length_s)), findings)
    overlap: dict[str, int] = {}
    if held_back is not None:
        _check_leaks(manifest, held_back, sounds, findings)
        overlap = _overlap(manifest, held_back)
    return DataReport(
        path=str(path),
        format=manifest.format,
        utterances=len(manifest),
        hours=sum(seconds) / 3600,
        speakers=len({r.speaker for r in manifest if r.speaker}),
        histogram=_histogram(seconds),
        rates_hz=dict(sorted(rates.items())),
        characters=len({c for r in manifest for c in r.txt}),
        empty_texts=sum(not r.txt for r in manifest),
        tokens=tokens if tokenizer is not None else None,
        unknown=dict(sorted(unknown.items(), key=lambda item: (-item[1], item[0]))),
        overlap=overlap,
        findings=tuple(findings),
    )


def _read(path: Path, format: Format, findings: list[Finding], *, allow_pipes: bool) -> Manifest:
    def report(error: DataError) -> None:
        findings.append(Finding("row", error.where, error.what))

    return read_manifest(path, format=format, report=report, allow_pipes=allow_pipes)


def _tokens(tokenizer: Tokenizer | None, row: Utterance, findings: list[Finding]) -> list[int] | None:
    if tokenizer is None:
        return None
    try:
        return tokenizer.encode(row.txt)
    except DataError as error:
        findings.append(Finding("row", row.key, error.what))
        return None


def _hear(row: Utterance, findings: list[Finding]) -> tuple[float, int, str] | None:
    """Seconds, rate in Hz and a digest of the samples; None where it cannot be read."""
    try:
        seconds = duration_s(row)
        if seconds > LONGEST_S:
            findings.append(Finding("long", row.wav, f"{seconds / 3600:.2f} hours in one utterance; not decoded here"))
            return None
        samples, rate = decode(row.wav, start_s=row.start_s, end_s=row.end_s)
    except (DataError, OSError) as error:
        what = error.what if isinstance(error, DataError) else str(error)
        findings.append(Finding("file", row.wav, what))
        return None
    seconds = samples.size / rate
    peak = max(float(samples.max()), -float(samples.min()))
    if peak > _LOUDEST:
        what = f"samples reach {peak:g} where 1 is full scale; were whole numbers written as floating point?"
        findings.append(Finding("scale", row.wav, what))
    if row.duration_s is not None and abs(seconds - row.duration_s) > max(_TOLERANCE_S, 0.02 * seconds):
        ratio = row.duration_s / seconds
        hint = "; is the sample rate in its header right?" if abs(ratio - round(ratio, 1)) < 0.02 else ""
        findings.append(Finding("duration", row.wav, f"{seconds:.2f} s, the list says {row.duration_s:.2f} s{hint}"))
    return seconds, rate, str(blake3(samples.tobytes()).hexdigest(16))


def _check_ctc(row: Utterance, ids: Sequence[int], frames: int, findings: list[Finding]) -> None:
    needed = ctc_frames_needed(ids)
    if needed > frames:
        what = f"{len(ids)} tokens need {needed} encoder frames, it has {frames}"
        findings.append(Finding("ctc", row.key, what))


def _check_leaks(train: Manifest, valid: Manifest, sounds: Mapping[str, str], findings: list[Finding]) -> None:
    keys = {r.key for r in train}
    places = {(r.wav, r.start_s, r.end_s) for r in train}
    for row in valid:
        if row.key in keys:
            findings.append(Finding("leak", row.key, "this key is in both sets"))
        elif (row.wav, row.start_s, row.end_s) in places:
            findings.append(Finding("leak", row.key, f"the same file is in both sets: {row.wav}"))
        else:
            heard = _hear(row, findings)
            if heard is not None and heard[2] in sounds:
                findings.append(Finding("leak", row.key, f"the same recording is in training as {sounds[heard[2]]}"))


def _overlap(train: Manifest, valid: Manifest) -> dict[str, int]:
    speakers = {r.speaker for r in train if r.speaker} & {r.speaker for r in valid}
    texts = {r.txt for r in train if r.txt} & {r.txt for r in valid}
    return {"speakers": len(speakers), "texts": len(texts)}


def _histogram(seconds: Sequence[float]) -> dict[str, int]:
    counts = {f"{low:g}-{high:g}": sum(low <= s < high for s in seconds) for low, high in pairwise(_EDGES_S)}
    used = [i for i, n in enumerate(counts.values()) if n]
    return dict(list(counts.items())[: used[-1] + 1]) if used else {}
