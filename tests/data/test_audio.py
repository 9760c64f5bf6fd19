"""Every kind of audio in, mono float samples out; every kind of damage named."""

from __future__ import annotations

import errno
import io
import os
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from thawline.data.audio import decode, duration_s, read_audio, resample
from thawline.data.manifest import fill_durations, read_manifest
from thawline.data.utterance import Utterance
from thawline.errors import DataError

soundfile = pytest.importorskip("soundfile", reason="the speech extra is not installed")
soxr = pytest.importorskip("soxr", reason="the speech extra is not installed")

RATE = 16000


def tone(seconds: float = 0.5, rate: int = RATE, hz: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def save(path: Path, samples: np.ndarray, rate: int = RATE, **kwargs: str) -> Path:
    soundfile.write(path, samples, rate, **kwargs)
    return path


def encode_av(path: Path, samples: np.ndarray, codec: str, rate: int = 48000) -> Path:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None, :], format="flt", layout="mono")
        frame.sample_rate = rate
        fifo = av.AudioFifo()
        fifo.write(frame)
        size = stream.codec_context.frame_size or 1024
        while (block := fifo.read(size, partial=True)) is not None:
            out.mux(stream.encode(block))
        out.mux(stream.encode(None))
    return path


def message(wav: str | Path, **kwargs: float) -> str:
    with pytest.raises(DataError) as caught:
        read_audio(wav, **kwargs)  # type: ignore[arg-type]
    assert caught.value.where == str(wav)
    assert caught.value.exit_code == 3
    return caught.value.what


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT", "PCM_U8", "ULAW"])
def test_wav_is_read_as_written(tmp_path: Path, subtype: str):
    want = tone()
    got = read_audio(save(tmp_path / "a.wav", want, subtype=subtype))
    assert got.dtype == np.float32
    assert got.shape == want.shape
    step = {"PCM_16": 2**-15, "PCM_24": 2**-23, "FLOAT": 0.0, "PCM_U8": 2**-7, "ULAW": 2**-5}[subtype]
    assert np.abs(got - want).max() <= step


@pytest.mark.parametrize(
    ("name", "format"), [("a.flac", "FLAC"), ("a.ogg", "OGG"), ("a.mp3", "MP3"), ("a.opus", "OGG")]
)
def test_compressed_files_keep_length_and_tone(tmp_path: Path, name: str, format: str):
    want = tone(1.0)
    extra = {"subtype": "OPUS"} if name.endswith("opus") else {}
    got = read_audio(save(tmp_path / name, want, format=format, **extra))
    assert got.shape == want.shape
    assert np.abs(np.fft.rfft(got)).argmax() == 440


@pytest.mark.parametrize(("name", "codec"), [("a.m4a", "aac"), ("a.webm", "libopus"), ("a.aac", "aac")])
def test_what_soundfile_cannot_read_is_read_by_pyav(tmp_path: Path, name: str, codec: str):
    path = encode_av(tmp_path / name, tone(1.0, 48000), codec)
    got, rate = decode(path)
    assert rate == 48000
    assert abs(len(got) / rate - 1.0) < 0.06  # codecs pad to whole frames
    spectrum = np.abs(np.fft.rfft(got))
    assert abs(spectrum.argmax() * rate / len(got) - 440) < 2
    assert abs(duration_s(Utterance(key="a", wav=str(path))) - 1.0) < 0.12


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_other_rates_are_resampled_by_soxr(tmp_path: Path, rate: int):
    original = tone(0.5, rate)
    got = read_audio(save(tmp_path / "a.wav", original, rate, subtype="FLOAT"))
    assert np.array_equal(got, soxr.resample(original, rate, 16000, quality="HQ"))
    assert abs(len(got) - 8000) <= 1


def test_channels_are_mixed_or_chosen(tmp_path: Path):
    left, right = tone(hz=300), tone(hz=700)
    path = save(tmp_path / "a.wav", np.stack([left, right], axis=1), subtype="FLOAT")
    assert np.array_equal(read_audio(path, channel=1), right)
    assert np.allclose(read_audio(path), (left + right) / 2, atol=1e-7)
    with pytest.raises(DataError, match="there is no channel 2; it has 2, counted from 0"):
        read_audio(path, channel=2)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_stretch_is_exactly_those_samples(tmp_path: Path, suffix: str):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 16000).astype(np.float32)
    path = save(tmp_path / f"a.{suffix}", noise)
    whole = read_audio(path)
    assert np.array_equal(read_audio(path, start_s=0.25, end_s=0.5), whole[4000:8000])
    assert np.array_equal(read_audio(path, start_s=0.9), whole[14400:])
    assert np.array_equal(read_audio(path, start_s=0.9, end_s=1.4), whole[14400:])
    assert "the stretch ends at 1.6 s, the file at 1 s" in message(path, start_s=0.9, end_s=1.6)
    assert "the stretch begins at 2 s, the file ends at 1 s" in message(path, start_s=2, end_s=2.2)


def test_a_stretch_of_a_long_file_does_not_read_the_rest(tmp_path: Path):
    import tracemalloc

    path = tmp_path / "long.wav"
    with soundfile.SoundFile(path, "w", RATE, 1, subtype="PCM_16") as out:
        for _ in range(60):
            out.write(np.zeros(RATE * 10, np.int16))
    tracemalloc.start()
    assert len(read_audio(path, start_s=590, end_s=591)) == RATE
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6
    assert duration_s(Utterance(key="a", wav=str(path))) == 600.0


def test_a_tar_member_is_read_by_offset(tmp_path: Path):
    want = tone()
    body = io.BytesIO()
    soundfile.write(body, want, RATE, format="FLAC")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, data in (("k.txt", b"x"), ("k.flac", body.getvalue())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    row = read_manifest(tmp_path / "s.tar")[0]
    assert np.abs(read_audio(row.wav) - want).max() <= 2**-15
    assert duration_s(row) == 0.5
    (tmp_path / "s.tar").write_bytes((tmp_path / "s.tar").read_bytes()[:2000])
    assert "the tar ends inside this member" in message(row.wav)


def test_an_allowed_pipe_is_run_and_its_failure_is_named(tmp_path: Path):
    save(tmp_path / "a.wav", tone())
    (tmp_path / "wav.scp").write_text(f"a cat {tmp_path}/a.wav |\nb echo broken >&2; exit 3 |\n")
    (tmp_path / "text").write_text("a x\nb y\n")
    good, bad = read_manifest(tmp_path, allow_pipes=True)
    assert len(read_audio(good.wav)) == 8000
    with pytest.raises(DataError, match=r"exit 3: the command of wav.scp ended with status 3 and 0 bytes: broken"):
        read_audio(bad.wav)


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path):
    assert message(tmp_path / "nothing.wav") == "there is no such file"


def test_an_empty_file_is_named(tmp_path: Path):
    (tmp_path / "a.wav").write_bytes(b"")
    assert message(tmp_path / "a.wav") == "the file is empty (0 bytes)"


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_file_without_samples_is_named(tmp_path: Path, suffix: str):
    path = save(tmp_path / f"a.{suffix}", np.zeros(0, np.float32))
    # soundfile writes nothing at all, not even a header, for a flac without samples
    assert message(path) in ("there are no samples in it", "the file is empty (0 bytes)")
    with pytest.raises(DataError):
        duration_s(Utterance(key="a", wav=str(path)))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.999])
@pytest.mark.parametrize(
    ("suffix", "extra"),
    [("wav", {}), ("flac", {}), ("ogg", {}), ("opus", {"format": "OGG", "subtype": "OPUS"}), ("mp3", {})],
)
def test_a_file_cut_short_is_detected(tmp_path: Path, suffix: str, extra: dict[str, str], share: float):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 32000).astype(np.float32)
    path = save(tmp_path / f"a.{suffix}", noise, **extra)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert "cut short" in message(path) or "not audio" in message(path)


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_an_m4a_cut_short_is_detected(tmp_path: Path, share: float):
    path = encode_av(tmp_path / "a.m4a", tone(2.0, 48000), "aac")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert "cut short" in message(path)


def test_a_wav_whose_header_promises_more_than_the_file_holds_says_both_numbers(tmp_path: Path):
    path = save(tmp_path / "a.wav", tone())
    path.write_bytes(path.read_bytes()[:-1000])
    assert message(path) == "it is cut short: the header promises 8000 samples, the file holds 7500"
    with pytest.raises(DataError, match="promises 8000 samples"):
        duration_s(Utterance(key="a", wav=str(path)))


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0])
def test_a_wav_written_to_a_pipe_has_no_size_and_is_no_damage(tmp_path: Path, size: int):
    path = save(tmp_path / "a.wav", tone())
    body = bytearray(path.read_bytes())
    assert body[36:40] == b"data"
    body[40:44] = struct.pack("<I", size)
    path.write_bytes(bytes(body))
    if size:
        assert len(read_audio(path)) == 8000


def test_a_rate_that_contradicts_the_rest_of_the_header_is_detected(tmp_path: Path):
    path = save(tmp_path / "a.wav", tone())
    body = bytearray(path.read_bytes())
    body[24:28] = struct.pack("<I", 8000)
    path.write_bytes(bytes(body))
    assert message(path) == "the header contradicts itself: 8000 Hz of 2 bytes is not 32000 bytes per second"


def test_an_impossible_rate_is_detected(tmp_path: Path):
    path = save(tmp_path / "a.wav", tone(), 3)
    assert message(path) == "the header says 3 Hz, which cannot be"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_no_numbers_are_detected(tmp_path: Path, value: float):
    samples = tone()
    samples[77] = value
    path = save(tmp_path / "a.wav", samples, subtype="FLOAT")
    assert message(path) == f"sample 77 of 8000 is {np.float32(value)}, not a number that can be heard"


def test_loud_finite_samples_are_no_damage(tmp_path: Path):
    path = save(tmp_path / "a.wav", np.full(100, 1e37, np.float32), subtype="FLOAT")
    assert len(read_audio(path)) == 100


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"<!DOCTYPE html><html>not found</html>" * 10, "not audio in a known format"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "this is a Git LFS pointer, not audio"),
        (b"\0" * 4096, "not audio in a known format"),
    ],
)
def test_what_is_not_audio_says_so(tmp_path: Path, body: bytes, what: str):
    path = tmp_path / "a.wav"
    path.write_bytes(body)
    assert what in message(path)


def test_a_flipped_bit_in_a_flac_is_detected(tmp_path: Path):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 32000).astype(np.float32)
    path = save(tmp_path / "a.flac", noise)
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 0x10
    path.write_bytes(bytes(body))
    assert message(path).startswith("it is damaged or cut short")


def test_trouble_of_the_storage_is_not_trouble_of_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save(tmp_path / "a.wav", tone())

    def stale(*args: object, **options: object) -> object:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr("builtins.open", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        read_audio(path)


def test_durations_come_from_headers(tmp_path: Path):
    save(tmp_path / "a.wav", tone(0.5))
    save(tmp_path / "b.flac", tone(1.25, 8000), 8000)
    for key in "ab":
        (tmp_path / f"{key}.txt").write_text("x")
    assert [r.duration_s for r in fill_durations(read_manifest(tmp_path), duration_s)] == [0.5, 1.25]
    stretch = Utterance(key="a", wav=str(tmp_path / "a.wav"), start_s=0.25, end_s=0.6)
    assert duration_s(stretch) == 0.25


def test_resampling_to_the_same_rate_is_the_same_array():
    samples = tone()
    assert resample(samples, RATE, RATE) is samples


@pytest.mark.parametrize("name", ["fsdd/new.dev.list", "an4/dev.list", "cmn-words/dev.list"])
def test_every_real_file_is_read_and_lasts_as_long_as_its_list_says(shared: Path, name: str):
    for row in read_manifest(shared / "data" / name)[:60]:
        samples, rate = decode(row.wav)
        assert row.duration_s is not None
        assert abs(len(samples) / rate - row.duration_s) < 0.06
        assert abs(duration_s(row) - len(samples) / rate) < 1e-9


def test_a_named_pipe_is_refused_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "a.wav")
    with pytest.raises(DataError, match=r"a\.wav: this is a pipe or a device, not a file"):
        read_audio(tmp_path / "a.wav")
    with pytest.raises(DataError, match="no path can hold a NUL byte"):
        read_audio("a\0.wav")


def test_a_header_with_more_channels_than_its_frames_have_room_for_is_refused(tmp_path: Path):
    path = save(tmp_path / "a.wav", tone())
    body = bytearray(path.read_bytes())
    body[22:24] = (1000).to_bytes(2, "little")
    path.write_bytes(body)
    with pytest.raises(DataError, match="the header contradicts itself: 1000 channels of"):
        read_audio(path)


@pytest.mark.parametrize("suffix", [".wav", ".mp3", ".m4a", ""])
@pytest.mark.parametrize("kind", [("FLAC", "PCM_24"), ("MP3", None), ("OGG", "VORBIS"), ("WAV", "PCM_24")])
def test_content_and_not_the_suffix_says_what_a_file_is(tmp_path: Path, suffix: str, kind: tuple[str, str | None]):
    true = tmp_path / f"true.{kind[0].lower()}"
    soundfile.write(true, tone(), 16000, format=kind[0], subtype=kind[1])
    other = tmp_path / f"a b ü{suffix}"
    other.write_bytes(true.read_bytes())
    assert np.array_equal(read_audio(other), read_audio(true))
