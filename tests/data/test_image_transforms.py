"""What a model sees of an image, in training and outside it."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from thawline.core.config import bind, parse_yaml
from thawline.data.image import ImageArrays
from thawline.data.image_transforms import (
    Augmentation,
    ImageConf,
    ImageInput,
    ImageSamples,
    _random_box,
    check_kornia,
    seen,
    varied,
)
from thawline.data.loader import BatchRequest, Loader
from thawline.data.sample_reading import seed_sample
from thawline.data.sampler import Cursor
from thawline.errors import RecipeError

PIXELS = np.random.RandomState(0).randint(0, 256, (20, 30, 3)).astype(np.uint8)
PLAIN = ImageInput(size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def test_outside_training_a_square_image_is_resized_as_pillow_does() -> None:
    wanted = Image.fromarray(PIXELS[:, :20]).resize((8, 8), Image.Resampling.BICUBIC)
    made = seen(PIXELS[:, :20], PLAIN)
    assert torch.equal(made, torch.from_numpy(np.array(wanted)).permute(2, 0, 1) / 255)


def test_outside_training_the_middle_square_of_a_long_image_is_looked_at() -> None:
    pixels = np.zeros((10, 40, 3), np.uint8)
    pixels[:, 15:25] = 200
    made = seen(pixels, ImageInput(size=10, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="nearest"))
    assert torch.equal(made, torch.full((3, 10, 10), 200 / 255))


def test_channels_are_normalised_by_mean_and_spread() -> None:
    made = seen(PIXELS, ImageInput(size=8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0)))
    plain = seen(PIXELS, PLAIN)
    for c, (mean, std) in enumerate(((0.1, 0.5), (0.2, 0.25), (0.3, 2.0))):
        assert torch.allclose(made[c], (plain[c] - mean) / std, atol=1e-6)


def test_a_variant_is_a_function_of_seed_epoch_and_sample() -> None:
    augment = Augmentation()

    def made(epoch: int, id: int) -> torch.Tensor:
        seed_sample(7, epoch, id)
        return varied(PIXELS, PLAIN, augment)

    first = made(0, 3)
    random.random(), np.random.rand(), torch.rand(5)  # a spoiler: others draw in between
    assert torch.equal(made(0, 3), first)
    assert not torch.equal(made(1, 3), first)
    assert not torch.equal(made(0, 4), first)


def test_workers_and_prefetch_change_no_bit() -> None:
    images = ImageArrays(Path("x.npz"), ("a",), (0,) * 12, np.stack([np.roll(PIXELS, i, 0) for i in range(12)]))
    samples = ImageSamples(images, PLAIN, labels=[0], augment=Augmentation())
    requests = [BatchRequest(epoch=2, cursor=Cursor(2, 0, b), ids=tuple(range(3 * b, 3 * b + 3))) for b in range(4)]
    found = []
    for workers in (0, 2):
        with Loader(samples, seed=7, workers=workers) as loader:
            found.append(torch.cat([loaded.batch.images for loaded in loader.iterate(requests)]))
    assert torch.equal(found[0], found[1])


def test_no_augmentation_in_words_is_no_augmentation() -> None:
    still = Augmentation(scale=(1, 1), ratio=(1, 1), flip=0, jitter=0)
    square = PIXELS[:, :20]
    assert torch.equal(varied(square, PLAIN, still), seen(square, PLAIN))


def test_a_sure_flip_mirrors_left_and_right() -> None:
    square = PIXELS[:, :20]
    made = varied(square, PLAIN, Augmentation(scale=(1, 1), ratio=(1, 1), flip=1, jitter=0))
    assert torch.equal(made, seen(square, PLAIN).flip(-1))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 1000), st.floats(0.01, 1))
def test_a_random_crop_lies_inside_the_image_and_keeps_its_share(w: int, h: int, seed: int, least: float) -> None:
    torch.manual_seed(seed)
    left, top, right, bottom = _random_box(w, h, Augmentation(scale=(least, 1.0)))
    assert 0 <= left < right <= w + 1e-9
    assert 0 <= top < bottom <= h + 1e-9
    ratio = (right - left) / (bottom - top)
    assert 0.75 - 1e-6 <= ratio <= 4 / 3 + 1e-6


def test_jitter_keeps_pixels_between_black_and_white() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        made = varied(PIXELS, PLAIN, Augmentation(jitter=0.9))
        assert 0 <= float(made.min()) <= float(made.max()) <= 1


def test_settings_of_a_recipe_stand_over_those_of_the_model() -> None:
    own = ImageInput(size=224, interpolation="bilinear")
    made = ImageConf(size=64, mean=(0.5, 0.5, 0.5)).over(own)
    assert (made.size, made.mean, made.interpolation, made.std) == (64, (0.5, 0.5, 0.5), "bilinear", own.std)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("augment: {scale: [1.0, 0.5]}", "scale goes from a smaller to a larger"),
        ("augment: {scale: [0.5, 2]}", "at most the whole area"),
        ("augment: {kornia: [{A: {}, B: {}}]}", "one class with its arguments"),
        ("sise: 64", "did you mean 'size'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_with_their_place(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        bind(ImageConf, parse_yaml(text, "recipe.yaml"))
    assert "recipe.yaml:1" in str(caught.value)


def test_kornia_draws_from_the_samples_own_counter_too() -> None:
    pytest.importorskip("kornia")
    augment = Augmentation(
        kornia=({"RandomErasing": {"p": 1.0, "scale": [0.1, 0.3]}}, {"RandomRotation": {"degrees": 20}})
    )
    check_kornia(augment)
    found = []
    for _ in range(2):
        seed_sample(7, 1, 5)
        found.append(varied(PIXELS, PLAIN, augment))
        torch.rand(3)
    assert torch.equal(found[0], found[1])
    seed_sample(7, 2, 5)
    assert not torch.equal(varied(PIXELS, PLAIN, augment), found[0])


def test_a_misspelt_kornia_step_is_refused_with_the_nearest_name() -> None:
    pytest.importorskip("kornia")
    with pytest.raises(RecipeError, match="has no 'RandomErazing'") as caught:
        check_kornia(Augmentation(kornia=({"RandomErazing": {}},)))
    assert "RandomErasing" in caught.value.fix
    with pytest.raises(RecipeError, match="RandomRotation"):
        check_kornia(Augmentation(kornia=({"RandomRotation": {"degreees": 3}},)))
