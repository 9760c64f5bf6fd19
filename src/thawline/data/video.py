"""Clips and still images: chosen frames of a file as normalised tensors.

Which frames, which crop, which flip: all follow from an explicit numpy generator, so from the sample's counter. Files
are read with PyAV (optional extra "video"); frames are sought, not decoded from the beginning, where the file allows
it. A file that cannot be read raises DataError with its name and the cause, and costs one sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from thawline.core.extras import need
from thawline.errors import DataError

How = Literal["uniform", "random", "demo"]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Normalisation:
    """Mean and standard deviation of the channels red, green, blue, for pixels in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""What VideoChat2 is trained with, and what its HD demo uses."""
CLIP = Normalisation((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""What VideoChat2's other demos use at inference, although it was not trained with it."""


@dataclass(frozen=True, slots=True)
class Clip:
    """Frames of one file.

    frames:  (T, H, W, 3) uint8, red green blue
    times_s: when each was shown, in seconds from the beginning of the file; empty for a still image
    """

    frames: Pixels
    times_s: tuple[float, ...]


MAX_PIXELS = 89_478_485
"""Of one frame; Pillow's limit for images (a quarter of a gigabyte in RGB)."""


# --- decisions -------------------------------------------------------------------------------------------------------


def frame_indices(total: int, wanted: int, how: How, rng: np.random.Generator | None = None) -> tuple[int, ...]:
    """Which of `total` frames to take, `wanted` of them, ascending; a shorter clip repeats its last frame.

    uniform: the middle of equal stretches (upstream's "middle", used in evaluation)
    random:  one frame of each stretch (upstream's "rand"; there the last frame of a stretch is never drawn)
    demo:    the rule of upstream's demos (`get_index`), slightly other frames than "uniform"
    Raises DataError for a clip without frames. `rng` is needed for "random" only.
    """
    if total < 1 or wanted < 1:
        raise DataError(f"{wanted} frames are wanted of a clip that has {total}")
    if how == "demo":
        stretch = (total - 1) / wanted
        first = int(stretch / 2)
        return tuple(min(first + round(stretch * i), total - 1) for i in range(wanted))
    count = min(wanted, total)
    borders = np.linspace(0, total, count + 1).astype(int)
    if how == "uniform":
        chosen = [(int(a) + int(b) - 1) // 2 for a, b in pairwise(borders)]
    else:
        assert rng is not None, "random frames need the sample's generator"
        chosen = [int(rng.integers(a, b)) for a, b in pairwise(borders)]
    return tuple(chosen + [chosen[-1]] * (wanted - count))


@dataclass(frozen=True, slots=True)
class Crop:
    """A part of a frame in pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


def random_crop(
    height: int, width: int, rng: np.random.Generator, *, scale: tuple[float, float] = (0.5, 1.0), flip: bool = True
) -> Crop:
    """A part of `scale` of the area, between 3:4 and 4:3, mirrored half of the time.

    torchvision's RandomResizedCrop and RandomHorizontalFlip, as upstream trains with (`dataset/__init__.py`).
    """
    mirrored = bool(flip and rng.random() < 0.5)
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            return Crop(top, left, h, w, mirrored)
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return Crop((height - h) // 2, (width - w) // 2, h, w, mirrored)


def tile_grid(height: int, width: int, max_tiles: int, size: int = 224) -> tuple[int, int]:
    """Rows and columns of tiles whose shape is nearest to the frame's, at most `max_tiles` together.

    Among equally near shapes the larger one is taken where the frame is more than half as large, tiles being `size`
    pixels wide (InternVL 1.5; `HD_transform_no_padding` in upstream's `hd_utils.py`).

    >>> tile_grid(720, 1280, 6)
    (1, 2)
    """
    shape = width / height
    # Upstream makes a set and sorts it by area, so that the order of equal areas is the set's; here it is by columns.
    grids = sorted(
        ((c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles // c + 1)), key=lambda g: (g[0] * g[1], g)
    )
    best, least = (1, 1), math.inf
    for columns, rows in grids:
        away = abs(shape - columns / rows)
        if away < least:
            best, least = (columns, rows), away
        elif away == least and height * width > 0.5 * size * size * columns * rows:
            best = (columns, rows)
    return best[1], best[0]


# --- pixels ----------------------------------------------------------------------------------------------------------


def prepare(frames: Pixels, size: int, *, normalisation: Normalisation = IMAGENET, crop: Crop | None = None) -> Tensor:
    """Frames (T, H, W, 3) uint8 -> (T, 3, size, size) float32, normalised.

    crop: the part that is taken, from `random_crop` in training; the whole frame, stretched to a square, where None
    """
    x = _channels_first(frames)
    if crop is not None:
        x = x[..., crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        x = x.flip(-1) if crop.flip else x
    if x.shape[-2:] != (size, size):
        x = functional.interpolate(x, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
        x = x.clamp_(0, 255)  # bicubic interpolation overshoots at edges
    return _normalised(x, normalisation)


def to_tiles(
    frames: Pixels,
    size: int,
    max_tiles: int,
    *,
    padding: bool = False,
    normalisation: Normalisation = IMAGENET,
) -> Tensor:
    """Frames (T, H, W, 3) uint8 -> (T, 3, rows * size, columns * size) float32, normalised: whole tiles (HD).

    padding: keep the aspect ratio and fill up with white above and below (left and right for upright frames), instead
        of stretching to the nearest grid
    """
    x = _channels_first(frames)
    height, width = x.shape[-2:]
    if not padding:
        rows, columns = tile_grid(height, width, max_tiles, size)
        return _normalised(_resized(x, rows * size, columns * size), normalisation)
    # As InternLM-XComposer2-4KHD. Upstream flips both axes of upright frames where a transposition is meant.
    upright = width < height
    if upright:
        x, height, width = x.transpose(-2, -1), width, height
    scale = 1
    while (scale + 1) * math.ceil((scale + 1) * height / width) <= max_tiles:
        scale += 1
    x = _resized(x, max(int(scale * size * height / width), 1), scale * size)
    missing = -x.shape[-2] % size
    x = functional.pad(x, (0, 0, missing // 2, missing - missing // 2), value=255.0)
    return _normalised(x.transpose(-2, -1) if upright else x, normalisation)


def _channels_first(frames: Pixels) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2).float()


def _resized(x: Tensor, height: int, width: int) -> Tensor:
    return functional.interpolate(x, size=(height, width), mode="bicubic", align_corners=False)


def _normalised(x: Tensor, normalisation: Normalisation) -> Tensor:
    mean = torch.tensor(normalisation.mean).view(3, 1, 1)
    std = torch.tensor(normalisation.std).view(3, 1, 1)
    return (x / 255.0 - mean) / std


# --- files -----------------------------------------------------------------------------------------------------------


def read_image(path: str | Path) -> Clip:
    """A still image as a clip of one frame without a time. Raises DataError naming the file and the cause."""
    av = need("av", extra="video")
    try:
        with av.open(str(path)) as container:
            _stream(container, path)
            for frame in container.decode(video=0):
                return Clip(_upright(frame)[None], ())
    except _causes(av) as exc:
        raise _unreadable(path, "image", exc) from exc
    raise DataError("the image holds no picture", where=str(path))


def read_video(
    path: str | Path,
    wanted: int,
    how: How = "uniform",
    *,
    rng: np.random.Generator | None = None,
    start_s: float | None = None,
    end_s: float | None = None,
) -> Clip:
    """`wanted` frames of a video, or of its part from start_s to end_s.

    how, rng: as for `frame_indices`
    Frames are told apart by their presentation times, which are read from the packets without decoding. Where a file
    does not carry them, or hides frames, it is decoded from the beginning instead.
    Raises DataError naming the file and the cause: absent, no video in it, damaged, or no frame in the part asked for.
    """
    av = need("av", extra="video")
    try:
        times, keys, base = _scan(av, path)
        usable = len(times) > 0 and len(set(times)) == len(times)
        if usable:
            part = _part([float(t * base) for t in times], start_s, end_s, path)
            chosen = [part[i] for i in frame_indices(len(part), wanted, how, rng)]
            found = _sought(av, path, [times[i] for i in chosen], keys)
            if found is not None:
                first = times[0]
                return Clip(np.stack(found), tuple(float((times[i] - first) * base) for i in chosen))
        return _decoded(av, path, wanted, how, rng, start_s, end_s)
    except _causes(av) as exc:
        raise _unreadable(path, "video", exc) from exc


def video_seconds(path: str | Path) -> float:
    """How long a video lasts, from its first frame to its last, by the times that its packets carry; 0 where they carry
    none. Raises DataError naming the file and the cause."""
    av = need("av", extra="video")
    try:
        times, _, base = _scan(av, path)
    except _causes(av) as exc:
        raise _unreadable(path, "video", exc) from exc
    return float((times[-1] - times[0]) * base) if times else 0.0


def _scan(av: Any, path: str | Path) -> tuple[list[int], list[int], Any]:
    """Presentation times of all frames and of those that decoding can start at, ascending, and their unit."""
    with av.open(str(path)) as container:
        stream = _stream(container, path)
        times: list[int] = []
        keys: list[int] = []
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            if packet.pts is None:
                return [], [], stream.time_base
            times.append(packet.pts)
            if packet.is_keyframe:
                keys.append(packet.pts)
        return sorted(times), sorted(keys), stream.time_base


def _part(times_s: Sequence[float], start_s: float | None, end_s: float | None, path: str | Path) -> list[int]:
    """Numbers of the frames between start and end, both counted from the first frame."""
    first = times_s[0]
    lower, upper = start_s or 0.0, math.inf if end_s is None else end_s
    part = [i for i, t in enumerate(times_s) if lower <= t - first < upper]
    if not part:
        raise DataError(
            f"no frame between {lower:g} and {upper:g} seconds; it lasts {times_s[-1] - first:.1f}", where=str(path)
        )
    return part


def _sought(av: Any, path: str | Path, targets: Sequence[int], keys: Sequence[int]) -> list[Pixels] | None:
    """The frames shown at `targets`, decoding from the nearest key frame; None where one of them never appears."""
    missing = sorted(set(targets))
    found: dict[int, Pixels] = {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"  # loader workers are the parallelism here
        while missing:
            container.seek(max((k for k in keys if k <= missing[0]), default=missing[0]), stream=stream)
            before = len(missing)
            for frame in container.decode(stream):
                if frame.pts is None or frame.pts > missing[0]:
                    return None
                if frame.pts == missing[0]:
                    found[missing.pop(0)] = _upright(frame)
                    # Going on is cheaper than seeking, unless a key frame lies between here and the next target.
                    if not missing or any(frame.pts < k <= missing[0] for k in keys):
                        break
            if len(missing) == before:
                return None
    return [found[t] for t in targets]


def _decoded(
    av: Any,
    path: str | Path,
    wanted: int,
    how: How,
    rng: np.random.Generator | None,
    start_s: float | None,
    end_s: float | None,
) -> Clip:
    """The same by decoding everything, twice, so that memory holds the chosen frames only."""
    times_s = [time for time, _ in _frames(av, path)]
    if not times_s:
        raise DataError("the video holds no frame that can be decoded", where=str(path))
    part = _part(times_s, start_s, end_s, path)
    chosen = [part[i] for i in frame_indices(len(part), wanted, how, rng)]
    kept = {i: _upright(f) for i, (_, f) in enumerate(_frames(av, path)) if i in set(chosen)}
    return Clip(np.stack([kept[i] for i in chosen]), tuple(times_s[i] - times_s[0] for i in chosen))


def _frames(av: Any, path: str | Path) -> Iterator[tuple[float, Any]]:
    with av.open(str(path)) as container:
        stream = _stream(container, path)
        rate = float(stream.average_rate or 25)
        for number, frame in enumerate(container.decode(stream)):
            yield (number / rate if frame.time is None else float(frame.time)), frame


def _stream(container: Any, path: str | Path) -> Any:
    """The picture stream. Raises DataError where there is none, or a frame of it would take more memory than any
    camera's."""
    if not container.streams.video:
        raise DataError("there is no video in the file", where=str(path))
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise DataError("its pictures are stored in a way that cannot be decoded here", where=str(path))
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > MAX_PIXELS:
        raise DataError(f"frames of {width} x {height} pixels are more than the limit of {MAX_PIXELS}", where=str(path))
    return stream


def _upright(frame: Any) -> Pixels:
    """A frame as it is to be shown: telephones store it lying and note how to turn it."""
    pixels: Pixels = frame.to_ndarray(format="rgb24")
    return np.rot90(pixels, round(frame.rotation / 90))


def _causes(av: Any) -> tuple[type[Exception], ...]:
    return (av.error.FFmpegError, OSError, ValueError, MemoryError)


def _unreadable(path: str | Path, what: str, exc: Exception) -> DataError:
    said = str(exc).splitlines()
    cause = getattr(exc, "strerror", None) or (said[0] if said else type(exc).__name__)
    return DataError(f"the {what} cannot be read: {cause}", where=str(path))
