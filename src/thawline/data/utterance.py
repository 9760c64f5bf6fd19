"""One recording with its text, and the ways in which a list may say where its sound is. No audio is read here."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TAR_REF = re.compile(r"(?P<tar>.+)!/(?P<member>.+)@(?P<offset>\d+)\+(?P<size>\d+)", re.DOTALL)
_PIPE = "pipe:"
_URL = re.compile(r"(?:[a-z0-9]+::)?[a-z][a-z0-9+.-]*://")

AUDIO_SUFFIXES = frozenset(
    (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".wma", ".aiff", ".aif", ".webm", ".mp4")
)
"""What an audio file may be called."""


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
    """Bytes of one member of an uncompressed tar, found without reading the tar: `PATH.tar!/MEMBER@OFFSET+SIZE`.

    tar: a path, or a URL that fsspec knows
    """

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


def is_url(place: str) -> bool:
    """Whether a list names a network address (or `file://`) instead of a path.

    >>> is_url("s3://bucket/0.tar"), is_url("simplecache::http://host/0.tar"), is_url("/data/0.tar")
    (True, True, False)
    """
    return _URL.match(place) is not None


def pipe_command(wav: str) -> str | None:
    """The shell command that `wav` stands for, or None for a file. Only `read_manifest(allow_pipes=True)` makes one."""
    return wav.removeprefix(_PIPE) if wav.startswith(_PIPE) else None


def as_pipe(command: str) -> str:
    """How an utterance's `wav` spells a shell command."""
    return _PIPE + command
