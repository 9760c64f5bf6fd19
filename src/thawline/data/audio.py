"""Audio files into samples: decode, choose or mix channels, cut, resample; and every way in which that can fail.

soundfile (libsndfile) reads wav, flac, ogg, opus, mp3 and aiff; PyAV reads what it cannot (m4a, aac, webm, wma). What a
decoder would pass over in silence is looked for here: a wav whose header promises more than the file holds, an ogg cut
inside a page, an mp3 shorter than its index says, NaN, nothing at all. Each failure is a DataError that names the file
and the cause, so that one bad sample costs one sample. An OSError that comes from the storage (not from the file) is
passed on: the loader waits for storage.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from thawline.core.extras import need
from thawline.data.tar_member import read_member
from thawline.data.utterance import TarRef, Utterance, pipe_command
from thawline.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Samples = NDArray[np.float32]

MAX_OVERSHOOT_S = 0.5
"""A segment may end this long after its file does and is cut there, as Kaldi's extract-segments allows."""

_RATES_HZ = (1_000, 768_000)  # outside of this a header is damaged
_UNKNOWN_SIZES = (0, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 0xFFFFFFFF - 36)  # what writers to a pipe put for "not known"
_EXTRA = "speech"


def read_audio(
    wav: str | Path,
    *,
    rate_hz: int = 16000,
    start_s: float | None = None,
    end_s: float | None = None,
    channel: int | None = None,
) -> Samples:
    """Samples of one recording as float32 in [-1, 1), mono, shape (n,), at `rate_hz`.

    wav:     a path, or a tar reference as a manifest writes it
    start_s, end_s: the stretch to read, in seconds; None is its begin or end
    channel: which channel, from 0; None is the mean of all

    Raises DataError naming the file and the cause.
    """
    samples, native_hz = decode(wav, start_s=start_s, end_s=end_s, channel=channel)
    return resample(samples, native_hz, rate_hz)


def decode(
    wav: str | Path, *, start_s: float | None = None, end_s: float | None = None, channel: int | None = None
) -> tuple[Samples, int]:
    """As `read_audio`, at the file's own rate: samples (n,) float32, and the rate in Hz."""
    name = str(wav)
    with _open(name) as source:
        by_av = source.is_for_av
        if not by_av:
            try:
                samples, rate = _decode_soundfile(source, start_s, end_s)
            except _NotRecognised as exc:
                by_av, cause = True, exc
        if by_av:
            try:
                samples, rate = _decode_av(source, start_s, end_s)
            except _NotRecognised as exc:
                raise _not_audio(source, exc if source.is_for_av else cause) from exc
    mono = _mono(samples, channel, name)
    if mono.size == 0:
        raise DataError("there are no samples in it", where=name, fix="remove it from the list, or record it again")
    # One reduction instead of a mask over all samples: NaN and infinity survive a sum, and float64 cannot overflow.
    if not np.isfinite(np.add.reduce(mono, dtype=np.float64)):
        first = int(np.flatnonzero(~np.isfinite(mono))[0])
        raise DataError(
            f"sample {first} of {mono.size} is {mono[first]}, not a number that can be heard",
            where=name,
            fix="convert the file again from its original",
        )
    return mono, rate


def resample(samples: Samples, from_hz: int, to_hz: int) -> Samples:
    """Samples (n,) at `from_hz` as samples (about n * to_hz / from_hz,) at `to_hz`; soxr, high quality."""
    if from_hz == to_hz:
        return samples
    soxr = need("soxr", extra=_EXTRA)
    out: Samples = soxr.resample(samples, from_hz, to_hz, quality="HQ")
    return out


def duration_s(utterance: Utterance) -> float:
    """Seconds of one utterance, from the header where the format has one. For `manifest.fill_durations`.

    Raises DataError as `read_audio` does for what the header can show.
    """
    return stretch_s(utterance, whole_s(utterance.wav))


def whole_s(wav: str) -> float:
    """Seconds of a whole recording, from the header where the format has one. Raises DataError."""
    with _open(wav) as source:
        return _header_seconds(source)


def stretch_s(utterance: Utterance, whole: float) -> float:
    """Seconds of one utterance in a recording of `whole` seconds. Raises DataError where it does not lie in it."""
    start = utterance.start_s or 0.0
    end = whole if utterance.end_s is None else min(utterance.end_s, whole)
    _check_stretch(start, utterance.end_s, whole, utterance.wav)
    if end - start <= 0:
        raise DataError("there are no samples in it", where=utterance.wav)
    return end - start


# --- where the bytes are ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Bytes of one encoded recording, at offset 0 of `file`.

    fileno: of `file` where it is a plain file, else None (soundfile is faster on a descriptor than on Python's file)
    """

    name: str
    file: BinaryIO
    fileno: int | None
    size: int
    head: bytes

    @property
    def is_for_av(self) -> bool:
        """By content: containers that libsndfile does not read. (An mp3 frame and an ADTS frame begin alike.)"""
        h = self.head
        adts = len(h) > 1 and h[0] == 0xFF and h[1] & 0xF6 == 0xF0
        return h[4:8] == b"ftyp" or h[:4] in (b"\x1a\x45\xdf\xa3", b"\x30\x26\xb2\x75") or adts

    def for_soundfile(self) -> int | BinaryIO:
        self.file.seek(0)
        if self.fileno is None:
            return self.file
        os.lseek(self.fileno, 0, os.SEEK_SET)
        return self.fileno


class _NotRecognised(Exception):
    """A decoder does not know this kind of file, or is not installed; another may."""


@contextmanager
def _open(wav: str) -> Iterator[_Source]:
    command = pipe_command(wav)
    if command is not None:
        body = _run(command)
        yield _in_memory(wav, body)
        return
    ref = TarRef.parse(wav)
    if ref is not None:
        yield _in_memory(wav, read_member(ref))
        return
    if "\0" in wav:
        raise DataError("no path can hold a NUL byte", where=repr(wav))
    try:
        with open(wav, "rb", opener=_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DataError("this is a pipe or a device, not a file", where=wav, fix="give a file")
            size = status.st_size
            head = file.read(64)
            if size == 0:
                raise DataError(
                    "the file is empty (0 bytes)", where=wav, fix="remove it from the list, or bring it again"
                )
            yield _Source(wav, file, file.fileno(), size, head)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise DataError("there is no such file", where=wav, fix="check the path in the list") from exc
    except (PermissionError, IsADirectoryError) as exc:
        raise DataError(f"cannot be read: {exc.strerror}", where=wav) from exc


def _without_waiting(path: str, flags: int) -> int:
    """`os.open` for `open`; of a named pipe without waiting until somebody writes to it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _in_memory(name: str, body: bytes) -> _Source:
    if not body:
        raise DataError("the member is empty (0 bytes)", where=name)
    return _Source(name, io.BytesIO(body), None, len(body), body[:64])


def _run(command: str) -> bytes:
    done = subprocess.run(command, shell=True, capture_output=True, check=False)
    if done.returncode != 0 or not done.stdout:
        last = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise DataError(
            f"the command of wav.scp ended with status {done.returncode} and {len(done.stdout)} bytes: {last}",
            where=command,
        )
    return done.stdout


def _not_audio(source: _Source, cause: _NotRecognised) -> DataError:
    if source.head.startswith(b"version https://git-lfs"):
        return DataError("this is a Git LFS pointer, not audio", where=source.name, fix="git lfs pull")
    return DataError(
        f"not audio in a known format: {cause}; it begins with {source.head[:16]!r}",
        where=source.name,
        fix="convert it, e.g. ffmpeg -i IN -ac 1 -ar 16000 OUT.flac",
    )


# --- soundfile --------------------------------------------------------------------------------------------------------


def _decode_soundfile(source: _Source, start_s: float | None, end_s: float | None) -> tuple[NDArray[np.float32], int]:
    with _sound(source) as sound:
        rate, total = int(sound.samplerate), int(sound.frames)
        _check_stretch(start_s or 0.0, end_s, total / rate, source.name)
        begin = round((start_s or 0.0) * rate)
        end = total if end_s is None else min(total, round(end_s * rate))
        if begin:
            sound.seek(begin)
        samples = sound.read(end - begin, dtype="float32", always_2d=True)
    if len(samples) < end - begin:
        raise DataError(
            f"it is cut short: {len(samples)} of {end - begin} samples could be decoded",
            where=source.name,
            fix="bring the file again",
        )
    return samples, rate


@contextmanager
def _sound(source: _Source) -> Iterator[Any]:
    """The opened SoundFile; libsndfile's errors as DataError, or _NotRecognised where another decoder may know more."""
    soundfile = need("soundfile", extra=_EXTRA)
    if source.head[:4] in (b"RIFF", b"RIFX", b"RF64"):
        _check_wav(source)
    elif source.head[:4] == b"OggS":
        _check_ogg(source)
    try:
        with soundfile.SoundFile(source.for_soundfile(), closefd=False) as sound:
            if not _RATES_HZ[0] <= sound.samplerate <= _RATES_HZ[1]:
                raise DataError(
                    f"the header says {sound.samplerate} Hz, which cannot be",
                    where=source.name,
                    fix="repair the header",
                )
            yield sound
    except soundfile.LibsndfileError as exc:
        message = str(exc.error_string).strip().rstrip(".")
        if exc.code == 1:  # SF_ERR_UNRECOGNISED_FORMAT
            raise _NotRecognised(message) from exc
        raise DataError(
            f"it is damaged or cut short: {message}", where=source.name, fix="bring the file again"
        ) from exc


def _check_wav(source: _Source) -> None:
    """Refuse a wav whose header contradicts itself or promises more bytes than there are; libsndfile reads on."""
    file, order = source.file, ">" if source.head[:4] == b"RIFX" else "<"
    at, block = 12, 0
    while at + 8 <= source.size:
        file.seek(at)
        name, size = struct.unpack(f"{order}4sI", file.read(8))
        if name == b"fmt " and size >= 16:
            body = file.read(16)
            if len(body) < 16:
                break
            kind, channels, rate, bytes_per_s, block, bits = struct.unpack(f"{order}HHIIHH", body)
            if kind in (1, 3) and channels and block != channels * ((bits + 7) // 8):
                raise DataError(
                    f"the header contradicts itself: {channels} channels of {bits} bits are not {block} bytes",
                    where=source.name,
                    fix="find out how many channels there are and write the header again",
                )
            if kind in (1, 3) and bytes_per_s and bytes_per_s != rate * block:
                raise DataError(
                    f"the header contradicts itself: {rate} Hz of {block} bytes is not {bytes_per_s} bytes per second",
                    where=source.name,
                    fix="find out the true sample rate and write the header again",
                )
        if name == b"data":
            there = source.size - at - 8
            if size > there and size not in _UNKNOWN_SIZES and source.head[:4] != b"RF64":
                block = block or 1
                raise DataError(
                    f"it is cut short: the header promises {size // block} samples, the file holds {there // block}",
                    where=source.name,
                    fix="bring the file again",
                )
            return
        at += 8 + size + size % 2
    # No data chunk: libsndfile says so itself.


def _check_ogg(source: _Source) -> None:
    """Refuse an ogg that ends inside a page. (One that ends between pages may be a recorded stream.)"""
    tail_bytes = min(source.size, 2 * 65307)  # the longest possible page is 65307 bytes
    source.file.seek(source.size - tail_bytes)
    tail = source.file.read(tail_bytes)
    at = tail.rfind(b"OggS")
    while at >= 0:
        page = tail[at:]
        if len(page) >= 27 and len(page) >= 27 + page[26]:
            whole = 27 + page[26] + sum(page[27 : 27 + page[26]])
            if page[4] == 0 and whole == len(page):
                return
            if page[4] == 0 and whole < len(page):
                # Something follows the last page: either these four bytes were sound by chance, or a tag was added.
                return
        if at + source.size - tail_bytes == 0 or page[4:5] in (b"\0", b""):
            raise DataError(
                "it is cut short: it ends inside an ogg page", where=source.name, fix="bring the file again"
            )
        at = tail.rfind(b"OggS", 0, at)


def _header_seconds(source: _Source) -> float:
    if not source.is_for_av:
        try:
            with _sound(source) as sound:
                return float(sound.frames / sound.samplerate)
        except _NotRecognised as exc:
            cause = exc
    try:
        with _container(source) as (container, stream):
            if stream.duration is not None:
                return float(stream.duration * stream.time_base)
            if container.duration is not None:
                return float(container.duration / 1e6)
        samples, rate = _decode_av(source, None, None)
        return len(samples) / rate
    except _NotRecognised as exc:
        raise _not_audio(source, exc if source.is_for_av else cause) from exc


# --- PyAV -------------------------------------------------------------------------------------------------------------


@contextmanager
def _container(source: _Source) -> Iterator[tuple[Any, Any]]:
    av = need("av", extra=_EXTRA)
    source.file.seek(0)
    try:
        with av.open(source.file, metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise DataError("there is no audio stream in it", where=source.name)
            yield container, container.streams.audio[0]
    except (av.error.InvalidDataError, av.error.EOFError) as exc:
        if not source.is_for_av:
            raise _NotRecognised(str(exc)) from exc
        raise DataError(
            f"it is damaged or cut short: {exc.strerror}", where=source.name, fix="bring the file again"
        ) from exc


def _decode_av(source: _Source, start_s: float | None, end_s: float | None) -> tuple[NDArray[np.float32], int]:
    av = need("av", extra=_EXTRA)
    blocks: list[NDArray[np.float32]] = []
    with _container(source) as (container, stream):
        rate = int(stream.rate)
        to_float = av.AudioResampler(format="fltp")  # sample format only; layout and rate stay
        for frame in container.decode(stream):
            blocks.extend(out.to_ndarray() for out in to_float.resample(frame))
        blocks.extend(out.to_ndarray() for out in to_float.resample(None))
        promised = float(stream.duration * stream.time_base) if stream.duration else 0.0
    samples = np.concatenate(blocks, axis=1).T if blocks else np.zeros((0, 1), np.float32)
    # A container's duration counts priming samples and may be rounded to a frame; a tenth of it gone is damage.
    if len(samples) / rate < 0.9 * promised - 0.1:
        raise DataError(
            f"it is cut short: {len(samples) / rate:.2f} s of {promised:.2f} s could be decoded",
            where=source.name,
            fix="bring the file again",
        )
    _check_stretch(start_s or 0.0, end_s, len(samples) / rate, source.name)
    begin = round((start_s or 0.0) * rate)
    return samples[begin : None if end_s is None else round(end_s * rate)], rate


# --- shape ------------------------------------------------------------------------------------------------------------


def _check_stretch(start_s: float, end_s: float | None, whole_s: float, name: str) -> None:
    if start_s and start_s >= whole_s:
        raise DataError(f"the stretch begins at {start_s:g} s, the file ends at {whole_s:g} s", where=name)
    if end_s is not None and end_s > whole_s + MAX_OVERSHOOT_S:
        raise DataError(
            f"the stretch ends at {end_s:g} s, the file at {whole_s:g} s",
            where=name,
            fix="check the sample rate in the header and the times in the list",
        )


def _mono(samples: NDArray[np.float32], channel: int | None, name: str) -> Samples:
    """(n, channels) -> (n,)"""
    channels = samples.shape[1]
    if channel is not None and not 0 <= channel < channels:
        raise DataError(f"there is no channel {channel}; it has {channels}, counted from 0", where=name)
    if channels == 1:
        return np.ascontiguousarray(samples[:, 0])
    if channel is None:
        mixed: Samples = samples.mean(axis=1, dtype=np.float32)
        return mixed
    return np.ascontiguousarray(samples[:, channel])
