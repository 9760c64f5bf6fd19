"""A run's second home on remote storage: its checkpoints as they are written, and enough to go on elsewhere.

URL/recipe.yaml, base.json, metrics.jsonl     what the run is, and the rows up to its newest checkpoint
URL/checkpoints/step-00001200/                as in the run directory; exists once its manifest does
URL/model/                                    the result, once there is one

The run works in its local directory as ever; this is sent behind it. Other checkpoints may lie there than locally: each
place keeps by the same rule what it has seen.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from thawline.ckpt import store
from thawline.ckpt.remote import Place
from thawline.ckpt.retention import Keep, kept
from thawline.ckpt.save import step_name
from thawline.ckpt.transfer import fetched, send_folder, whole_folders, withdraw

_BESIDE: Final = ("recipe.yaml", "base.json", "metrics.jsonl")


def mirror_checkpoint(
    path: Path, url: str, *, keep: Keep | None = None, scores: Mapping[int, float] | None = None
) -> None:
    """Send a checkpoint of a run to the run's URL, then remove what `keep` gives up there.

    path: RUN/checkpoints/step-00001200, whole
    Raises CheckpointError if the storage refuses; the checkpoints that were there stay.
    """
    home, run = Place(url), path.parent.parent
    for name in _BESIDE:  # first: a checkpoint must not be there without the rows that lead to it
        if (run / name).is_file():
            (home / name).send(run / name)
    send_folder(path, home / "checkpoints" / path.name, force=True)
    if keep is None:
        return
    steps = whole_steps(url)
    for step in sorted(set(steps) - kept(steps, keep, scores=scores)):
        withdraw(home / "checkpoints" / step_name(step))


def mirror_model(run: Path, url: str) -> None:
    """Send a finished run's result."""
    home = Place(url)
    (home / "metrics.jsonl").send(run / "metrics.jsonl")
    send_folder(run / "model", home / "model", force=True)


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
