"""What lies at a path of a VideoChat2 model, told from names alone, and the home that it leads to.

A home is recognised from a directory that describes itself (`videochat.json`, what a run exports), from a directory of
parts (`llm/`, `bert/`, `config.json` with upstream's `model` section, and the `.pth` files of the stages), or from one
file of trained tensors over its base. What is none of them is refused with the right command.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from thawline.core.config import read_yaml
from thawline.data.video import Normalisation
from thawline.data.videochat import ClipSettings
from thawline.errors import CheckpointError, RecipeError
from thawline.models.videochat.config import MODEL_TYPE, config_from_json
from thawline.models.videochat.loading import Kind, kind_of
from thawline.models.videochat.names import part_of
from thawline.models.videochat.script import read_script
from thawline.tasks.videochat_home import FORMAT, NAME, NORMALISATIONS, ChatHome, tensor_names

_RANK: Final[Mapping[Kind, int]] = {"stage1": 1, "stage2": 2, "stage3": 3, "partial": 4}
_SUFFIXES: Final = (".pth", ".pt", ".safetensors")


def home_at(path: Path, *, base: Path | None = None) -> ChatHome:
    """The model at `path`.

    base: the home that a single file of trained tensors at `path` belongs to; it is loaded last, over base's parts
    Raises CheckpointError where nothing is recognised, RecipeError where the description is not one.
    """
    if path.is_file() and path.name != NAME:
        return _over(path, base)
    described = path if path.is_file() else path / NAME
    if described.is_file():
        return _described(described)
    if _section_of(path) is not None:
        return _parts_directory(path)
    if is_llm(path):
        raise CheckpointError(
            "this is a language model without VideoChat2's parts",
            where=str(path),
            fix=f"thawline chat {shlex.quote(str(path))} VIDEO --part <stage-1 file> --part <stage-2 file> "
            "--part <stage-3 file> --bert <bert-base-uncased> --config <upstream's config.json>",
        )
    raise CheckpointError(
        "no VideoChat2 model is described here",
        where=str(path),
        fix=f"it would hold {NAME}, or llm/, bert/, config.json (upstream's model section) and the .pth files",
    )


def recognises(path: Path) -> bool:
    """Whether a path is a VideoChat2 model, or a file of its tensors; other models' paths are not."""
    if path.is_dir():
        return (path / NAME).is_file() or _section_of(path) is not None
    if path.name == NAME:
        return True
    if path.suffix not in _SUFFIXES or not path.is_file():
        return False
    try:
        return is_part(tensor_names(path))
    except CheckpointError:
        return False


def is_part(names: Sequence[str]) -> bool:
    """Whether tensors of these names belong to a VideoChat2 model."""
    return any(part_of(n) not in ("other", "stage1_heads", "derived") for n in names)


def read_section(path: Path) -> Mapping[str, Any]:
    """Upstream's `model` section from a JSON or YAML file, or from one of its Python scripts, which is not run.

    Raises RecipeError where it holds none.
    """
    data: Any
    if path.suffix == ".py" and path.is_file():
        data = read_script(path.read_text(encoding="utf-8"), name="model", where=str(path))
    else:
        data = read_yaml(path).data
    return section_of(data, where=str(path))


def section_of(data: Any, *, where: str) -> Mapping[str, Any]:
    """Upstream's `model` section in `data`: that itself, or what holds it. Raises RecipeError where it is none."""
    section = data.get("model", data) if isinstance(data, dict) else None
    if not isinstance(section, dict) or not _is_section(section):
        raise RecipeError(
            "no model section of upstream's is in it",
            where=where,
            fix='it holds "model": {"vision_encoder": {...}, "num_query_token": 32, ...}',
        )
    return section


def ordered(files: Sequence[Path]) -> tuple[Path, ...]:
    """Files of the stages in the order of loading, by what they hold. Raises CheckpointError where two could swap."""
    kinds: dict[Kind, list[Path]] = {}
    for file in files:
        names = tensor_names(file)
        if is_part(names):
            kinds.setdefault(kind_of(names), []).append(file)
    for kind, same in kinds.items():
        if len(same) > 1:
            raise CheckpointError(
                f"two files of the same kind ({kind}), and names do not tell which comes last: "
                f"{', '.join(p.name for p in same)}",
                where=str(same[0].parent),
                fix="name the parts in their order: options.parts in a recipe, --part for thawline chat",
            )
    return tuple(same[0] for _, same in sorted(kinds.items(), key=lambda pair: _RANK[pair[0]]))


def _described(path: Path) -> ChatHome:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r}, this version reads {FORMAT!r}")
        root, llm = path.parent, data["llm"]
        if llm["dtype"] not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"the language model's dtype is {llm['dtype']!r}")
        return ChatHome(
            path=path,
            config=config_from_json(data["config"], where=str(path)),
            llm=_read(llm["path"], root),
            bert=None if data["bert"] is None else _read(data["bert"], root),
            parts=tuple(_read(p, root) for p in data["parts"]),
            new=tuple(data["new"]),
            clips=_clips_from(data["clips"]),
            dtype=llm["dtype"],
            llm_fingerprint=str(llm["fingerprint"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as exc:
        raise CheckpointError(
            f"the description of the model cannot be read: {exc}", where=str(path), fix="export the run again"
        ) from exc


def _clips_from(data: Mapping[str, Any]) -> ClipSettings:
    """How clips become tensors, as `ChatHome.to_json` wrote it."""
    told = dict(data)
    normalisation = told.pop("normalisation")
    if isinstance(normalisation, str):
        normalisation = NORMALISATIONS[normalisation]
    else:
        normalisation = Normalisation(tuple(normalisation["mean"]), tuple(normalisation["std"]))
    try:
        return ClipSettings(**told, normalisation=normalisation)
    except RecipeError as exc:
        raise ValueError(exc.what) from exc


def _parts_directory(path: Path) -> ChatHome:
    section = _section_of(path)
    assert section is not None
    if not (path / "llm" / "config.json").is_file():
        raise CheckpointError(
            "a directory of VideoChat2's parts without llm/, the language model's directory",
            where=str(path),
            fix="put it there, or a link to it",
        )
    files = sorted(p for p in path.iterdir() if p.suffix in (".pth", ".pt"))
    bert = path / "bert"
    return ChatHome.assemble(
        path=path,
        llm=path / "llm",
        bert=bert if bert.is_dir() else None,
        upstream=section,
        parts=ordered(files),
    )


def _over(file: Path, base: Path | None) -> ChatHome:
    """A file of trained tensors over its base, or the refusal that Ask-Anything's issue 235 lacked."""
    names = tensor_names(file)
    if base is not None and (base.is_dir() or base.name == NAME):
        home = home_at(base)
        known = {p.resolve() for p in home.parts}
        return home if file.resolve() in known else dataclasses.replace(home, parts=(*home.parts, file))
    held = sorted({part_of(n) for n in names} - {"derived", "other"})
    if base is not None:
        raise CheckpointError(
            "one file is no whole base", where=str(base), fix="give the directory that holds llm/, bert/ and all parts"
        )
    raise CheckpointError(
        f"this file alone is no model: it holds {len(names)} tensors ({', '.join(held)}) that a run trained, and not "
        "the weights that they were trained over; answers without them are gibberish",
        where=str(file),
        fix=_right_command(file),
    )


def _right_command(file: Path) -> str:
    folder = file.parent
    quoted = shlex.quote(str(file))
    if _section_of(folder) is not None or (folder / NAME).is_file():
        return f"thawline chat {shlex.quote(str(folder))} VIDEO"
    return (
        f"thawline chat {quoted} VIDEO --base DIR, where DIR holds llm/, bert/, config.json (upstream's model section) "
        "and every file before this one: umt_l16_qformer.pth, the stage-2 and, with adapters, the stage-3 file"
    )


def _section_of(folder: Path) -> Mapping[str, Any] | None:
    """Upstream's `model` section in a directory's config.json; None where there is none."""
    path = folder / "config.json"
    if not folder.is_dir() or not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    section = data.get("model", data) if isinstance(data, dict) else None
    return section if isinstance(section, dict) and _is_section(section) else None


def is_llm(path: Path) -> bool:
    """Whether a directory holds a language model that VideoChat2 is built on."""
    try:
        data = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and data.get("model_type") in MODEL_TYPE


def _is_section(section: Mapping[str, Any]) -> bool:
    return isinstance(section.get("vision_encoder"), dict) and section.get("model_type") not in MODEL_TYPE


def _read(written: str, root: Path) -> Path:
    return Path(os.path.normpath((root / written).absolute()))
