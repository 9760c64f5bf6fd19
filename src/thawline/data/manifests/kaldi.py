"""Kaldi directories: wav.scp and text, perhaps segments, utt2spk and utt2dur."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from thawline.data.manifests.rows import Placed, Rows, absolute, lines_of, nfc, seconds_of
from thawline.data.utterance import Utterance, as_pipe
from thawline.errors import DataError


def kaldi(rows: Rows, path: Path) -> Iterator[Placed]:
    """The utterances of the directory `path`."""
    for name in ("wav.scp", "text") if rows.text_required else ("wav.scp",):
        if not (path / name).is_file():
            raise DataError(f"a Kaldi directory needs {name!r}", where=str(path))
    recordings = _table(rows, path / "wav.scp")
    texts = _table(rows, path / "text") if (path / "text").is_file() else {}
    speakers = _table(rows, path / "utt2spk") if (path / "utt2spk").is_file() else {}
    durations = _table(rows, path / "utt2dur") if (path / "utt2dur").is_file() else {}
    segments: Iterable[tuple[str, str, str, float | None, float | None]]
    if (path / "segments").is_file():
        segments = _segments(rows, path / "segments")
    else:
        segments = ((where, key, key, None, None) for key, (where, _) in recordings.items())
    for where, key, recording, start, end in segments:
        if recording not in recordings:
            rows.refuse(DataError(f"the recording {recording!r} is not in wav.scp", where=where))
            continue
        if key not in texts and rows.text_required:
            rows.refuse(
                DataError(
                    f"the utterance {key!r} has no line in {path / 'text'}",
                    where=where,
                    fix="run Kaldi's utils/fix_data_dir.sh, or add the line",
                )
            )
            continue
        try:
            wav = _wav(rows, recordings[recording][1], path, recordings[recording][0])
        except DataError as error:
            rows.refuse(error)
            continue
        duration = end - start if start is not None and end is not None else None
        if duration is None and key in durations:
            measured_at, known = durations[key]
            try:
                duration = seconds_of({"utt2dur": known}, ("utt2dur",), measured_at)
            except DataError as error:
                rows.refuse(error)
                continue
        yield (
            where,
            Utterance(
                key=key,
                wav=wav,
                txt=texts.get(key, ("", ""))[1],
                speaker=speakers.get(key, ("", ""))[1],
                start_s=start,
                end_s=end,
                duration_s=duration,
            ),
        )


def _table(rows: Rows, path: Path) -> dict[str, tuple[str, str]]:
    """key -> (where, the rest of the line)"""
    table: dict[str, tuple[str, str]] = {}
    for number, line in lines_of(path):
        if not line:
            continue
        key, _, rest = line.partition(" ") if "\t" not in line.split(" ", 1)[0] else line.partition("\t")
        key, where = nfc(key), f"{path}:{number}"
        if key in table:
            rows.refuse(DataError(f"the key {key!r} is there twice; first at {table[key][0]}", where=where))
            continue
        # A command or path is not normalised; texts and speakers are.
        table[key] = (where, rest.strip() if path.name == "wav.scp" else nfc(rest))
    return table


def _segments(rows: Rows, path: Path) -> Iterator[tuple[str, str, str, float | None, float | None]]:
    for number, line in lines_of(path):
        if not line:
            continue
        where, cells = f"{path}:{number}", line.split()
        try:
            key, recording, start, end = cells[0], cells[1], float(cells[2]), float(cells[3])
        except (IndexError, ValueError):
            rows.refuse(DataError(f"not a segment: {line[:60]!r}", where=where, fix="UTTERANCE RECORDING START END"))
            continue
        if len(cells) > 4:
            rows.refuse(
                DataError(
                    f"a segment of one channel ({cells[4]!r}) is not read",
                    where=where,
                    fix="write each channel as a recording of its own, and leave the fifth column out",
                )
            )
            continue
        if not (0 <= start < float("inf") and (end == -1 or 0 <= end < float("inf"))):
            rows.refuse(DataError(f"not times in seconds: {cells[2]} and {cells[3]}", where=where))
            continue
        if end != -1 and end <= start:
            rows.refuse(DataError(f"the segment ends at {end:g} s, before it starts at {start:g} s", where=where))
            continue
        yield where, nfc(key), nfc(recording), start, None if end == -1 else end  # -1: to the end, in Kaldi


def _wav(rows: Rows, entry: str, root: Path, where: str) -> str:
    if not entry:
        raise DataError("no audio path after the key", where=where, fix="write: KEY PATH")
    if entry.endswith("|"):
        if not rows.allow_pipes:
            raise DataError(
                f"wav.scp names a shell command, which is not run: {entry[:80]!r}",
                where=where,
                fix="convert the audio to files, or allow pipes if you trust this list",
            )
        return as_pipe(entry[:-1].strip())
    if re.search(r"\.ark:\d+$", entry):
        raise DataError(
            f"audio inside a Kaldi archive is not read: {entry[:80]!r}",
            where=where,
            fix="write files with Kaldi's wav-copy, or name the original files",
        )
    return absolute(entry, root, where)
