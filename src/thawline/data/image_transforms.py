"""From pixels to what a classifier sees, and the chance in between.

Every draw comes from torch's global generator, which the loader seeds from (seed, epoch, sample id) before each read:
an image looks in epoch 3 what it looks in epoch 3, whoever reads it and when.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from thawline.core.config import Strict, near_names
from thawline.core.extras import need
from thawline.data.image import ImageSet, Pixels
from thawline.errors import RecipeError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_TRIES = 10
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # PIL's numbers


class ImageInput(Strict):
    """What a model wants to see. Belongs to the model and travels with it."""

    size: int = Field(default=224, ge=1)
    """Side of the square input in pixels."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from each channel, of values between 0 and 1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Divides each channel after that."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    crop: float = Field(default=1.0, gt=0, le=1)
    """The share of the shorter side that is looked at outside training, in the middle."""


class Augmentation(Strict):
    """How a training image is varied. Nothing of it happens outside training."""

    scale: tuple[float, float] = (0.5, 1.0)
    """Share of the area that a random crop keeps, from least to most; (1, 1) crops nothing but to the square."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Width over height of a random crop."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Chance to mirror left and right."""
    jitter: float = Field(default=0.2, ge=0, lt=1)
    """Brightness, contrast and saturation are each multiplied by 1 - jitter to 1 + jitter."""
    kornia: tuple[dict[str, dict[str, Any]], ...] = ()
    """Further steps by kornia, e.g. [{RandomErasing: {p: 0.5}}]: classes of kornia.augmentation and their arguments,
    applied in order to the image between 0 and 1."""

    @model_validator(mode="after")
    def _in_order(self) -> Augmentation:
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} goes from a smaller to a larger number above 0")
        if self.scale[1] > 1:
            raise ValueError("a crop keeps at most the whole area: scale ends at 1")
        for step in self.kornia:
            if len(step) != 1:
                raise ValueError("each step of kornia is one class with its arguments: {RandomErasing: {p: 0.5}}")
        return self


class ImageConf(Strict):
    """`data.conf` of a vision recipe. What is left out comes from the model's own description."""

    size: int | None = Field(default=None, ge=1)
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    crop: float | None = Field(default=None, gt=0, le=1)
    augment: Augmentation | None = Augmentation()
    """null leaves training images as they are."""

    def over(self, own: ImageInput) -> ImageInput:
        """The model's own input with what is said here over it."""
        said = {name: value for name in ImageInput.model_fields if (value := getattr(self, name)) is not None}
        return own.model_copy(update=said)


def seen(pixels: Pixels, wanted: ImageInput) -> Tensor:
    """The image (h, w, 3) as a model sees it outside training: its middle, (3, size, size), normalised float32."""
    height, width = pixels.shape[:2]
    side = min(height, width) * wanted.crop
    left, top = (width - side) / 2, (height - side) / 2
    return _normalised(_resized(pixels, (left, top, left + side, top + side), wanted), wanted)


def varied(pixels: Pixels, wanted: ImageInput, augment: Augmentation) -> Tensor:
    """The image (h, w, 3) as one of its variants, (3, size, size), normalised float32; draws as described above."""
    image = _resized(pixels, _random_box(pixels.shape[1], pixels.shape[0], augment), wanted)
    if _uniform(0, 1) < augment.flip:
        image = image.flip(-1)
    if augment.jitter:
        image = _jittered(image, augment.jitter)
    for step in augment.kornia:
        image = _kornia(step)(image[None])[0]
    return _normalised(image, wanted)


class ImageSamples:
    """The samples of one set, as the training loop reads them.

    labels: index into the model's classes of each class of the set
    """

    def __init__(
        self, images: ImageSet, wanted: ImageInput, *, labels: Sequence[int], augment: Augmentation | None = None
    ) -> None:
        self.images = images
        self.wanted = wanted
        self._labels = tuple(labels)
        self._augment = augment

    def __len__(self) -> int:
        return len(self.images)

    def read(self, id: int, epoch: int) -> tuple[str, Tensor, int]:
        """Key, image (3, size, size) and class of sample `id`; `epoch` acts through the seeded generators."""
        pixels = self.images.pixels(id)
        image = seen(pixels, self.wanted) if self._augment is None else varied(pixels, self.wanted, self._augment)
        return self.images.key(id), image, self._labels[self.images.labels[id]]

    def key(self, id: int) -> str:
        return self.images.key(id)

    def collate(self, samples: Sequence[tuple[str, Tensor, int]]) -> ImageBatch:
        keys, images, labels = zip(*samples, strict=True)
        return ImageBatch(keys, torch.stack(images), torch.tensor(labels, dtype=torch.int64))

    def length(self, id: int) -> float:
        """All images are of one size, so batches are counted, never measured."""
        return 1.0

    @property
    def left_out(self) -> tuple[()]:
        """Nothing is filtered; an image that cannot be read is found when it is read."""
        return ()

    @property
    def fingerprint(self) -> str:
        return self.images.fingerprint


class ImageBatch:
    """Images (batch, 3, size, size) float32 and their classes (batch,) int64."""

    def __init__(self, keys: tuple[str, ...], images: Tensor, labels: Tensor) -> None:
        self.keys = keys
        self.images = images
        self.labels = labels

    def rows(self, start: int, stop: int) -> ImageBatch:
        return ImageBatch(self.keys[start:stop], self.images[start:stop], self.labels[start:stop])

    def to(self, device: Any) -> ImageBatch:
        return ImageBatch(self.keys, self.images.to(device), self.labels.to(device))


def _resized(pixels: Pixels, box: tuple[float, float, float, float], wanted: ImageInput) -> Tensor:
    """The part of the image inside `box` (left, top, right, bottom) at the wanted size: (3, size, size), 0 to 1."""
    image = need("PIL.Image", extra="vision").fromarray(pixels)
    # One resampling from the box itself, with antialiasing, and no crop to whole pixels before it.
    made = image.resize((wanted.size, wanted.size), _RESAMPLING[wanted.interpolation], box=box)
    return torch.from_numpy(np.array(made)).permute(2, 0, 1).float().div_(255)


def _normalised(image: Tensor, wanted: ImageInput) -> Tensor:
    mean, std = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (wanted.mean, wanted.std))
    return (image - mean) / std


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), dtype=torch.float64).item()


def _random_box(width: int, height: int, augment: Augmentation) -> tuple[float, float, float, float]:
    """A crop of random area, shape and place (Szegedy et al. 2015, as torchvision's RandomResizedCrop does it).

    After ten shapes that do not fit, the largest one in the middle whose shape is allowed.
    """
    for _ in range(_TRIES):
        area = width * height * _uniform(*augment.scale)
        ratio = math.exp(_uniform(math.log(augment.ratio[0]), math.log(augment.ratio[1])))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = _uniform(0, width - w), _uniform(0, height - h)
            return left, top, left + w, top + h
    ratio = min(max(width / height, augment.ratio[0]), augment.ratio[1])
    w, h = min(width, height * ratio), min(height, width / ratio)
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def _jittered(image: Tensor, amount: float) -> Tensor:
    """Brightness, contrast and saturation in this order, each kept between 0 and 1."""
    brightness, contrast, saturation = (_uniform(1 - amount, 1 + amount) for _ in range(3))
    image = (image * brightness).clamp_(0, 1)
    image = _between(image, _grey(image).mean(), contrast)
    return _between(image, _grey(image), saturation)


def _between(image: Tensor, other: Tensor, amount: float) -> Tensor:
    return (other + (image - other) * amount).clamp_(0, 1)


def _grey(image: Tensor) -> Tensor:
    weights = torch.tensor(_LUMA)[:, None, None]
    return (image * weights).sum(0)


def check_kornia(augment: Augmentation) -> None:
    """Make every kornia step once, so that a misspelt one is an error now and not in a worker later."""
    for number, step in enumerate(augment.kornia):
        _kornia(step, augment.where("kornia", number))


def _kornia(step: Mapping[str, Mapping[str, Any]], where: str = "") -> Any:
    ((name, arguments),) = step.items()
    return _made_by_kornia(name, _frozen(arguments), where)


@functools.cache
def _made_by_kornia(name: str, arguments: tuple[tuple[str, Any], ...], where: str) -> Any:
    library = need("kornia.augmentation", extra="vision")
    known = [n for n in dir(library) if n[0].isupper()]
    if name not in known:
        near = near_names(name, known)
        raise RecipeError(
            f"kornia.augmentation has no {name!r}",
            where=where,
            fix=f"did you mean {near[0]!r}?" if near else "see kornia's documentation",
        )
    try:
        return getattr(library, name)(**dict(arguments))
    except (TypeError, ValueError) as exc:
        raise RecipeError(f"{name}: {exc}", where=where, fix="correct its arguments") from exc


def _frozen(arguments: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((key, _tuples(value)) for key, value in arguments.items())


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
