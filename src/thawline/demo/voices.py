"""The demo's speech: digit strings said by two groups of voices, written as WeNet lists with their digests.

The base model learns the `base` voices; the `new` voices are those a user would fine-tune for. What is on disk is
identified by SHA256SUMS (`sha256sum -c` reads it): a folder whose digests hold is used again, any other is made anew.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from thawline.ckpt.store import atomic_dir
from thawline.core.extras import need
from thawline.core.rng import derive
from thawline.demo.espeak import Sentence, speak
from thawline.errors import DataError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RATE_HZ = 16000
SUMS = "SHA256SUMS"
_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Speaker:
    """A voice with its own speed (words a minute) and pitch (0..99)."""

    name: str
    voice: str
    rate_wpm: int
    pitch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Speakers, and how many utterances of them there are to train on and to test with."""

    name: str
    speakers: tuple[Speaker, ...]
    train: int
    test: int
    hiss: float = 0.0
    """Root mean square of white noise added to the samples, on the scale where 1.0 is full: a cheap line."""


# Only voices whose samples came out the same in every fresh process: +f2, +f3, +f5 and whisper did not.
BASE = Group(
    name="base",
    speakers=(
        Speaker(name="adam", voice="en-us+m1", rate_wpm=160, pitch=45),
        Speaker(name="bill", voice="en-us+m3", rate_wpm=170, pitch=40),
        Speaker(name="carl", voice="en-us-nyc+m7", rate_wpm=175, pitch=50),
        Speaker(name="dave", voice="en-us+m4", rate_wpm=165, pitch=50),
    ),
    train=480,
    test=100,
)
NEW = Group(
    name="new",
    speakers=(
        Speaker(name="ewan", voice="en-gb-scotland+m2", rate_wpm=180, pitch=50),
        Speaker(name="rory", voice="en-gb-scotland+m5", rate_wpm=190, pitch=55),
    ),
    train=160,
    test=100,
    hiss=0.005,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Speech on disk.

    lists:   "base/train", "base/test", "new/train", "new/test" -> data.list
    units:   the word table, WeNet's units.txt
    files:   how many files the digest covers
    digest:  SHA-256 of SHA256SUMS, hexadecimal: the identity of the data
    seconds: of speech in all
    reused:  it was there already, whole
    """

    folder: Path
    lists: Mapping[str, Path]
    units: Path
    files: int
    digest: str
    seconds: float
    reused: bool


def make_corpus(folder: Path, groups: tuple[Group, ...] = (BASE, NEW), *, seed: int = 7) -> Corpus:
    """The corpus in `folder`, made there unless it is there already and its digests hold.

    Raises MissingExtra (espeakng-loader, soundfile, soxr), DataError where a voice is missing, or where `folder` holds
    something else, which is left alone.
    """
    if folder.exists() and not (folder.is_dir() and (any(folder.glob("corpus.json")) or not any(folder.iterdir()))):
        raise DataError("this holds something that is not the demo's", where=str(folder), fix="give another folder")
    wanted = _description(groups, seed)
    if (folder / "corpus.json").is_file() and _told(folder) == wanted and not damaged(folder):
        return _corpus(folder, groups, reused=True)
    with atomic_dir(folder, force=True) as temporary:
        _write(temporary, groups, seed)
        (temporary / "corpus.json").write_text(json.dumps(wanted, indent=1) + "\n")
        names = sorted(p.relative_to(temporary).as_posix() for p in temporary.rglob("*") if p.is_file())
        (temporary / SUMS).write_text("".join(f"{_sha256(temporary / n)}  {n}\n" for n in names))
    return _corpus(folder, groups, reused=False)


def damaged(folder: Path) -> tuple[str, ...]:
    """The files below `folder` that are missing or whose bytes are not those of SHA256SUMS; all is well if empty."""
    sums = folder / SUMS
    if not sums.is_file():
        return (SUMS,)
    rows = [line.split("  ", 1) for line in sums.read_text().splitlines()]
    return tuple(n for d, n in rows if not (folder / n).is_file() or _sha256(folder / n) != d)


def digit_strings(count: int, seed: int, *path: str) -> list[str]:
    """`count` strings of two to four words, e.g. "three seven one nine": a pure function of the arguments."""
    texts = []
    for i in range(count):
        draw = random.Random(derive(seed, "text", *path, i))
        texts.append(" ".join(draw.choices(WORDS, k=draw.randint(2, 4))))
    return texts


def sha256_of_tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by its path relative to it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): _sha256(p) for p in files}


def _description(groups: tuple[Group, ...], seed: int) -> dict[str, object]:
    told = {"format": _FORMAT, "seed": seed, "rate_hz": RATE_HZ, "groups": [asdict(g) for g in groups]}
    as_read_back: dict[str, object] = json.loads(json.dumps(told))
    return as_read_back


def _told(folder: Path) -> object:
    try:
        return json.loads((folder / "corpus.json").read_text())
    except ValueError:
        return None


def _write(folder: Path, groups: tuple[Group, ...], seed: int) -> None:
    soundfile, soxr = need("soundfile", extra="speech"), need("soxr", extra="speech")
    rows = list(_rows(groups, seed))
    for row, (samples, rate_hz) in zip(rows, speak([row.sentence for row in rows]), strict=True):
        wav = folder / row.place / "wav" / f"{row.key}.flac"
        wav.parent.mkdir(parents=True, exist_ok=True)
        clean = soxr.resample(samples.astype(np.float32) / 32768, rate_hz, RATE_HZ)
        hiss = np.random.default_rng(derive(seed, "hiss", row.key)).normal(0.0, row.hiss, len(clean))
        soundfile.write(wav, np.clip(clean + hiss, -1.0, 1.0), RATE_HZ)
        # Relative to the list, so that the folder may be moved.
        line = {"key": row.key, "wav": f"wav/{row.key}.flac", "txt": row.sentence.text}
        with (folder / row.place / "data.list").open("a") as file:
            file.write(json.dumps(line) + "\n")
    units = ("<blank>", "<unk>", *WORDS, "<sos/eos>")
    (folder / "units.txt").write_text("".join(f"{unit} {i}\n" for i, unit in enumerate(units)))


@dataclass(frozen=True, slots=True)
class _Row:
    place: str
    key: str
    sentence: Sentence
    hiss: float


def _rows(groups: tuple[Group, ...], seed: int) -> Iterator[_Row]:
    for group in groups:
        for split, count in (("train", group.train), ("test", group.test)):
            for i, text in enumerate(digit_strings(count, seed, group.name, split)):
                who = group.speakers[i % len(group.speakers)]
                sentence = Sentence(text=text, voice=who.voice, rate_wpm=who.rate_wpm, pitch=who.pitch)
                yield _Row(f"{group.name}/{split}", f"{who.name}_{split}_{i:03d}", sentence, group.hiss)


def _corpus(folder: Path, groups: tuple[Group, ...], *, reused: bool) -> Corpus:
    soundfile = need("soundfile", extra="speech")
    sums = (folder / SUMS).read_bytes()
    return Corpus(
        folder=folder,
        lists={f"{g.name}/{s}": folder / g.name / s / "data.list" for g in groups for s in ("train", "test")},
        units=folder / "units.txt",
        files=len(sums.splitlines()),
        digest=hashlib.sha256(sums).hexdigest(),
        seconds=sum(soundfile.info(p).duration for p in sorted(folder.rglob("*.flac"))),
        reused=reused,
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
