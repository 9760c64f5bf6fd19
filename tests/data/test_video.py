"""The chosen frames of a file, whatever its codec; a bad file costs one sample and is named."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from thawline.core.extras import need
from thawline.data.video import (
    CLIP,
    IMAGENET,
    Clip,
    Crop,
    frame_indices,
    prepare,
    random_crop,
    read_image,
    read_video,
    tile_grid,
    to_tiles,
    video_seconds,
)
from thawline.errors import DataError

N, RATE = 40, 8
STEP = 6
"""Grey levels between frames, far above what lossy codecs blur."""


def write_video(path: Path, codec: str, pix_fmt: str, options: dict[str, str] | None = None) -> Path:
    """N frames of 64 x 48, frame i all of grey i * STEP."""
    av = need("av", extra="video")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        for number in range(N):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number * STEP, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(clip: Clip) -> list[int]:
    """Which frames they are, by their grey."""
    return [round(float(f.mean()) / STEP) for f in clip.frames]


FORMATS = [
    ("a.mkv", "ffv1", "bgr0", None),
    ("b.mp4", "libx264", "yuv420p", {"g": "10", "bf": "3"}),
    ("open.mp4", "libx264", "yuv420p", {"g": "12", "bf": "2", "x264-params": "open-gop=1"}),
    ("c.avi", "mpeg4", "yuv420p", {"g": "7"}),
    ("d.webm", "libvpx", "yuv420p", {"g": "9", "auto-alt-ref": "1", "lag-in-frames": "8"}),
    ("e.gif", "gif", "rgb8", None),
]


@pytest.mark.parametrize(("name", "codec", "pix_fmt", "options"), FORMATS, ids=[f[0] for f in FORMATS])
def test_the_middle_frames_are_found_in_every_format(
    tmp_path: Path, name: str, codec: str, pix_fmt: str, options: dict[str, str] | None
) -> None:
    path = write_video(tmp_path / name, codec, pix_fmt, options)
    clip = read_video(path, 5)
    assert clip.frames.shape == (5, 48, 64, 3)
    assert clip.frames.dtype == np.uint8
    if codec == "gif":  # its colours are coarse
        assert np.all(np.abs(np.array(numbers(clip)) - [3, 11, 19, 27, 35]) <= 4)
    else:
        assert numbers(clip) == [3, 11, 19, 27, 35]
    assert clip.times_s == pytest.approx([i / RATE for i in (3, 11, 19, 27, 35)], abs=0.02)


@pytest.mark.parametrize(("name", "codec", "pix_fmt", "options"), FORMATS[:5], ids=[f[0] for f in FORMATS[:5]])
def test_seeking_gives_the_frames_that_decoding_everything_gives(
    tmp_path: Path, name: str, codec: str, pix_fmt: str, options: dict[str, str] | None
) -> None:
    av = need("av", extra="video")
    path = write_video(tmp_path / name, codec, pix_fmt, options)
    with av.open(str(path)) as container:
        everything = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert len(everything) == N
    for seed in range(4):
        clip = read_video(path, 6, "random", rng=np.random.default_rng(seed))
        chosen = frame_indices(N, 6, "random", np.random.default_rng(seed))
        assert np.array_equal(clip.frames, np.stack([everything[i] for i in chosen]))


def test_a_part_of_the_video_is_counted_in_seconds(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mkv", "ffv1", "bgr0")
    assert numbers(read_video(path, 4, start_s=1.0, end_s=2.0)) == [8, 10, 12, 14]
    with pytest.raises(DataError, match=r"no frame between 90 and 91 seconds; it lasts 4\.9"):
        read_video(path, 4, start_s=90.0, end_s=91.0)


def test_a_short_video_repeats_its_last_chosen_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mkv", "ffv1", "bgr0")
    assert numbers(read_video(path, 4, start_s=0.0, end_s=0.25)) == [0, 1, 1, 1]


def test_random_frames_follow_from_the_generator_alone(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mkv", "ffv1", "bgr0")
    np.random.seed(0)
    once = read_video(path, 8, "random", rng=np.random.default_rng(5))
    np.random.seed(1)
    again = read_video(path, 8, "random", rng=np.random.default_rng(5))
    other = read_video(path, 8, "random", rng=np.random.default_rng(6))
    assert np.array_equal(once.frames, again.frames)
    assert numbers(once) != numbers(other)


def upstream_middle(num_frames: int, vlen: int) -> list[int]:
    """`get_frame_indices(..., sample='middle')` of Ask-Anything's video_utils.py, in its own words."""
    acc = min(num_frames, vlen)
    intervals = np.linspace(start=0, stop=vlen, num=acc + 1).astype(int)
    ranges = [(interv, intervals[i + 1] - 1) for i, interv in enumerate(intervals[:-1])]
    found = [(x[0] + x[1]) // 2 for x in ranges]
    return [*found, *[found[-1]] * (num_frames - len(found))]


@pytest.mark.parametrize("total", [1, 3, 8, 17, 100, 1001])
@pytest.mark.parametrize("wanted", [1, 4, 8, 16])
def test_uniform_frames_are_upstreams_middle_frames(total: int, wanted: int) -> None:
    assert list(frame_indices(total, wanted, "uniform")) == upstream_middle(wanted, total)


@pytest.mark.parametrize("total", [4, 17, 100])
def test_a_random_frame_lies_in_its_own_stretch_and_any_may_come(total: int) -> None:
    rng = np.random.default_rng(0)
    drawn = np.array([frame_indices(total, 4, "random", rng) for _ in range(3000)])
    assert np.all(np.diff(drawn) > 0)
    assert set(drawn.ravel()) == set(range(total))


def test_the_demos_frames_are_those_of_get_index() -> None:
    seg = float(100 - 1) / 8
    golden = [int(seg / 2) + int(np.round(seg * i)) for i in range(8)]
    assert list(frame_indices(100, 8, "demo")) == golden


def test_no_frames_are_refused() -> None:
    with pytest.raises(DataError, match="8 frames are wanted of a clip that has 0"):
        frame_indices(0, 8, "uniform")


def test_a_bad_video_is_named_with_its_cause(tmp_path: Path) -> None:
    absent = tmp_path / "absent.mp4"
    with pytest.raises(DataError) as caught:
        read_video(absent, 4)
    assert str(caught.value).startswith(f"{absent}: the video cannot be read: No such file or directory")
    noise = tmp_path / "noise.mp4"
    noise.write_bytes(np.random.default_rng(0).bytes(4096))
    with pytest.raises(DataError, match=r"noise\.mp4: the video cannot be read: "):
        read_video(noise, 4)
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.mp4: the video cannot be read: "):
        read_video(empty, 4)


def test_a_truncated_video_is_refused_or_read_but_never_crashes(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "v.mp4", "libx264", "yuv420p", {"g": "10"}).read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.mp4: the video cannot be read"):
        read_video(cut, 4)


def test_a_matroska_file_cut_anywhere_gives_frames_or_a_sentence(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "v.mkv", "libx264", "yuv420p", {"g": "10"}).read_bytes()
    cut = tmp_path / "cut.mkv"
    refusals: list[DataError] = []
    read = 0
    for share in (0.02, 0.2, 0.5, 0.8, 0.99):
        cut.write_bytes(whole[: int(len(whole) * share)])
        try:
            read += read_video(cut, 4).frames.shape == (4, 48, 64, 3)
        except DataError as error:
            refusals.append(error)
    assert read + len(refusals) == 5
    assert all(error.where == str(cut) for error in refusals)
    assert read  # what was written before the cut can be watched


def test_frames_of_uneven_length_keep_their_own_times(tmp_path: Path) -> None:
    av = need("av", extra="video")
    path = tmp_path / "uneven.mp4"
    shown_at = [0, 1, 2, 3, 20, 21, 50, 90]  # tenths of a second
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10)
        for number, tenths in enumerate(shown_at):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number * STEP, np.uint8), format="rgb24")
            frame.pts, frame.time_base = tenths, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    clip = read_video(path, len(shown_at))
    assert numbers(clip) == list(range(8))
    assert clip.times_s == pytest.approx([t / 10 for t in shown_at], abs=0.01)
    assert numbers(read_video(path, 2, start_s=1.0, end_s=6.0)) == [4, 5]
    assert video_seconds(path) == pytest.approx(9.0, abs=0.01)


def test_a_video_without_a_frame_is_named(tmp_path: Path) -> None:
    av = need("av", extra="video")
    path = tmp_path / "nothing.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    with pytest.raises(DataError, match=r"nothing\.mkv: the video cannot be read: End of file"):
        read_video(path, 4)
    stills = tmp_path / "stills.mp4"
    with av.open(str(stills), "w") as container:
        sound = container.add_stream("aac", rate=8000, layout="mono")
        container.add_stream("libx264", rate=8).width = 64
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    with pytest.raises(DataError, match=r"the video holds no frame that can be decoded|there is no video in the file"):
        read_video(stills, 4)


IDENTITY = (65536, 0, 0, 0, 65536, 0, 0, 0, 0x40000000)


@pytest.mark.parametrize(
    ("matrix", "light"),
    [
        (IDENTITY, (slice(None), slice(0, 32))),
        ((0, 65536, 0, -65536, 0, 0, 0, 0, 0x40000000), (slice(0, 32), slice(None))),
        ((0, -65536, 0, 65536, 0, 0, 0, 0, 0x40000000), (slice(32, 64), slice(None))),
        ((-65536, 0, 0, 0, -65536, 0, 0, 0, 0x40000000), (slice(None), slice(32, 64))),
    ],
    ids=["upright", "clockwise", "anticlockwise", "upside_down"],
)
def test_a_telephone_held_sideways_is_turned_upright(tmp_path: Path, matrix: Any, light: Any) -> None:
    av = need("av", extra="video")
    path = tmp_path / "turned.mp4"
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, :32] = 200  # the left half is light
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(8):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    held = path.read_bytes()
    at = held.index(struct.pack(">9i", *IDENTITY), held.index(b"tkhd"))  # the track's matrix (ISO 14496-12, 8.3.2)
    path.write_bytes(held[:at] + struct.pack(">9i", *matrix) + held[at + 36 :])
    seen = read_video(path, 2).frames[0]
    assert seen.shape == ((64, 48, 3) if matrix[0] == 0 else (48, 64, 3))
    shown = seen[light]
    assert shown.mean() > 190
    assert seen.astype(int).sum() == pytest.approx(shown.astype(int).sum(), rel=0.02)  # the rest is dark


def test_frames_that_would_fill_the_memory_are_refused(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    with pytest.raises(DataError, match="frames of 10000 x 10000 pixels are more than the limit of 89478485"):
        read_image(tmp_path / "bomb.png")


def test_a_photograph_held_sideways_is_turned_upright(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    lying = image.new("RGB", (40, 20))
    exif = lying.getexif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise
    lying.save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").frames.shape == (1, 40, 20, 3)


def test_a_sound_file_has_no_video(tmp_path: Path) -> None:
    av = need("av", extra="video")
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(DataError, match="there is no video in the file"):
        read_video(path, 4)
    with pytest.raises(DataError, match="there is no video in the file"):
        video_seconds(path)


def test_an_image_is_a_clip_of_one_frame(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    image.fromarray(pixels).save(tmp_path / "i.png")
    clip = read_image(tmp_path / "i.png")
    assert np.array_equal(clip.frames, pixels[None])
    assert clip.times_s == ()
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"bad\.png: the image cannot be read"):
        read_image(tmp_path / "bad.png")


def test_pixels_are_normalised_with_the_named_statistics() -> None:
    frames = np.full((2, 8, 8, 3), (255, 0, 128), np.uint8)
    for constants in (IMAGENET, CLIP):
        x = prepare(frames, 8, normalisation=constants)
        wanted = [(v / 255 - m) / s for v, m, s in zip((255, 0, 128), constants.mean, constants.std, strict=True)]
        assert x.shape == (2, 3, 8, 8)
        assert x[0, :, 0, 0].tolist() == pytest.approx(wanted, abs=1e-6)


def test_a_crop_takes_its_part_and_its_mirror_image() -> None:
    frames = np.arange(6 * 8, dtype=np.uint8).reshape(1, 6, 8, 1).repeat(3, axis=3)
    plain = prepare(frames, 4, crop=Crop(1, 2, 4, 4))
    flipped = prepare(frames, 4, crop=Crop(1, 2, 4, 4, flip=True))
    red = plain[0, 0] * IMAGENET.std[0] + IMAGENET.mean[0]
    assert torch.allclose(red * 255, torch.from_numpy(frames[0, 1:5, 2:6, 0]).float(), atol=1e-4)
    assert torch.equal(flipped, plain.flip(-1))


def test_random_crops_lie_inside_and_cover_half_the_area_or_more() -> None:
    rng = np.random.default_rng(0)
    crops = [random_crop(90, 160, rng) for _ in range(500)]
    assert all(0 <= c.top <= 90 - c.height and 0 <= c.left <= 160 - c.width for c in crops)
    # Rounding of sides moves the area by less than a row and a column.
    assert min(c.height * c.width for c in crops) >= 0.5 * 90 * 160 - 160
    assert {c.flip for c in crops} == {True, False}
    assert random_crop(90, 160, np.random.default_rng(1)) == random_crop(90, 160, np.random.default_rng(1))


def internvl_grid(width: int, height: int, hd_num: int, size: int) -> tuple[int, int]:
    """`find_closest_aspect_ratio` of InternVL 1.5 as upstream has it, with its rule for ties."""
    ratios = {(i, j) for n in range(1, hd_num + 1) for i in range(1, n + 1) for j in range(1, n + 1) if i * j <= hd_num}
    best_diff, best = float("inf"), (1, 1)
    for ratio in sorted(ratios, key=lambda r: (r[0] * r[1], r)):
        diff = abs(width / height - ratio[0] / ratio[1])
        if diff < best_diff:
            best_diff, best = diff, ratio
        elif diff == best_diff and width * height > 0.5 * size * size * ratio[0] * ratio[1]:
            best = ratio
    return best


def test_tiles_are_chosen_as_internvl_does() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        width, height = int(rng.integers(50, 2000)), int(rng.integers(50, 2000))
        columns, rows = internvl_grid(width, height, 6, 224)
        assert tile_grid(height, width, 6) == (rows, columns)
    assert tile_grid(1000, 1000, 6) == (2, 2)
    assert tile_grid(100, 100, 6) == (1, 1)


@pytest.mark.parametrize(("height", "width"), [(90, 160), (160, 90), (64, 64), (40, 300)])
@pytest.mark.parametrize("padding", [False, True])
def test_a_clip_becomes_whole_tiles_and_not_too_many(height: int, width: int, padding: bool) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    x = to_tiles(frames, 32, 6, padding=padding)
    rows, columns = x.shape[-2] // 32, x.shape[-1] // 32
    assert x.shape == (2, 3, rows * 32, columns * 32)
    assert rows * columns <= 6
    assert (columns >= rows) == (width >= height) or rows == columns


def test_padding_keeps_an_upright_clip_upright() -> None:
    frames = np.zeros((1, 160, 80, 3), np.uint8)
    frames[0, :80] = 200  # the upper half is light
    x = to_tiles(frames, 32, 6, padding=True) * torch.tensor(IMAGENET.std).view(3, 1, 1)
    x = x + torch.tensor(IMAGENET.mean).view(3, 1, 1)
    assert float(x[0, :, 4, x.shape[-1] // 2].mean()) > 0.7
    assert float(x[0, :, -5, x.shape[-1] // 2].mean()) < 0.1


def test_the_reader_does_not_need_more_than_pyav(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import builtins

    path = write_video(tmp_path / "v.mkv", "ffv1", "bgr0")
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in {"torchvision", "decord", "cv2", "imageio"}:
            raise AssertionError(f"{name} was imported")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert len(read_video(path, 3).frames) == 3


def test_pictures_of_a_coding_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    av = need("av", extra="video")
    path = tmp_path / "odd.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame(64, 48, "rgb24")))
        container.mux(stream.encode())
    content = path.read_bytes()
    assert content.count(b"avc1")
    path.write_bytes(content.replace(b"avc1", b"zzzz"))
    with pytest.raises(DataError, match=r"odd\.mp4: its pictures are stored in a way that cannot be decoded here"):
        read_video(path, 2)
