"""Labelled images: where they lie, and one of them as pixels.

Three forms are read: a folder of one folder a class (DIR/CLASS/*.jpg), a CSV with the columns path and label, and
arrays (`images`, `labels`, `classes`) in a safetensors or npz file. What a training sample looks like to a model is
`image_transforms`' matter.
"""

from __future__ import annotations

import csv
import json
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from thawline.core.config import near_names
from thawline.core.digest import digest_bytes
from thawline.core.extras import need
from thawline.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})

Pixels = NDArray[np.uint8]
"""(height, width, 3), RGB."""


class ImageSet(Protocol):
    """Labelled images by number.

    path:    what was read
    classes: names in their order
    labels:  index into `classes` of each image
    """

    @property
    def path(self) -> Path: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def labels(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def key(self, id: int) -> str: ...
    def pixels(self, id: int) -> Pixels: ...
    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True, slots=True)
class ImageFiles:
    """Images that are files of their own; `keys` are their paths as the set names them."""

    path: Path
    classes: tuple[str, ...]
    labels: tuple[int, ...]
    files: tuple[str, ...]
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def key(self, id: int) -> str:
        return self.keys[id]

    def pixels(self, id: int) -> Pixels:
        return read_pixels(Path(self.files[id]))

    @property
    def fingerprint(self) -> str:
        """Changes with the names, the labels and the sizes of the files (their bytes are not read)."""
        rows = (
            f"{key}\t{self.classes[label]}\t{_size(file)}"
            for key, label, file in zip(self.keys, self.labels, self.files, strict=True)
        )
        return digest_bytes("images", (len(self),), "\n".join(rows).encode())


@dataclass(frozen=True, slots=True)
class ImageArrays:
    """Images in one array (n, height, width, channels) of bytes; channels are 1 or 3."""

    path: Path
    classes: tuple[str, ...]
    labels: tuple[int, ...]
    images: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.images)

    def key(self, id: int) -> str:
        return f"{self.path.name}[{id}]"

    def pixels(self, id: int) -> Pixels:
        image = self.images[id]
        return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))

    @property
    def fingerprint(self) -> str:
        """Digest of every pixel and label."""
        text = json.dumps([self.classes, self.labels]).encode()
        data = np.ascontiguousarray(self.images).tobytes()
        return digest_bytes("U8", self.images.shape, text + data)


def read_images(path: Path) -> ImageSet:
    """The set at `path`. Raises DataError: nothing there, empty, or none of the three forms."""
    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        near = near_names(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else []
        fix = f"did you mean {path.parent / near[0]}?" if near else "check the path"
        raise DataError("no such file or folder", where=str(path), fix=fix)
    if path.suffix == ".csv":
        return _read_csv(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    raise DataError(
        f"{path.suffix or 'this'!r} is no form of labelled images",
        where=str(path),
        fix="give a folder of one folder a class, a .csv with path,label, or .safetensors or .npz with images, labels",
    )


def read_pixels(file: Path) -> Pixels:
    """An image file as RGB, turned upright as its camera noted; of an animation the first picture, of 16 bits the upper
    eight. Raises DataError for what is no whole image, or would take more memory than any photograph."""
    image_module = need("PIL.Image", extra="vision")
    turned = need("PIL.ImageOps", extra="vision")
    try:
        # Pillow only warns of a size that looks like an attack, and warns of much that does no harm.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", image_module.DecompressionBombWarning)
            with image_module.open(file) as image:
                image.load()
                upright = turned.exif_transpose(image)
                return np.asarray(_flat(_in_bytes(upright, image_module), image_module).convert("RGB"))
    except OSError as exc:
        if exc.errno is not None:
            raise  # storage, not the image: the loader knows which of these pass
        raise _bad(file, exc) from exc
    except (image_module.DecompressionBombError, image_module.DecompressionBombWarning) as exc:
        raise _bad(file, exc) from exc
    except (SyntaxError, ValueError, EOFError, MemoryError, struct.error, zlib.error) as exc:
        raise _bad(file, exc) from exc


def _in_bytes(image: Any, image_module: Any) -> Any:
    """Samples of 16 bits as bytes; Pillow's own conversion cuts them off at 255. Raises ValueError for floating-point
    samples, whose range nobody knows."""
    if image.mode == "F":
        raise ValueError("floating-point samples have no known range")
    if image.mode not in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        return image
    return image_module.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))


def _flat(image: Any, image_module: Any) -> Any:
    """Transparent pixels over white; as they are stored, their colour is anything."""
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image
    clear = image.convert("RGBA")
    ground = image_module.new("RGBA", clear.size, (255, 255, 255, 255))
    return image_module.alpha_composite(ground, clear)


def _bad(file: Path, exc: Exception) -> DataError:
    cause = str(exc).splitlines()
    return DataError(f"cannot be read as an image: {cause[0] if cause else type(exc).__name__}", where=str(file))


def _read_folder(path: Path) -> ImageFiles:
    classes = tuple(sorted(entry.name for entry in os.scandir(path) if entry.is_dir() and entry.name[0] != "."))
    if not classes:
        loose = sum(1 for entry in os.scandir(path) if Path(entry.name).suffix.lower() in SUFFIXES)
        raise DataError(
            f"{loose} images but no folder a class" if loose else "no folder a class in it",
            where=str(path),
            fix="put each image into a folder of its class (DIR/CLASS/x.jpg), or write a CSV with path,label",
        )
    files: list[str] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        found = sorted(_images_in(path / name))
        if not found:
            raise DataError(
                f"the class {name!r} has no image",
                where=str(path / name),
                fix=f"remove the folder, or add images ({', '.join(sorted(SUFFIXES))})",
            )
        files += found
        labels += [number] * len(found)
    keys = tuple(os.path.relpath(file, path) for file in files)
    return ImageFiles(path, classes, tuple(labels), tuple(files), keys)


def _images_in(folder: Path) -> Iterable[str]:
    for place, _, names in os.walk(folder):
        for name in names:
            if Path(name).suffix.lower() in SUFFIXES:
                yield os.path.join(place, name)


def _read_csv(path: Path) -> ImageFiles:
    try:
        return _csv_rows(path)
    except (UnicodeDecodeError, csv.Error) as exc:
        raise DataError(f"cannot be read: {exc}", where=str(path), fix="write it as comma-separated UTF-8") from exc


def _csv_rows(path: Path) -> ImageFiles:
    with path.open(newline="", encoding="utf-8-sig") as handle:
        reader = csv.DictReader(handle)
        columns = reader.fieldnames or []
        if not {"path", "label"} <= set(columns):
            raise DataError(
                f"the columns are {', '.join(columns) or 'none'}; path and label are needed",
                where=f"{path}:1",
                fix="write a first line: path,label",
            )
        keys: list[str] = []
        words: list[str] = []
        for row in reader:
            if not row["path"] or not row["label"]:
                raise DataError("a row without path or label", where=f"{path}:{reader.line_num}", fix="complete it")
            keys.append(row["path"])
            words.append(row["label"].strip())
    if not keys:
        raise DataError("no rows", where=str(path), fix="write one line an image: path,label")
    classes = tuple(sorted(set(words), key=_in_order))
    number = {name: i for i, name in enumerate(classes)}
    files = tuple(str(path.parent / key) for key in keys)
    return ImageFiles(path, classes, tuple(number[w] for w in words), files, tuple(keys))


def _in_order(name: str) -> tuple[int, int, str]:
    """Whole numbers by value, then words by spelling."""
    return (0, int(name), "") if name.isdecimal() else (1, 0, name)


def _read_npz(path: Path) -> ImageArrays:
    try:
        # No pickle: an array of objects is refused, not run.
        with zipfile.ZipFile(path):
            pass  # numpy also reads single arrays of this name, and calls everything else a pickle
        with np.load(path, allow_pickle=False) as held:
            given = {name: held[name] for name in ("images", "labels", "classes") if name in held.files}
            names = held.files
    except (ValueError, OSError, zipfile.BadZipFile) as exc:
        raise DataError(f"cannot be read: {exc}", where=str(path), fix="write it with numpy.savez") from exc
    return _arrays(path, given, names, given["classes"].tolist() if "classes" in given else None)


def _read_safetensors(path: Path) -> ImageArrays:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as held:
            names = list(held.keys())
            given = {name: held.get_tensor(name) for name in ("images", "labels") if name in names}
            noted = json.loads((held.metadata() or {}).get("classes", "null"))
    except (SafetensorError, OSError, ValueError) as exc:
        raise DataError(f"cannot be read: {exc}", where=str(path)) from exc
    return _arrays(path, given, names, noted)


def _arrays(path: Path, given: dict[str, Any], names: Sequence[str], named: object) -> ImageArrays:
    """The set of the arrays `images` and `labels`; `named` are the names of its classes, None for numbers."""
    if not {"images", "labels"} <= given.keys():
        raise DataError(
            f"it holds {', '.join(names) or 'nothing'}; the arrays images and labels are needed",
            where=str(path),
            fix="images: (n, height, width, 3) uint8; labels: (n,) whole numbers",
        )
    images, labels = np.asarray(given["images"]), np.asarray(given["labels"])
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim == 4 and images.shape[-1] not in (1, 3) and images.shape[1] in (1, 3):
        images = images.transpose(0, 2, 3, 1)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise DataError(
            f"images are {images.dtype} {images.shape}",
            where=str(path),
            fix="bytes are needed: uint8 (n, height, width, 3), or (n, 3, height, width)",
        )
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or int(labels.min()) < 0:
        raise DataError(
            f"labels are {labels.dtype} {labels.shape} for {len(images)} images",
            where=str(path),
            fix="one whole number from 0 an image",
        )
    count = int(labels.max()) + 1
    if named is not None and not isinstance(named, list):
        raise DataError(f"classes are {named!r}", where=str(path), fix="a list of their names, in order")
    classes = [str(c) for c in (range(count) if named is None else named)]
    if count > len(classes):
        raise DataError(f"label {count - 1} of {len(classes)} classes", where=str(path), fix="name every class")
    return ImageArrays(path, tuple(classes), tuple(int(i) for i in labels), images)


def _size(file: str) -> int:
    try:
        return os.stat(file).st_size
    except OSError:
        return -1  # read later, and then a bad sample
