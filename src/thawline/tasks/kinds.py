"""Which task a model belongs to, told from its files, so that a verb knows whom to ask."""

from __future__ import annotations

from pathlib import Path

from thawline.core.config import read_yaml
from thawline.tasks.videochat_alignment_home import is_alignment
from thawline.tasks.videochat_recognition import recognises
from thawline.tasks.vision_home import describes
from thawline.train.rundir import RunDirectory


def kind_of(path: Path | str) -> str:
    """The task (a name in `runs.TASKS`) of a run directory, a checkpoint in one, or a model directory.

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
    return "vision" if path.is_dir() and describes(path) else "speech"
