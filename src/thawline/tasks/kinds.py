"""Which task a model belongs to, told from its files, so that a verb knows whom to ask."""

from __future__ import annotations

from pathlib import Path

from thawline.ckpt.formats.thawline_run import base_of_bare_delta
from thawline.core.config import read_yaml
from thawline.errors import CheckpointError
from thawline.tasks.videochat_alignment_home import is_alignment
from thawline.tasks.videochat_recognition import recognises
from thawline.tasks.vision_home import VisionHome, describes
from thawline.train.rundir import RunDirectory


def kind_of(path: Path | str, base: Path | str | None = None) -> str:
    """The task (a name in `runs.TASKS`) of a run directory, a checkpoint in one, a model directory, or a delta over
    `base` (else over the base that it records).

    A run says so in its recipe. What is not recognised counts as speech, whose loader says best what is wrong.
    """
    path = Path(path).expanduser().absolute()
    for folder in (path, path.parent.parent, path.parent):
        run = RunDirectory(folder)
        if run.begun:
            data = read_yaml(run.recipe).data
            if isinstance(data, dict) and "task" in data:
                return str(data["task"])
    if is_alignment(path):
        return "videochat_stage1"
    if recognises(path):
        return "videochat"
    under = base_of_bare_delta(path)
    if under is not None:
        under = Path(base).expanduser().absolute() if base is not None else under
        if under.exists() and under.samefile(path):  # it was put where its base was
            return "speech"
        return "vision" if _is_classifier(under) else kind_of(under)
    return "vision" if path.is_dir() and describes(path) else "speech"


def _is_classifier(path: Path) -> bool:
    """Also of a weights file that describes itself by its names alone."""
    if path.is_dir() and ((path / "config.json").is_file() or describes(path)):
        return describes(path)
    try:
        return path.exists() and bool(VisionHome.of(path))
    except CheckpointError:
        return False
