"""Checkpoints and models on remote storage: work is done on local files, which are brought here and sent there.

A folder that was sent exists once its `MANIFEST.json` does, which is written last, after everything else was read back
and compared by digest; until then a `MANIFEST.partial` marks it, so that what a killed process left is not taken for a
checkpoint. Whoever reads one compares it with its manifest.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Final

from thawline.ckpt import manifest
from thawline.ckpt.manifest import Manifest
from thawline.ckpt.refusal import free_bytes, human_bytes
from thawline.ckpt.remote import Place, entry_of, is_url, local_path
from thawline.errors import CheckpointError

PARTIAL: Final = "MANIFEST.partial"
"""What a folder holds in place of its manifest while it is being sent."""

_BESIDE: Final = ("train.yaml", "config.json")
_STEP = re.compile(r"checkpoints/(step-\d{8,})/")


def send_folder(folder: Path, target: Place, *, force: bool = False) -> None:
    """Send a folder so that it exists whole or not at all. An equal one that is there already is left alone.

    Its own `MANIFEST.json` is used if it has one, else one is made of its files. `force` replaces another one; an
    object store cannot swap two folders, so between the two there is none.
    """
    listed = manifest.read(folder) if (folder / manifest.NAME).is_file() else _listing(folder)
    there = target.files()
    if manifest.NAME in there and (target / manifest.NAME).read() == listed.to_json() and _complete(listed, there):
        return
    if there:
        left_over = PARTIAL in there and manifest.NAME not in there
        if not force and not left_over:
            raise CheckpointError("exists already", where=target.url, fix="choose another place, or --force")
        withdraw(target)
    (target / PARTIAL).write(listed.to_json())
    for name, entry in listed.files.items():
        if (target / name).send(folder / name) != entry:
            raise CheckpointError("was changed while it was sent", where=str(folder / name), fix="send it again")
    (target / manifest.NAME).write(listed.to_json())
    (target / PARTIAL).remove()


def withdraw(folder: Place) -> None:
    """Remove a folder that was sent; its manifest first, so that half of it is no checkpoint."""
    if manifest.NAME in folder.files():
        (folder / manifest.NAME).remove()
    if folder.exists():
        folder.remove()


@contextmanager
def fetched(place: str | Path, *, tag: str | None = None, result: bool = True, every: bool = False) -> Iterator[Path]:
    """A local path with the content of a place; a local place is its own path.

    tag, result, every: of a run only what is wanted is brought: the checkpoint TAG; else its result if it has one and
                        it is wanted; else its newest whole checkpoint, or every whole one
    Raises CheckpointError if it does not exist, was not sent whole, or does not fit on the disk.
    """
    if not is_url(place):
        yield local_path(place)
        return
    remote = Place(str(place))
    with tempfile.TemporaryDirectory(prefix="thawline-") as scratch:
        here = Path(scratch) / (remote.name or "content")
        with _named(here, remote):
            if remote.is_file():
                _bring_file(remote, here)
            else:
                _bring_folder(remote, here, tag, result, every)
            yield here


@contextmanager
def sent(place: str | Path, *, force: bool = False) -> Iterator[Path]:
    """A local path to make something at, a file or a folder, which is sent to its place when the block ends well.

    A local place is its own path. Files made beside it (a WeNet model's .yaml) are sent before it.
    """
    if not is_url(place):
        yield local_path(place)
        return
    remote = Place(str(place))
    if not force and remote.exists():
        raise CheckpointError("exists already", where=remote.url, fix="choose another name, or --force")
    parent = remote.url.rpartition("/")[0]
    with tempfile.TemporaryDirectory(prefix="thawline-") as scratch:
        here = Path(scratch) / remote.name
        with _named(here, remote):
            yield here
            for path in sorted(Path(scratch).iterdir(), key=lambda path: path == here):
                target = remote if path == here else Place(f"{parent}/{path.name}")
                if path.is_dir():
                    send_folder(path, target, force=force)
                else:
                    target.send(path)


def whole_folders(root: Place, names: Mapping[str, int] | None = None) -> dict[str, Manifest]:
    """The folders directly below `root` that were sent whole, by their manifests and sizes: name -> manifest."""
    names = root.files() if names is None else names
    found = {}
    for name in names:
        folder, _, file = name.partition("/")
        if file == manifest.NAME:
            listed = Manifest.from_json((root / name).read(), where=f"{root.url}/{name}")
            inside = {n.removeprefix(f"{folder}/"): size for n, size in names.items() if n.startswith(f"{folder}/")}
            if _complete(listed, inside):
                found[folder] = listed
    return found


def _bring_file(remote: Place, here: Path) -> None:
    parent = Place(remote.url.rpartition("/")[0])
    remote.bring(here)
    for name in (f"{PurePosixPath(remote.name).stem}.yaml", *_BESIDE):
        if (parent / name).is_file():
            (parent / name).bring(here.parent / name)


def _bring_folder(remote: Place, here: Path, tag: str | None, result: bool, every: bool) -> None:
    names = remote.files()
    if not names:
        raise CheckpointError("does not exist", where=remote.url, fix="check the URL")
    steps = {match[1] for name in names if (match := _STEP.match(name))}
    if not steps:
        _bring_all(remote, here, names)
        return
    top = [name for name in names if "/" not in name]
    for name in top:
        (remote / name).bring(here / name)
    model = {name.removeprefix("model/"): size for name, size in names.items() if name.startswith("model/")}
    if tag is None and result and manifest.NAME in model:
        _bring_all(remote / "model", here / "model", model)
        return
    root = remote / "checkpoints"
    whole = whole_folders(root)
    for step in [tag] if tag is not None else sorted(whole, reverse=True):
        if step not in whole:
            kept = ", ".join(sorted(whole)) or "none"
            raise CheckpointError(f"has no whole checkpoint {step!r}", where=root.url, fix=f"whole are: {kept}")
        try:
            _bring_all(root / step, here / "checkpoints" / step, (root / step).files())
            if not every:
                return
        except CheckpointError:
            if tag is not None:
                raise
            shutil.rmtree(here / "checkpoints" / step)  # altered there: the one before it
    if not any((here / "checkpoints").glob("*")):
        raise CheckpointError("has no whole checkpoint", where=root.url, fix="has the run sent one yet?")


def _bring_all(remote: Place, here: Path, names: Mapping[str, int]) -> None:
    if PARTIAL in names and manifest.NAME not in names:
        raise CheckpointError(
            "was not sent whole: its sender was stopped", where=remote.url, fix="send it again, or use another one"
        )
    total, free = sum(names.values()), free_bytes(here)
    if 0 <= free < total:
        raise CheckpointError(
            f"needs {human_bytes(total)} in {tempfile.gettempdir()} while it is read, {human_bytes(free)} are free",
            where=remote.url,
            fix="set TMPDIR to a folder with more room",
        )
    for name, size in names.items():
        (remote / name).bring(here / name)
        if (here / name).stat().st_size != size:
            raise CheckpointError("changed while it was read", where=f"{remote.url}/{name}", fix="try again")
    if manifest.NAME in names:
        problems = manifest.verify(here)
        if problems:
            raise CheckpointError("; ".join(problems), where=remote.url, fix="use another one")


@contextmanager
def _named(here: Path, remote: Place) -> Iterator[None]:
    """Errors within name the place that the user knows, not the copy."""
    try:
        yield
    except CheckpointError as exc:
        exc.where = exc.where.replace(str(here), remote.url)
        exc.what = exc.what.replace(str(here), remote.url)
        raise


def _listing(folder: Path) -> Manifest:
    """A manifest of any folder, for sending it: of no step and over no base."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            files[path.relative_to(folder).as_posix()] = entry_of(file)
    return Manifest(step=0, base="", files=files, thawline=version("thawline"))


def _complete(listed: Manifest, sizes: Mapping[str, int]) -> bool:
    return all(sizes.get(name) == entry.size for name, entry in listed.files.items())
