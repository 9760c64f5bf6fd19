"""Names on the Hugging Face hub (`google/vit-base-patch16-224`): where the local cache keeps them. Nothing is fetched.

A recipe's paths are absolute once they are read, so a name is known by the last two components of a path that leads
nowhere.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from thawline.core.extras import need
from thawline.errors import MissingExtra

_WORD = re.compile(r"[A-Za-z0-9][\w.-]*")


def name_of(path: Path) -> str | None:
    """The hub's name that a path may mean; None where something lies there, or in the folder around it."""
    if path.exists() or path.parent.exists() or not all(_WORD.fullmatch(part) for part in path.parts[-2:]):
        return None
    return "/".join(path.parts[-2:])


def local(path: Path) -> Path:
    """Where the cache keeps what `path` names on the hub; `path` itself where it is no such name, or is not there."""
    name = name_of(path)
    if name is None:
        return path
    try:
        hub: Any = need("huggingface_hub", extra="hf")
    except MissingExtra:
        return path
    try:
        return Path(hub.snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return path


def remedy(path: Path) -> str:
    """What to do about a path that leads nowhere and may be a name on the hub; empty where it cannot be one."""
    name = name_of(path)
    return "" if name is None else f"if the hub's {name} is meant, it is not in the local cache: hf download {name}"
