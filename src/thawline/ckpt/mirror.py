"""A run's second home on remote storage: its checkpoints as they are written, and enough to go on elsewhere.

URL/recipe.yaml, base.json, metrics.jsonl     what the run is, and the rows up to its newest checkpoint
URL/checkpoints/step-00001200/                as in the run directory; exists once its manifest does
URL/model/                                    the result, once there is one

The run works in its local directory as ever; this is sent behind it. Other checkpoints may lie there than locally: each
place keeps by the same rule what it has seen.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from thawline.ckpt import manifest, store
from thawline.ckpt.remote import Place
from thawline.ckpt.retention import Keep, kept
from thawline.ckpt.save import step_name
from thawline.ckpt.transfer import fetched, send_folder, whole_folders, withdraw

_BESIDE: Final = ("recipe.yaml", "base.json", "metrics.jsonl")


def mirror_checkpoint(
    path: Path, url: str, *, keep: Keep | None = None, scores: Mapping[int, float] | None = None
) -> None:
    """Send a checkpoint of a run to the run's URL, then remove what `keep` gives up there.

    A run goes forward, so what lies there of later steps belongs to a future that it gave up by going back: it is
    removed first, or going on from the URL would lead there.
    path: RUN/checkpoints/step-00001200, whole
    Raises CheckpointError if the storage refuses; the checkpoints that were there stay.
    """
    home, run, step = Place(url), path.parent.parent, manifest.read(path).step
    for later in [s for s in whole_steps(url) if s > step]:
        withdraw(home / "checkpoints" / step_name(later))
    for name in _BESIDE:  # first: a checkpoint must not be there without the rows that lead to it
        if (run / name).is_file():
            _send_still(run / name, home / name)
    send_folder(path, home / "checkpoints" / path.name, force=True)
    if keep is None:
        return
    steps = whole_steps(url)
    for old in sorted(set(steps) - kept(steps, keep, scores=scores)):
        withdraw(home / "checkpoints" / step_name(old))


def mirror_model(run: Path, url: str) -> None:
    """Send a finished run's result."""
    home = Place(url)
    _send_still(run / "metrics.jsonl", home / "metrics.jsonl")
    send_folder(run / "model", home / "model", force=True)


def _send_still(path: Path, target: Place) -> None:
    """Send a file as it is at this moment: the run may be appending to it, and what is sent is read again."""
    with tempfile.TemporaryDirectory(prefix="thawline-mirror-") as folder:
        target.send(Path(shutil.copyfile(path, Path(folder) / path.name)))


def bring_run(url: str, target: Path, *, step: int | None = None) -> Path:
    """Copy what a run needs to go on into a new run directory: its newest whole checkpoint, or that of `step`.

    Raises CheckpointError if there is none, or the directory exists.
    """
    tag = None if step is None else step_name(step)
    with fetched(url, tag=tag, result=False) as here, store.atomic_dir(target) as folder:
        for path in here.rglob("*"):
            if path.is_file():
                place = folder / path.relative_to(here)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place)
    return target


def whole_steps(url: str) -> list[int]:
    """The steps of the checkpoints that lie whole at a run's URL, ascending."""
    return sorted(listed.step for listed in whole_folders(Place(url) / "checkpoints").values())
