"""Speech from text: espeak-ng (through the package espeakng-loader and ctypes), always in a process of its own.

The library is under the GPL, keeps state between sentences, and passes over mistakes: a voice it does not know leaves
the previous one in force (with a return code), and an unknown variant such as `en-us+nobody` gives the plain voice
without one. So every return code is looked at, and the voice in force is read back and compared.

What comes out is not a function of the sentence alone: the same text twice gives different samples, since state carries
over. Speech made here is therefore identified by the digest of its samples, never by a seed.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from thawline.core.extras import need
from thawline.errors import DataError, ThawlineError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS: samples go to the callback, nothing is played
_DONT_EXIT = 0x8000  # espeakINITIALIZE_DONT_EXIT: a missing file is a return code, not exit(1)
_UTF8 = 1  # espeakCHARS_UTF8
_RATE, _PITCH = 1, 3  # espeakRATE, espeakPITCH
_CODES = {-1: "internal error", 1: "buffer full", 2: "not found"}
_HEADER = struct.Struct("<II")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """What to say and how.

    voice:    as espeak-ng spells it, e.g. `en-us+m3` (language, then a variant)
    rate_wpm: words a minute, 80..450
    pitch:    0..99, 50 is the voice's own
    """

    text: str
    voice: str
    rate_wpm: int = 175
    pitch: int = 50


def speak(sentences: Sequence[Sentence]) -> Iterator[tuple[NDArray[np.int16], int]]:
    """The samples (n,) of each sentence, mono, and their rate in Hz, in order; made by one child process.

    Raises MissingExtra where the package is absent, DataError where espeak-ng refuses a sentence or dies.
    """
    import numpy as np

    need("espeakng_loader", extra="demo")
    work = "".join(json.dumps(asdict(sentence)) + "\n" for sentence in sentences)
    with tempfile.TemporaryFile() as complaints:
        child = subprocess.Popen(
            [sys.executable, "-m", "thawline.demo.espeak"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
        )
        assert child.stdin is not None  # both are pipes
        assert child.stdout is not None
        try:
            try:
                child.stdin.write(work.encode())
                child.stdin.close()
            except BrokenPipeError:
                raise _failure(child.wait(), complaints) from None
            for _ in sentences:
                header = child.stdout.read(_HEADER.size)
                rate_hz, count = _HEADER.unpack(header) if len(header) == _HEADER.size else (0, 0)
                data = child.stdout.read(2 * count)
                if not rate_hz or len(data) < 2 * count:
                    raise _failure(child.wait(), complaints)
                yield np.frombuffer(data, dtype="<i2"), rate_hz
            if child.wait():
                raise _failure(child.returncode, complaints)
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
            if not child.stdin.closed:
                child.stdin.close()


def _failure(code: int, complaints: BinaryIO) -> DataError:
    complaints.seek(0)
    lines = complaints.read().decode(errors="replace").strip().splitlines()
    try:
        said = json.loads(lines[-1])
        return DataError(said["what"], where=said["where"], fix=said["fix"])
    except (IndexError, ValueError, KeyError, TypeError):
        last = lines[-1] if lines else "it said nothing"
        return DataError(
            f"espeak-ng ended with code {code} in mid-speech: {last}",
            fix="pip install --force-reinstall espeakng-loader",
        )


class _Voice(ctypes.Structure):
    """espeak_VOICE of speak_lib.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("languages", ctypes.c_char_p),
        ("identifier", ctypes.c_char_p),
        ("gender", ctypes.c_ubyte),
        ("age", ctypes.c_ubyte),
        ("variant", ctypes.c_ubyte),
        ("xx1", ctypes.c_ubyte),
        ("score", ctypes.c_int),
        ("spare", ctypes.c_void_p),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Espeak:
    """The library, initialised. One a process: it has no handles, only global state."""

    def __init__(self) -> None:
        loader = need("espeakng_loader", extra="demo")
        try:
            self._library: Any = ctypes.CDLL(loader.get_library_path())
        except OSError as exc:
            raise DataError(
                f"the espeak-ng library does not load: {exc}", fix="pip install --force-reinstall espeakng-loader"
            ) from exc
        self._library.espeak_GetCurrentVoice.restype = ctypes.POINTER(_Voice)
        self._pieces: list[bytes] = []
        self._callback = _Callback(self._receive)  # kept: the library holds a bare pointer to it
        data = os.fsencode(loader.get_data_path())
        self.rate_hz: int = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data, _DONT_EXIT)
        if self.rate_hz <= 0:
            raise DataError(
                f"espeak-ng does not start (code {self.rate_hz})",
                where=os.fsdecode(data),
                fix="pip install --force-reinstall espeakng-loader",
            )
        self._library.espeak_SetSynthCallback(self._callback)

    def say(self, sentence: Sentence) -> bytes:
        """Samples of `sentence`: 16 bit, mono, little endian, at `rate_hz`. Raises DataError."""
        self._choose(sentence.voice)
        for parameter, value in ((_RATE, sentence.rate_wpm), (_PITCH, sentence.pitch)):
            self._check(self._library.espeak_SetParameter(parameter, value, 0), f"the setting {value}", sentence)
        text = sentence.text.encode()
        size = ctypes.c_size_t(len(text) + 1)
        self._pieces.clear()
        code = self._library.espeak_Synth(ctypes.c_char_p(text), size, 0, 0, 0, _UTF8, None, None)
        self._check(code, f"the text {sentence.text!r}", sentence)
        self._check(self._library.espeak_Synchronize(), f"the text {sentence.text!r}", sentence)
        samples = b"".join(self._pieces)
        if not any(samples):
            raise DataError(f"espeak-ng gave no sound for {sentence.text!r}", where=f"voice {sentence.voice}")
        return samples

    def _choose(self, voice: str) -> None:
        code = self._library.espeak_SetVoiceByName(voice.encode())
        found = self._library.espeak_GetCurrentVoice().contents.identifier.decode()
        # The identifier is the file below lang/, with the variant: "gmw/en-US+m3" for "en-us+m3".
        if code != 0 or found.rpartition("/")[2].lower() != voice.lower():
            raise DataError(
                f"espeak-ng has no voice {voice!r} (code {code}); it would go on with {found!r}",
                fix="voices lie in espeak-ng-data/lang, variants in espeak-ng-data/voices/!v",
            )

    def _check(self, code: int, what: str, sentence: Sentence) -> None:
        if code != 0:
            reason = _CODES.get(code, "unknown")
            raise DataError(f"espeak-ng refused {what}: code {code}, {reason}", where=f"voice {sentence.voice}")

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self._pieces.append(ctypes.string_at(samples, 2 * count))
        return 0  # go on


def main() -> int:
    """The child: sentences as JSON lines on standard input, samples on standard output. An error is a JSON line on
    standard error."""
    # The library may print; what it prints must not get between the samples.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        espeak = Espeak()
        for line in sys.stdin.read().splitlines():
            samples = espeak.say(Sentence(**json.loads(line)))
            out.write(_HEADER.pack(espeak.rate_hz, len(samples) // 2) + samples)
        out.close()
    except ThawlineError as exc:
        print(json.dumps({"what": exc.what, "where": exc.where, "fix": exc.fix}), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
