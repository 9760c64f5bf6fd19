"""Labelled images in their three forms, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from thawline.data.image import read_images, read_pixels
from thawline.errors import DataError


def write_png(path: Path, colour: tuple[int, ...] = (10, 20, 30), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (4, 3), colour).save(path)
    return path


def test_a_folder_gives_its_classes_in_order_of_spelling_and_their_images(tmp_path: Path) -> None:
    for name in ("dog/b.png", "dog/sub/c.PNG", "cat/a.png"):
        write_png(tmp_path / name)
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    images = read_images(tmp_path)
    assert images.classes == ("cat", "dog")
    assert images.labels == (0, 1, 1)
    assert [images.key(i) for i in range(3)] == ["cat/a.png", "dog/b.png", "dog/sub/c.PNG"]
    assert images.pixels(0).tolist() == [[[10, 20, 30]] * 4] * 3


def test_a_csv_names_images_relative_to_itself(tmp_path: Path) -> None:
    write_png(tmp_path / "images" / "x.png")
    (tmp_path / "rows.csv").write_text("label,path\nzebra,images/x.png\nant,images/x.png\n")
    images = read_images(tmp_path / "rows.csv")
    assert (images.classes, images.labels) == (("ant", "zebra"), (1, 0))
    assert images.pixels(1).shape == (3, 4, 3)


def test_numbers_as_labels_are_in_order_of_value(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("path,label\na.png,10\nb.png,9\n")
    assert read_images(tmp_path / "rows.csv").classes == ("9", "10")


@pytest.mark.parametrize("form", ["npz", "safetensors"])
def test_arrays_may_be_channels_first_or_last_or_grey(tmp_path: Path, form: str) -> None:
    last = np.arange(2 * 5 * 4 * 3, dtype=np.uint8).reshape(2, 5, 4, 3)
    for name, array in (("last", last), ("first", last.transpose(0, 3, 1, 2)), ("grey", last[..., 0])):
        path = tmp_path / f"{name}.{form}"
        arrays = {"images": np.ascontiguousarray(array), "labels": np.array([1, 0])}
        if form == "npz":
            np.savez(path, classes=np.array(["ant", "bee"]), **arrays)
        else:
            save_file(arrays, path, metadata={"classes": json.dumps(["ant", "bee"])})
        images = read_images(path)
        assert images.classes == ("ant", "bee")
        wanted = np.repeat(last[1, :, :, :1], 3, -1) if name == "grey" else last[1]
        assert np.array_equal(images.pixels(1), wanted)


def test_the_fingerprint_changes_with_labels_names_and_pixels(tmp_path: Path) -> None:
    write_png(tmp_path / "set" / "a" / "1.png")
    write_png(tmp_path / "set" / "b" / "2.png")
    first = read_images(tmp_path / "set").fingerprint
    assert read_images(tmp_path / "set").fingerprint == first
    (tmp_path / "set" / "b" / "2.png").rename(tmp_path / "set" / "b" / "3.png")
    assert read_images(tmp_path / "set").fingerprint != first
    pixels = np.zeros((2, 3, 3, 3), np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.array([0, 1]))
    before = read_images(tmp_path / "x.npz").fingerprint
    pixels[1, 0, 0, 0] = 1
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.array([0, 1]))
    assert read_images(tmp_path / "x.npz").fingerprint != before


def test_a_camera_held_sideways_is_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[0] = 255
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise
    image.save(tmp_path / "x.png", exif=exif)
    assert read_pixels(tmp_path / "x.png").shape == (4, 2, 3)
    assert read_pixels(tmp_path / "x.png")[0].tolist() == [[0, 0, 0], [255, 255, 255]]


def test_transparent_pixels_lie_over_white(tmp_path: Path) -> None:
    write_png(tmp_path / "x.png", (0, 0, 0, 0), "RGBA")
    assert read_pixels(tmp_path / "x.png").min() == 255


def test_every_way_of_storing_colours_gives_the_same_picture(tmp_path: Path) -> None:
    red = Image.new("RGB", (4, 3), (255, 0, 0))
    red.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    red.convert("RGBA").save(tmp_path / "alpha.png")
    red.convert("CMYK").save(tmp_path / "cmyk.tif")
    Image.new("1", (4, 3), 1).save(tmp_path / "bit.png")
    Image.new("LA", (4, 3), (0, 0)).save(tmp_path / "clear.png")
    for name in ("palette.png", "alpha.png", "cmyk.tif"):
        assert np.array_equal(read_pixels(tmp_path / name), np.asarray(red)), name
    for name in ("bit.png", "clear.png"):
        assert read_pixels(tmp_path / name).min() == 255, name


def test_sixteen_bits_lose_their_lower_half_and_are_not_cut_off(tmp_path: Path) -> None:
    grey = np.array([[0, 255, 256, 40000, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    assert read_pixels(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 0, 1, 156, 255]
    Image.new("F", (4, 3), 0.5).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match="floating-point samples have no known range"):
        read_pixels(tmp_path / "float.tif")


def test_of_an_animation_the_first_picture_is_seen(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (4, 3), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for name in ("a.gif", "a.webp"):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:], lossless=True)
        assert read_pixels(tmp_path / name)[0, 0].tolist() == pytest.approx([255, 0, 0], abs=2)  # webp's own rounding


@pytest.mark.parametrize("side", [10_000, 20_000])  # where Pillow warns, and where it refuses by itself
def test_an_image_that_would_fill_the_memory_is_refused_before_it_is_read(tmp_path: Path, side: int) -> None:
    bomb = tmp_path / "bomb.png"
    Image.new("1", (side, side)).save(bomb)
    assert bomb.stat().st_size < 100_000
    with pytest.raises(DataError, match=r"cannot be read as an image: Image size \(\d+ pixels\) exceeds limit"):
        read_pixels(bomb)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"])
def test_a_damaged_file_is_a_picture_or_a_sentence_and_never_anything_else(tmp_path: Path, form: str) -> None:
    chance = np.random.RandomState(1)
    Image.fromarray(chance.randint(0, 256, (24, 20, 3)).astype(np.uint8)).save(tmp_path / "whole", form)
    whole = (tmp_path / "whole").read_bytes()
    reasons: list[str] = []
    for _ in range(60):
        torn = bytearray(whole[: chance.randint(1, len(whole) + 1)])
        for place in chance.randint(0, min(len(torn), 80), 4):
            torn[place] = chance.randint(256)
        (tmp_path / "torn").write_bytes(bytes(torn))
        try:
            pixels = read_pixels(tmp_path / "torn")
        except DataError as error:
            reasons.append(error.what)
        else:
            assert (pixels.dtype, pixels.shape[2]) == (np.uint8, 3)
    assert reasons
    assert all(reason.startswith("cannot be read as an image: ") for reason in reasons)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_what_is_no_image_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read as an image") as caught:
        read_pixels(tmp_path / "x.png")
    assert caught.value.where == str(tmp_path / "x.png")


def test_a_cut_jpeg_is_refused_and_not_filled_with_grey(tmp_path: Path) -> None:
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.jpg")
    whole = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="truncated"):
        read_pixels(tmp_path / "x.jpg")


def test_a_missing_file_is_left_to_the_loader_which_knows_storage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_pixels(tmp_path / "x.png")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: write_png(p / "set" / "x.png"), "1 images but no folder a class"),
        (lambda p: (p / "set" / "a").mkdir(parents=True), "the class 'a' has no image"),
        (lambda p: (p / "set").mkdir(), "no folder a class"),
        (lambda p: (p / "sett").mkdir(), "no such file or folder"),
    ],
)
def test_a_folder_that_is_no_set_is_refused(tmp_path: Path, make: object, words: str) -> None:
    make(tmp_path)  # type: ignore[operator]
    with pytest.raises(DataError, match=words):
        read_images(tmp_path / "set")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,class\na.png,b\n", "path and label are needed"),
        ("path,label\n", "no rows"),
        ("path,label\na.png,\n", "a row without path or label"),
    ],
)
def test_a_csv_that_is_no_set_is_refused_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        read_images(tmp_path / "rows.csv")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"pictures": np.zeros(3)}, "the arrays images and labels are needed"),
        ({"images": np.zeros((2, 3, 3, 3), np.float32), "labels": np.zeros(2, int)}, "images are float32"),
        ({"images": np.zeros((2, 3, 3, 3), np.uint8), "labels": np.zeros(3, int)}, "labels are int64"),
        (
            {"images": np.zeros((2, 3, 3, 3), np.uint8), "labels": np.array([0, 2]), "classes": np.array(["a", "b"])},
            "label 2 of 2 classes",
        ),
    ],
)
def test_arrays_that_are_no_set_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], words: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=words):
        read_images(tmp_path / "x.npz")


def test_an_npz_of_objects_is_refused_and_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.array([{"a": 1}], dtype=object), labels=np.zeros(1, int))
    with pytest.raises(DataError, match="cannot be read"):
        read_images(tmp_path / "x.npz")


def test_a_csv_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes("path,label\na.png,Käse\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"rows\.csv: cannot be read: 'utf-8' codec can't decode byte 0xe4"):
        read_images(tmp_path / "rows.csv")


def test_a_single_array_under_the_name_of_a_set_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros(3))
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    with pytest.raises(DataError, match=r"x\.npz: cannot be read: File is not a zip file"):
        read_images(tmp_path / "x.npz")


@pytest.mark.parametrize(("noted", "words"), [("ant, bee", "cannot be read: Expecting value"), ("5", "classes are 5")])
def test_names_of_classes_that_are_no_list_are_refused(tmp_path: Path, noted: str, words: str) -> None:
    arrays = {"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.array([0, 1])}
    save_file(arrays, tmp_path / "x.safetensors", metadata={"classes": noted})
    with pytest.raises(DataError, match=words):
        read_images(tmp_path / "x.safetensors")
