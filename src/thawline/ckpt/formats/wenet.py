"""A WeNet model directory: `train.yaml`, `final.pt` or `epoch_N.pt` / `step_N.pt` / `avg_N.pt` / `N.pt`, `units.txt`.

Only which file is meant, and which files travel with it, is decided here; reading a torch file is the caller's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from thawline.ckpt.formats.mapped import inside
from thawline.errors import CheckpointError

SIDECARS: Final = (
    "train.yaml",
    "units.txt",
    "global_cmvn",
    "lang_char.txt",
    "words.txt",
    "bpe.model",
    "train_unigram.model",
)
"""Files that belong to a WeNet model and hold no weights."""

_TAGGED = re.compile(r"(?:(?:epoch|step|avg)_?)?\d+|init|final|resumed_\w+")  # before 2024: N.pt


def looks_like(path: Path) -> bool:
    """Whether a folder is a WeNet model directory."""
    return path.is_dir() and (path / "train.yaml").is_file() and bool(_weights(path))


def weights_file(path: Path, tag: str | None = None) -> Path:
    """The weights that are meant: TAG.pt if a tag is asked for, else final.pt, else the only one there is.

    Raises CheckpointError that lists what is there if that does not decide it.
    """
    names = _weights(path)
    listed = ", ".join(name.removesuffix(".pt") for name in names)
    if tag is not None:
        if f"{tag}.pt" not in names:
            raise CheckpointError(f"has no {tag}.pt", where=str(path), fix=f"choose one of: {listed}")
        return inside(path, f"{tag}.pt")
    if "final.pt" in names:
        return inside(path, "final.pt")
    if len(names) == 1:
        return inside(path, names[0])
    raise CheckpointError("has no final.pt and several others", where=str(path), fix=f"ask for a tag: {listed}")


def sidecars(path: Path, weights: Path) -> dict[str, Path]:
    """Files that travel with the weights: name at the target -> path. The weights' own .yaml is more exact."""
    found = {name: inside(path, name) for name in SIDECARS if (path / name).is_file()}
    own = weights.with_suffix(".yaml")
    if "train.yaml" not in found and own.is_file():
        found["train.yaml"] = own
    return found


def _weights(path: Path) -> list[str]:
    # A dangling link (WeNet leaves `final.pt` as one) is not a file and so is not listed.
    try:
        entries = sorted(path.iterdir())
    except OSError:
        return []
    return [e.name for e in entries if e.suffix == ".pt" and e.is_file() and _TAGGED.fullmatch(e.stem)]
