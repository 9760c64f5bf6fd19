"""Which format a file or folder is in, told by its name and content."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from thawline.data.manifests.folder import audio_files
from thawline.data.manifests.rows import lines_of
from thawline.data.utterance import AUDIO_SUFFIXES, is_url
from thawline.errors import DataError

FORMATS: Mapping[str, str] = {
    "raw": "WeNet raw list: one JSON object a line with key, wav, txt",
    "shard": "WeNet shard list: one path of a .tar a line, members KEY.wav and KEY.txt",
    "kaldi": "Kaldi directory: wav.scp and text, perhaps segments and utt2spk",
    "audiofolder": "Hugging Face AudioFolder: metadata.csv or metadata.jsonl with file_name and text",
    "commonvoice": "Common Voice table: .tsv with path and sentence, audio in clips/ beside it",
    "folder": "plain folder: audio files, each with a .txt of the same name beside it",
    "jsonl": ".jsonl: one JSON object a line with an audio path and a text",
    "arrow": "Arrow table (.arrow, .feather): columns key, wav, txt, perhaps speaker, start, end, duration, lang, task",
    "parquet": "Parquet table: the same columns",
}
"""Every format by name with what it looks like; messages list them from here."""

_TABLES = {".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow", ".parquet": "parquet", ".pq": "parquet"}


def sniff(path: Path) -> tuple[Path, str]:
    """The file or folder to read and its format. Raises DataError, listing FORMATS, for what is none of them."""
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
    if path.suffix.lower() in _TABLES:
        return path, _TABLES[path.suffix.lower()]
    if path.suffix.lower() in AUDIO_SUFFIXES:
        raise DataError("this is an audio file, not a list of them", where=str(path), fix="give its folder, or a list")
    table = table_kind(path)
    if table:
        return path, table
    first = next((line for _, line in lines_of(path) if line), "")
    if first.startswith("{"):
        return path, "raw"
    if first.endswith(".tar") or is_url(first):
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
            return (path, format) if format == "kaldi" else sniff(path / name) if not format else (path / name, format)
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
    if next(audio_files(path), None) is not None:
        return path, "folder"
    lists = [name for kind in (".list", ".jsonl", *_TABLES) for name in sorted(p.name for p in path.glob(f"*{kind}"))]
    raise _unknown(path, f"it holds {', '.join(lists[:8])}: give one of them" if lists else "it holds no audio files")


def table_kind(path: Path) -> str:
    """The format of a table by the first bytes of a file, whatever it is called; "" for any other file."""
    try:
        with path.open("rb") as file:
            head = file.read(6)
    except OSError as exc:
        raise DataError(f"cannot be read: {exc.strerror}", where=str(path)) from exc
    return "arrow" if head == b"ARROW1" else "parquet" if head[:4] == b"PAR1" else ""


def _unknown(path: Path, seen: str) -> DataError:
    looked = "\n".join(f"    {name}: {what}" for name, what in FORMATS.items())
    return DataError(f"not a data format that is known; {seen}\n  looked for\n{looked}", where=str(path))
