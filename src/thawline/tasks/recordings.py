"""Which recordings are meant by what stands on a command line: files, and folders with all audio below them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from thawline.core.config import near_names
from thawline.data.audio import duration_s
from thawline.data.manifests.folder import audio_files
from thawline.data.manifests.sniff import FORMATS, sniff
from thawline.data.utterance import AUDIO_SUFFIXES, Utterance
from thawline.errors import DataError, RecipeError


def recordings(places: Sequence[Path | str]) -> list[Path]:
    """Every file as it is named, and of every folder the audio files below it, folder by folder, sorted by name.

    Raises DataError for a place that is not there, and for a folder without audio.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if not place.is_dir():
            existing(place)
            found.append(place)
            continue
        below = list(audio_files(place))
        if not below:
            kind = _listed(place)
            raise DataError(
                f"there is no audio file in this folder: it is a {kind}" if kind else "there is no audio file in it",
                where=str(place),
                fix=_EVALUATE.format(place)
                if kind
                else f"audio is told by its name: {' '.join(sorted(AUDIO_SUFFIXES))}",
            )
        found += below
    return found


def existing(path: Path) -> Path:
    """The absolute path of a file. Raises DataError for what is none, naming those that are spelled alike."""
    if path.is_dir():
        raise DataError("this is a folder, not an audio file", where=str(path), fix="name the files in it")
    if path.is_symlink() and not path.exists():
        raise DataError(f"is a link to {path.readlink()}, which is not there", where=str(path), fix="remove the link")
    if not path.is_file():
        near = near_names(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else []
        raise DataError(
            "no such audio file",
            where=str(path),
            fix=f"did you mean {path.parent / near[0]}?" if near else "check the path",
        )
    return path.absolute()


def seconds_of(path: Path) -> float:
    """How long a recording is, by its header. Raises DataError; for a list of recordings it names the verb for it."""
    try:
        return duration_s(Utterance(key=str(path), wav=str(path), txt=""))
    except DataError as exc:
        kind = _listed(path)
        if kind is None:
            raise
        raise DataError(
            f"this is a list of recordings and no recording: {kind}", where=str(path), fix=_EVALUATE.format(path)
        ) from exc


def targets(files: Sequence[Path], places: Sequence[Path | str], out: Path, suffix: str) -> list[Path]:
    """Where something about each recording is written: `out`, under the name that it has in the folder it was found in.

    Raises RecipeError for two that would be written to one file.
    """
    folders = sorted((Path(p) for p in places if Path(p).is_dir()), key=lambda f: len(f.parts), reverse=True)
    taken: dict[Path, Path] = {}
    for file in files:
        home = next((folder for folder in folders if file.is_relative_to(folder)), file.parent)
        target = (out / file.relative_to(home)).with_suffix(suffix)
        if target in taken:
            raise RecipeError(
                f"{taken[target]} and {file} would both be written to {target}",
                where="--out",
                fix="transcribe them one after the other, into two folders",
            )
        taken[target] = file
    return list(taken)


_EVALUATE = "`thawline evaluate MODEL {}` decodes what a list names, and scores it; --out keeps the texts"


def _listed(path: Path) -> str | None:
    """What kind of list `path` is; None where it is none."""
    try:
        found, kind = sniff(path)
    except DataError:
        return None
    return None if (found, kind) == (path, "folder") else FORMATS[kind].split(":")[0]
