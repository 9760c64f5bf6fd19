"""The list of what is in a checkpoint, and what it says of a damaged one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from blake3 import blake3

from thawline.ckpt.manifest import FORMAT, NAME, FileEntry, Manifest, read, verify
from thawline.errors import CheckpointError

A, B = b"a" * 1000, bytes(range(256))


def make(folder: Path) -> Manifest:
    folder.mkdir()
    files = {}
    for name, content in (("a.bin", A), ("b.bin", B)):
        (folder / name).write_bytes(content)
        files[name] = FileEntry(size=len(content), digest=blake3(content).hexdigest())
    manifest = Manifest(step=7, base="f" * 64, files=files, thawline="0.1.0")
    (folder / NAME).write_bytes(manifest.to_json())
    return manifest


def test_a_manifest_survives_its_file(tmp_path: Path) -> None:
    manifest = make(tmp_path / "c")
    assert read(tmp_path / "c") == manifest
    assert read(tmp_path / "c").to_json() == manifest.to_json()
    assert verify(tmp_path / "c") == ()


def test_files_that_are_not_listed_do_not_matter(tmp_path: Path) -> None:
    make(tmp_path / "c")
    (tmp_path / "c" / ".DS_Store").touch()
    assert verify(tmp_path / "c") == ()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda f: (f / "a.bin").unlink(), "a.bin: missing"),
        (lambda f: (f / "a.bin").write_bytes(b""), "a.bin: emptied: 0 bytes instead of 1000"),
        (lambda f: (f / "a.bin").write_bytes(A[:999]), "a.bin: cut short: 999 bytes instead of 1000"),
        (lambda f: (f / "a.bin").write_bytes(A + b"a"), "a.bin: too long: 1001 bytes instead of 1000"),
        (lambda f: (f / NAME).unlink(), "MANIFEST.json: missing"),
        (lambda f: (f / NAME).write_bytes(b""), "MANIFEST.json: the manifest is damaged: Expecting value"),
        (lambda f: ((f / "a.bin").unlink(), os.mkfifo(f / "a.bin")), "a.bin: cannot be read: is not a regular file"),
        (lambda f: ((f / "a.bin").unlink(), (f / "a.bin").mkdir()), "a.bin: cannot be read: is not a regular file"),
        (lambda f: (shutil.rmtree(f), f.write_bytes(b"")), "is not a directory"),
    ],
    ids=["missing", "emptied", "short", "long", "no manifest", "empty manifest", "pipe", "folder", "file for folder"],
)
def test_every_damage_that_the_directory_shows_is_named(tmp_path: Path, damage: object, problem: str) -> None:
    make(tmp_path / "c")
    damage(tmp_path / "c")  # type: ignore[operator]
    (found,) = verify(tmp_path / "c", digests=False)
    assert found.startswith(problem)


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    make(tmp_path / "c")
    for name in ("a.bin", "b.bin", NAME):
        path = tmp_path / "c" / name
        good = path.read_bytes()
        for position in range(0, len(good), 37):
            bad = bytearray(good)
            bad[position] ^= 1 << position % 8
            path.write_bytes(bad)
            (problem,) = verify(tmp_path / "c")
            assert problem.startswith(f"{name}: ")
        path.write_bytes(good)
    assert verify(tmp_path / "c") == ()


def test_without_digests_a_flipped_bit_goes_unseen(tmp_path: Path) -> None:
    """What `digests=False` cannot promise: the negative control of the test above."""
    make(tmp_path / "c")
    (tmp_path / "c" / "a.bin").write_bytes(b"b" + A[1:])
    assert verify(tmp_path / "c", digests=False) == ()
    assert verify(tmp_path / "c")[0].startswith("a.bin: altered: digest ")


def test_files_of_two_checkpoints_are_not_mixed(tmp_path: Path) -> None:
    """accelerate saving into one directory loads a new model with an old optimizer (4 of 50 kills)."""
    make(tmp_path / "c")
    (tmp_path / "c" / "b.bin").write_bytes(B[::-1])
    assert verify(tmp_path / "c")[0].startswith("b.bin: altered")


@pytest.mark.parametrize("name", ["../x", "/a", "a//b", "a/../../b", "..", "", "a\\b", NAME])
def test_a_manifest_cannot_name_files_outside_its_directory(name: str) -> None:
    manifest = Manifest(step=1, base="", files={name: FileEntry(size=0, digest="")}, thawline="0")
    with pytest.raises(CheckpointError, match="is not a file name"):
        Manifest.from_json(manifest.to_json(), where="x/MANIFEST.json")


def test_a_later_format_is_refused_with_the_version_that_wrote_it() -> None:
    manifest = Manifest(step=1, base="", files={}, thawline="9.0", format=FORMAT + 1)
    with pytest.raises(CheckpointError) as caught:
        Manifest.from_json(manifest.to_json(), where="x/MANIFEST.json")
    assert str(caught.value) == (
        f"x/MANIFEST.json: written by Thawline 9.0 in format {FORMAT + 1}; this one reads up to {FORMAT}\n"
        "  fix: update Thawline"
    )


@pytest.mark.parametrize("data", [b"[]", b"{}", b'"x"', b"\xff", b"[" * 100_000, b'{"self": 1}'])
def test_what_is_no_manifest_is_refused_as_damaged(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="the manifest is damaged"):
        Manifest.from_json(data)


def test_the_module_does_not_import_torch() -> None:
    code = "import sys, thawline.ckpt.manifest, thawline.ckpt.store; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
