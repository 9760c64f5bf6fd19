"""What utterances there are: lists and folders of many kinds become one sequence of plain rows.

Formats: WeNet raw lists and shard (tar) lists, Kaldi directories, Hugging Face AudioFolder, Common Voice tables, a
plain folder with `.txt` beside the audio, JSON lines. No audio is decoded here and torch is not imported; tar shards
are indexed once, so that a sample is later read by offset.

Policy for text and keys, the same for every format: UTF-8 with or without a byte order mark, Unix or Windows line ends,
surrounding white space removed, Unicode normalised to NFC (a decomposed "e" + accent and the composed letter are the
same text, and would otherwise be two units). Paths are left as written: a file system may hold either form. A relative
path is relative to the folder of the list that names it. A present but empty text is kept (silence may be meant); a
missing one is an error unless `text="optional"`.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
import re
import tarfile
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

from blake3 import blake3

from thawline.errors import DataError

Format = Literal["auto", "raw", "shard", "kaldi", "audiofolder", "commonvoice", "folder", "jsonl"]

FORMATS: Mapping[str, str] = {
    "raw": "WeNet raw list: one JSON object a line with key, wav, txt",
    "shard": "WeNet shard list: one path of a .tar a line, members KEY.wav and KEY.txt",
    "kaldi": "Kaldi directory: wav.scp and text, perhaps segments and utt2spk",
    "audiofolder": "Hugging Face AudioFolder: metadata.csv or metadata.jsonl with file_name and text",
    "commonvoice": "Common Voice table: .tsv with path and sentence, audio in clips/ beside it",
    "folder": "plain folder: audio files, each with a .txt of the same name beside it",
    "jsonl": ".jsonl: one JSON object a line with an audio path and a text",
}
"""Every format by name with what it looks like; messages list them from here."""

AUDIO_SUFFIXES = frozenset(
    (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".wma", ".aiff", ".aif", ".webm", ".mp4")
)

_KEY_NAMES = ("key", "id", "utt_id", "utt")
_WAV_NAMES = ("wav", "audio_filepath", "audio", "file_name", "path", "file")
_TXT_NAMES = ("txt", "text", "sentence", "transcription", "transcript")
_TAR_REF = re.compile(r"(?P<tar>.+)!/(?P<member>.+)@(?P<offset>\d+)\+(?P<size>\d+)", re.DOTALL)
_PIPE = "pipe:"
_INDEX_VERSION = 1

Report = Callable[[DataError], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Utterance:
    """One recording, or a stretch of one, with its text.

    key:        unique name
    wav:        absolute path; or a member of a tar (see TarRef); or a command (only from a Kaldi directory, if allowed)
    txt:        transcript, NFC; "" where none is known
    speaker:    "" where unknown
    start_s, end_s: the stretch of `wav` that is meant, in seconds; None is its begin or end
    duration_s: seconds of that stretch, None until measured (`fill_durations`)
    lang, task: "" where the list does not say
    """

    key: str
    wav: str
    txt: str = ""
    speaker: str = ""
    start_s: float | None = None
    end_s: float | None = None
    duration_s: float | None = None
    lang: str = ""
    task: str = ""


@dataclass(frozen=True, slots=True)
class TarRef:
    """Bytes of one member of an uncompressed tar, found without reading the tar: `PATH.tar!/MEMBER@OFFSET+SIZE`."""

    tar: str
    member: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.tar}!/{self.member}@{self.offset}+{self.size}"

    @classmethod
    def parse(cls, wav: str) -> TarRef | None:
        """The reference that `wav` spells, or None for an ordinary path."""
        found = _TAR_REF.fullmatch(wav)
        if found is None:
            return None
        return cls(found["tar"], found["member"], int(found["offset"]), int(found["size"]))


def pipe_command(wav: str) -> str | None:
    """The shell command that `wav` stands for, or None for a file. Only `read_manifest(allow_pipes=True)` makes one."""
    return wav.removeprefix(_PIPE) if wav.startswith(_PIPE) else None


class Manifest(Sequence[Utterance]):
    """Utterances in the order of their list; immutable.

    path:        the list or folder it was read from
    format:      which of FORMATS it was
    fingerprint: BLAKE3 over every row (key, path below the list's folder, text, stretch); the same data moved to
                 another folder keeps its fingerprint
    """

    __slots__ = ("_rows", "fingerprint", "format", "path")

    def __init__(self, rows: Iterable[Utterance], *, path: Path, format: str) -> None:
        self._rows = tuple(rows)
        self.path = path
        self.format = format
        self.fingerprint = _fingerprint(self._rows, path if path.is_dir() else path.parent)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Utterance: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Utterance]: ...
    def __getitem__(self, index: int | slice) -> Utterance | Sequence[Utterance]:
        return self._rows[index]

    def __iter__(self) -> Iterator[Utterance]:
        return iter(self._rows)

    def __repr__(self) -> str:
        return f"Manifest({self.path}, {self.format}, {len(self)} utterances)"

    def keep(self, indices: Iterable[int]) -> Manifest:
        """A manifest of these rows, in this order."""
        return Manifest((self._rows[i] for i in indices), path=self.path, format=self.format)


def read_manifest(
    path: Path,
    *,
    format: Format = "auto",
    text: Literal["required", "optional"] = "required",
    allow_pipes: bool = False,
    cache: Path | None = None,
    report: Report | None = None,
) -> Manifest:
    """Read the utterances that `path` (a file or a folder) lists.

    format:      one of FORMATS, or "auto" to tell by content
    text:        "required" makes a row without text an error; "optional" is for recognition without references
    allow_pipes: a Kaldi wav.scp may name shell commands; they run when read, so they are refused unless allowed
    cache:       folder for the indexes of tar shards; None is beside each shard. A folder that cannot be written is
                 left alone and the shard is indexed again next time
    report:      called with each bad row, which is then left out; None raises at the first one

    Raises DataError (exit code 3): nothing there (with near names), no known format (with those looked for), empty, not
    UTF-8, a bad row, two rows of one key; always with file:line.
    """
    path = Path(path)
    if not path.exists():
        raise _missing(path)
    absolute = Path(os.path.abspath(path))
    kind: str = format
    if format == "auto":
        absolute, kind = _sniff(absolute)
    elif format not in FORMATS:
        raise DataError(f"there is no data format {format!r}", fix=f"one of: {', '.join(FORMATS)}")
    reader = _Reader(text == "required", allow_pipes, cache, report)
    rows = list(reader.unique(_READERS[kind](reader, absolute)))
    if not rows:
        raise DataError(
            f"there are no utterances in this {FORMATS[kind].split(':')[0]}",
            where=str(path),
            fix="check that the list was written, and that its audio lies where it says",
        )
    _check_root(rows, absolute)
    return Manifest(rows, path=absolute, format=kind)


def fill_durations(
    manifest: Manifest, measure: Callable[[Utterance], float], *, report: Report | None = None
) -> Manifest:
    """The same manifest with `duration_s` of every row known; `measure` (`audio.duration_s`) reads one header.

    Rows that cannot be measured are given to `report` and left out; without `report` the first one raises.
    """
    rows: list[Utterance] = []
    for row in manifest:
        if row.duration_s is None:
            try:
                row = replace(row, duration_s=measure(row))
            except DataError as error:
                if report is None:
                    raise
                report(error)
                continue
        rows.append(row)
    return Manifest(rows, path=manifest.path, format=manifest.format)


# --- what is it -------------------------------------------------------------------------------------------------------


def _missing(path: Path) -> DataError:
    parent = path.parent
    while not parent.exists() and parent != parent.parent:
        path, parent = parent, parent.parent
    try:
        siblings = sorted(p.name for p in parent.iterdir())
    except (PermissionError, NotADirectoryError):
        siblings = []
    near = difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.5)
    there = near or siblings[:5]
    fix = f"{'near it' if near else 'there'} {'is' if len(there) == 1 else 'are'}: {', '.join(there)}"
    return DataError(
        f"there is no {path.name!r} in {parent}",
        where=str(path),
        fix=fix if there else "check the path; a path in a recipe is relative to the recipe",
    )


def _sniff(path: Path) -> tuple[Path, str]:
    """The file or folder to read and its format."""
    if path.is_dir():
        return _sniff_folder(path)
    name = path.name.lower()
    if name == "wav.scp":
        return path.parent, "kaldi"
    if name in ("metadata.csv", "metadata.jsonl"):
        return path, "audiofolder"
    if name.endswith(".tsv"):
        return path, "commonvoice"
    if name.endswith(".tar"):
        return path, "shard"
    if name.endswith(".jsonl"):
        return path, "jsonl"
    if path.suffix.lower() in AUDIO_SUFFIXES:
        raise DataError("this is an audio file, not a list of them", where=str(path), fix="give its folder, or a list")
    first = next((line for _, line in _lines(path) if line), "")
    if first.startswith("{"):
        return path, "raw"
    if first.endswith(".tar"):
        return path, "shard"
    if not first:
        raise DataError("the list is empty", where=str(path), fix="check that the list was written")
    raise _unknown(path, f"its first line is {first[:60]!r}")


def _sniff_folder(path: Path) -> tuple[Path, str]:
    for name, format in (
        ("data.list", ""),
        ("wav.scp", "kaldi"),
        ("metadata.csv", "audiofolder"),
        ("metadata.jsonl", "audiofolder"),
    ):
        if (path / name).is_file():
            return (path, format) if format == "kaldi" else _sniff(path / name) if not format else (path / name, format)
    tables = sorted(p.name for p in path.glob("*.tsv"))
    if tables and (path / "clips").is_dir():
        raise DataError(
            "a Common Voice folder holds several tables", where=str(path), fix=f"give one of: {', '.join(tables)}"
        )
    nested = sorted(str(p.relative_to(path)) for p in path.glob("*/metadata.*"))
    if nested:
        raise DataError(
            "this AudioFolder holds several splits", where=str(path), fix=f"give one of: {', '.join(nested)}"
        )
    if next(_audio_files(path), None) is not None:
        return path, "folder"
    lists = sorted(p.name for p in path.glob("*.list")) + sorted(p.name for p in path.glob("*.jsonl"))
    raise _unknown(path, f"it holds {', '.join(lists[:8])}: give one of them" if lists else "it holds no audio files")


def _unknown(path: Path, seen: str) -> DataError:
    looked = "\n".join(f"    {name}: {what}" for name, what in FORMATS.items())
    return DataError(f"not a data format that is known; {seen}\n  looked for\n{looked}", where=str(path))


def _audio_files(folder: Path) -> Iterator[Path]:
    for root, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES and not name.startswith("._"):
                yield Path(root, name)


def _lines(path: Path, *, strip: str | None = None) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and lines without surrounding white space (or the characters `strip`).

    Only "\\n" ends a line: U+2028 and the like may stand in a text.
    """
    number = 0
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, line.strip(strip)
    except UnicodeDecodeError as exc:
        raise DataError(
            f"not UTF-8: byte 0x{exc.object[exc.start]:02x} at column {exc.start + 1}",
            where=f"{path}:{number}",
            fix="convert the file, e.g. iconv -f GB18030 -t UTF-8 (or the encoding it was written in)",
        ) from exc
    except OSError as exc:
        raise DataError(f"cannot be read: {exc.strerror}", where=str(path)) from exc


def _check_root(rows: Sequence[Utterance], path: Path) -> None:
    """Refuse a list none of whose first files exists: the folder is wrong, not a sample."""
    probe = [r.wav for r in rows[:16]]
    if any(TarRef.parse(w) or pipe_command(w) or os.path.exists(w) for w in probe):
        return
    wav = Path(probe[0])
    nearest = wav
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    raise DataError(
        f"none of the first {len(probe)} audio files exists; of {str(wav)!r} there is {str(nearest)!r}",
        where=str(path),
        fix=f"relative paths in it start at {path if path.is_dir() else path.parent}; move the list or rewrite them",
    )


def _fingerprint(rows: Sequence[Utterance], root: Path) -> str:
    digest = blake3()
    prefix = str(root).rstrip("/") + "/"
    for r in rows:
        row = (r.key, r.wav.removeprefix(prefix), r.txt, r.start_s, r.end_s)
        digest.update(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return str(digest.hexdigest())


def _nfc(text: object) -> str:
    return unicodedata.normalize("NFC", str(text)).strip()


# --- one reader per format --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader:
    """What every format needs while it is read. Rows come with where they stand."""

    text_required: bool
    allow_pipes: bool
    cache: Path | None
    report: Report | None

    def bad(self, error: DataError) -> None:
        if self.report is None:
            raise error
        self.report(error)

    def unique(self, rows: Iterable[tuple[str, Utterance]]) -> Iterator[Utterance]:
        first: dict[str, str] = {}
        for where, row in rows:
            if row.key in first:
                self.bad(
                    DataError(
                        f"the key {row.key!r} is there twice; first at {first[row.key]}",
                        where=where,
                        fix="give every utterance its own key",
                    )
                )
                continue
            first[row.key] = where
            yield row

    def row(self, fields: Mapping[str, Any], where: str, root: Path) -> tuple[str, Utterance] | None:
        """A row of named fields (JSON or a table); None and a report where it is no utterance."""
        try:
            return where, self._utterance(fields, where, root)
        except DataError as error:
            self.bad(error)
            return None

    def _utterance(self, fields: Mapping[str, Any], where: str, root: Path) -> Utterance:
        wav = _first(fields, _WAV_NAMES)
        if isinstance(wav, Mapping):  # the datasets library writes {"path": ..., "bytes": null}
            wav = wav.get("path")
        if not wav:
            raise DataError(
                f"no audio path; the fields are {', '.join(map(str, fields))}",
                where=where,
                fix=f"name it {_WAV_NAMES[0]!r} (also read: {', '.join(_WAV_NAMES[1:])})",
            )
        if not isinstance(wav, str):
            raise DataError(f"the audio path is not a text: {wav!r}", where=where)
        txt = _first(fields, _TXT_NAMES)
        if txt is None and self.text_required:
            raise DataError(
                f"no text; the fields are {', '.join(map(str, fields))}",
                where=where,
                fix=f"name it {_TXT_NAMES[0]!r} (also read: {', '.join(_TXT_NAMES[1:])})",
            )
        key = _first(fields, _KEY_NAMES)
        start = _seconds(fields, ("start", "start_s", "offset"), where)
        end = _seconds(fields, ("end", "end_s"), where)
        duration = _seconds(fields, ("duration", "duration_s"), where)
        if end is None and start is not None and duration is not None:
            end = start + duration  # NeMo writes offset and duration
        if start is not None and end is not None:
            if end <= start:
                raise DataError(f"the stretch ends at {end:g} s, before it starts at {start:g} s", where=where)
            duration = end - start
        return Utterance(
            key=_nfc(key) if key is not None else _nfc(Path(wav).with_suffix("").as_posix()),
            wav=_absolute(wav, root, where),
            txt="" if txt is None else _nfc(txt),
            speaker=_nfc(fields.get("speaker") or fields.get("client_id") or ""),
            start_s=start,
            end_s=end,
            duration_s=duration,
            lang=_nfc(fields.get("lang") or fields.get("language") or fields.get("locale") or ""),
            task=_nfc(fields.get("task") or ""),
        )

    # Each yields (where, utterance).

    def raw(self, path: Path) -> Iterator[tuple[str, Utterance]]:
        for number, line in _lines(path):
            if not line:
                continue
            where = f"{path}:{number}"
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as exc:
                self.bad(
                    DataError(
                        f"not JSON: {exc.msg} at column {exc.colno}: {line[:60]!r}",
                        where=where,
                        fix='a line looks like {"key": "a1", "wav": "a1.wav", "txt": "hello"}',
                    )
                )
                continue
            if not isinstance(fields, dict):
                self.bad(DataError(f"not a JSON object: {line[:60]!r}", where=where))
                continue
            row = self.row(fields, where, path.parent)
            if row:
                yield row

    def audiofolder(self, path: Path) -> Iterator[tuple[str, Utterance]]:
        if path.is_dir():
            found = [path / n for n in ("metadata.csv", "metadata.jsonl") if (path / n).is_file()]
            if not found:
                raise DataError("no metadata.csv or metadata.jsonl in this folder", where=str(path))
            path = found[0]
        yield from self._table(path, ",") if path.suffix.lower() == ".csv" else self.raw(path)

    def commonvoice(self, path: Path) -> Iterator[tuple[str, Utterance]]:
        clips = path.parent / "clips"
        durations: dict[str, float] = {}
        measured = path.parent / "clip_durations.tsv"
        if measured.is_file():
            for _, line in _lines(measured):
                clip, _, milliseconds = line.partition("\t")
                if milliseconds.isdigit():
                    durations[clip] = int(milliseconds) / 1000
        for where, row in self._table(path, "\t", root=clips if clips.is_dir() else path.parent):
            name = os.path.basename(row.wav)
            yield where, replace(row, duration_s=durations[name]) if name in durations else row

    def _table(self, path: Path, delimiter: str, root: Path | None = None) -> Iterator[tuple[str, Utterance]]:
        lines = list(_lines(path, strip="\r\n"))  # an empty first cell must stay one
        quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
        # A quoted field may hold a line break, so the reader sees whole text and tells its line numbers.
        table = csv.reader(io.StringIO("\n".join(line for _, line in lines)), delimiter=delimiter, quoting=quoting)
        header: list[str] | None = None
        for cells in table:
            where = f"{path}:{table.line_num}"
            if not cells or not any(cells):
                continue
            if header is None:
                header = [c.strip() for c in cells]
                for names, what in ((_WAV_NAMES, "audio path"), (_TXT_NAMES, "text")):
                    if not set(names) & set(header) and (what != "text" or self.text_required):
                        raise DataError(
                            f"no column with the {what}; the columns are {', '.join(header)}",
                            where=where,
                            fix=f"name it one of: {', '.join(names)}",
                        )
                continue
            if len(cells) > len(header):
                self.bad(DataError(f"{len(cells)} cells in a table of {len(header)} columns", where=where))
                continue
            row = self.row(dict(zip(header, cells, strict=False)), where, root or path.parent)
            if row:
                yield row

    def folder(self, path: Path) -> Iterator[tuple[str, Utterance]]:
        for wav in _audio_files(path):
            text_file = wav.with_suffix(".txt")
            if text_file.is_file():
                txt = _nfc(" ".join(line for _, line in _lines(text_file) if line))
            elif self.text_required:
                self.bad(
                    DataError(
                        f"no text: there is no {text_file.name!r} beside it",
                        where=str(wav),
                        fix="write the transcript there, or use a list with key, wav and txt",
                    )
                )
                continue
            else:
                txt = ""
            key = _nfc(wav.relative_to(path).with_suffix("").as_posix())
            yield str(wav), Utterance(key=key, wav=str(wav), txt=txt)

    def kaldi(self, path: Path) -> Iterator[tuple[str, Utterance]]:
        for name in ("wav.scp", "text") if self.text_required else ("wav.scp",):
            if not (path / name).is_file():
                raise DataError(f"a Kaldi directory needs {name!r}", where=str(path))
        recordings = self._kaldi_table(path / "wav.scp")
        texts = self._kaldi_table(path / "text") if (path / "text").is_file() else {}
        speakers = self._kaldi_table(path / "utt2spk") if (path / "utt2spk").is_file() else {}
        durations = self._kaldi_table(path / "utt2dur") if (path / "utt2dur").is_file() else {}
        segments: Iterable[tuple[str, str, str, float | None, float | None]]
        if (path / "segments").is_file():
            segments = self._segments(path / "segments")
        else:
            segments = ((where, key, key, None, None) for key, (where, _) in recordings.items())
        for where, key, recording, start, end in segments:
            if recording not in recordings:
                self.bad(DataError(f"the recording {recording!r} is not in wav.scp", where=where))
                continue
            if key not in texts and self.text_required:
                self.bad(
                    DataError(
                        f"the utterance {key!r} has no line in {path / 'text'}",
                        where=where,
                        fix="run Kaldi's utils/fix_data_dir.sh, or add the line",
                    )
                )
                continue
            try:
                wav = self._kaldi_wav(recordings[recording][1], path, recordings[recording][0])
            except DataError as error:
                self.bad(error)
                continue
            known = durations.get(key, ("", ""))[1]
            duration = end - start if start is not None and end is not None else None
            if duration is None and known:
                duration = _seconds({"utt2dur": known}, ("utt2dur",), durations[key][0])
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

    def _kaldi_table(self, path: Path) -> dict[str, tuple[str, str]]:
        """key -> (where, the rest of the line)"""
        table: dict[str, tuple[str, str]] = {}
        for number, line in _lines(path):
            if not line:
                continue
            key, _, rest = line.partition(" ") if "\t" not in line.split(" ", 1)[0] else line.partition("\t")
            key, where = _nfc(key), f"{path}:{number}"
            if key in table:
                self.bad(DataError(f"the key {key!r} is there twice; first at {table[key][0]}", where=where))
                continue
            # A command or path is not normalised; texts and speakers are.
            table[key] = (where, rest.strip() if path.name == "wav.scp" else _nfc(rest))
        return table

    def _segments(self, path: Path) -> Iterator[tuple[str, str, str, float | None, float | None]]:
        for number, line in _lines(path):
            if not line:
                continue
            where, cells = f"{path}:{number}", line.split()
            try:
                key, recording, start, end = cells[0], cells[1], float(cells[2]), float(cells[3])
            except (IndexError, ValueError):
                self.bad(DataError(f"not a segment: {line[:60]!r}", where=where, fix="UTTERANCE RECORDING START END"))
                continue
            if end != -1 and end <= start:
                self.bad(DataError(f"the segment ends at {end:g} s, before it starts at {start:g} s", where=where))
                continue
            yield where, _nfc(key), _nfc(recording), start, None if end == -1 else end  # -1: to the end, in Kaldi

    def _kaldi_wav(self, entry: str, root: Path, where: str) -> str:
        if entry.endswith("|"):
            if not self.allow_pipes:
                raise DataError(
                    f"wav.scp names a shell command, which is not run: {entry[:80]!r}",
                    where=where,
                    fix="convert the audio to files, or allow pipes if you trust this list",
                )
            return _PIPE + entry[:-1].strip()
        if re.search(r"\.ark:\d+$", entry):
            raise DataError(
                f"audio inside a Kaldi archive is not read: {entry[:80]!r}",
                where=where,
                fix="write files with Kaldi's wav-copy, or name the original files",
            )
        return _absolute(entry, root, where)

    def shard(self, path: Path) -> Iterator[tuple[str, Utterance]]:
        if path.suffix.lower() == ".tar":
            yield from self._shard_rows(path, str(path))
            return
        for number, line in _lines(path):
            if not line:
                continue
            where = f"{path}:{number}"
            try:
                tar = Path(_absolute(line, path.parent, where))
                if not tar.is_file():
                    error = _missing(tar)
                    raise DataError(error.what, where=where, fix=error.fix)
                yield from self._shard_rows(tar, where)
            except DataError as error:
                self.bad(error)

    def _shard_rows(self, tar: Path, where: str) -> Iterator[tuple[str, Utterance]]:
        for entry in tar_index(tar, cache=self.cache):
            at = f"{tar}!/{entry.member or entry.key}"
            if not entry.member:
                self.bad(
                    DataError(
                        f"the text {entry.key}.txt has no audio of the same name in the tar", where=at, fix=_PARTNER
                    )
                )
            elif entry.txt is None and self.text_required:
                self.bad(DataError(f"no text: there is no {entry.key}.txt in the tar", where=at, fix=_PARTNER))
            else:
                ref = TarRef(str(tar), entry.member, entry.offset, entry.size)
                yield at, Utterance(key=_nfc(entry.key), wav=str(ref), txt=_nfc(entry.txt or ""))


_PARTNER = "write the shard again with both members, KEY.wav and KEY.txt"

_READERS: Mapping[str, Callable[[_Reader, Path], Iterator[tuple[str, Utterance]]]] = {
    "raw": _Reader.raw,
    "shard": _Reader.shard,
    "kaldi": _Reader.kaldi,
    "audiofolder": _Reader.audiofolder,
    "commonvoice": _Reader.commonvoice,
    "folder": _Reader.folder,
    "jsonl": _Reader.raw,
}


def _first(fields: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((fields[n] for n in names if fields.get(n) is not None), None)


def _seconds(fields: Mapping[str, Any], names: Sequence[str], where: str) -> float | None:
    value = _first(fields, names)
    if value is None or value == "":
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        name = next(n for n in names if fields.get(n) is not None)
        raise DataError(f"{name} is not a time in seconds: {value!r}", where=where)
    return seconds


def _absolute(wav: str, root: Path, where: str) -> str:
    if re.match(r"[a-z][a-z0-9+]*://", wav):
        if not wav.startswith("file://"):
            raise DataError(
                f"audio behind a network address is not read: {wav[:80]!r}",
                where=where,
                fix="bring it to a local or mounted folder",
            )
        wav = wav.removeprefix("file://")
    return os.path.normpath(os.path.join(root, wav))


# --- tar shards -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TarEntry:
    """One utterance of a shard: where its audio lies and what its text is (None: no .txt member)."""

    key: str
    member: str
    offset: int
    size: int
    txt: str | None


def tar_index(tar: Path, *, cache: Path | None = None) -> tuple[TarEntry, ...]:
    """The utterances of one shard; from its cached index where that fits the file's size and time, else by one scan.

    The index lies beside the shard (`NAME.tar.index.json`) or in `cache`; it is written only where that is possible.
    Raises DataError: damaged or compressed, a member that is a link or names a path outside the tar.
    """
    place = _index_place(tar, cache)
    try:
        status = tar.stat()
        stamp = [_INDEX_VERSION, status.st_size, status.st_mtime_ns]
    except OSError as exc:
        raise DataError(f"cannot be read: {exc.strerror}", where=str(tar)) from exc
    try:
        kept = json.loads(place.read_text(encoding="utf-8"))
        if kept["stamp"] == stamp:
            return tuple(TarEntry(*row) for row in kept["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or not ours: scanned below, and replaced where possible
    rows = _scan_tar(tar)
    body = json.dumps(
        {"stamp": stamp, "rows": [[r.key, r.member, r.offset, r.size, r.txt] for r in rows]}, ensure_ascii=False
    )
    _write_if_possible(place, body)
    return rows


def _index_place(tar: Path, cache: Path | None) -> Path:
    if cache is None:
        return tar.with_name(tar.name + ".index.json")
    # Two shards of one name in different folders must not share an index.
    return cache / f"{tar.stem}-{blake3(str(tar).encode()).hexdigest(8)}.index.json"


def _write_if_possible(place: Path, body: str) -> None:
    """An index saves a scan and nothing else, so a folder that cannot be written is no error."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    except OSError:
        return
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(body)
        os.replace(temporary, place)
    except OSError:
        Path(temporary).unlink(missing_ok=True)


def _scan_tar(tar: Path) -> tuple[TarEntry, ...]:
    audio: dict[str, tuple[str, int, int]] = {}
    texts: dict[str, str] = {}
    order: dict[str, None] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                name = member.name
                if member.isdir():
                    continue
                where = f"{tar}!/{name}"
                if os.path.isabs(name) or ".." in name.split("/"):
                    raise DataError("this member names a path outside the tar", where=where, fix="do not use this file")
                if not member.isfile() or member.sparse is not None:
                    raise DataError("this member is a link or a special file", where=where, fix="write regular files")
                key, _, suffix = name.removeprefix("./").rpartition(".")
                if os.path.basename(key).startswith("._"):
                    continue  # resource forks that macOS adds
                if suffix.lower() == "txt":
                    source = archive.extractfile(member)
                    assert source is not None  # a regular file
                    texts[key] = _text_member(source.read(), where)
                elif f".{suffix.lower()}" in AUDIO_SUFFIXES:
                    if key in audio:
                        raise DataError(f"the key {key!r} has two audio members", where=where)
                    audio[key] = (name, member.offset_data, member.size)
                else:
                    continue
                order[key] = None
            size = tar.stat().st_size
    except tarfile.ReadError as exc:
        with tar.open("rb") as file:
            head = file.read(3)
        if head[:2] == b"\x1f\x8b" or head == b"BZh" or head == b"\xfd7z":
            raise DataError(
                "this tar is compressed and cannot be read by offset", where=str(tar), fix="unpack it to a plain .tar"
            ) from exc
        raise DataError(f"this tar is damaged: {exc}", where=str(tar), fix="write the shard again") from exc
    except OSError as exc:
        raise DataError(f"cannot be read: {exc.strerror or exc}", where=str(tar)) from exc
    for key, (name, offset, length) in audio.items():
        if offset + length > size:
            raise DataError(
                f"this tar is cut short: {key} ends at byte {offset + length} of {size}",
                where=f"{tar}!/{name}",
                fix="write the shard again",
            )
    return tuple(TarEntry(key, *audio.get(key, ("", 0, 0)), texts.get(key)) for key in order)


def _text_member(body: bytes, where: str) -> str:
    try:
        return " ".join(body.decode("utf-8-sig").split("\n")).replace("\r", "").strip()
    except UnicodeDecodeError as exc:
        raise DataError(f"not UTF-8: byte 0x{exc.object[exc.start]:02x}", where=where) from exc
