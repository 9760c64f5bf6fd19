"""A plain folder: audio files, each with a .txt of the same name beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from thawline.data.manifests.rows import Placed, Rows, lines_of, nfc
from thawline.data.utterance import AUDIO_SUFFIXES, Utterance
from thawline.errors import DataError


def folder(rows: Rows, path: Path) -> Iterator[Placed]:
    """The recordings below `path`; a key is the path without its suffix."""
    for wav in audio_files(path):
        text_file = wav.with_suffix(".txt")
        if text_file.is_file():
            txt = nfc(" ".join(line for _, line in lines_of(text_file) if line))
        elif rows.text_required:
            rows.refuse(
                DataError(
                    f"no text: there is no {text_file.name!r} beside it",
                    where=str(wav),
                    fix="write the transcript there, or use a list with key, wav and txt",
                )
            )
            continue
        else:
            txt = ""
        key = nfc(wav.relative_to(path).with_suffix("").as_posix())
        yield str(wav), Utterance(key=key, wav=str(wav), txt=txt)


def audio_files(folder: Path) -> Iterator[Path]:
    """Audio files below `folder` in a fixed order, without those that macOS adds."""
    for root, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            if os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES and not name.startswith("._"):
                yield Path(root, name)
