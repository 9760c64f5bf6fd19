"""Where the parts of a VideoChat2 model lie and how they go together: the one place that puts such a model on its feet.

A home is recognised from a directory that describes itself (`videochat.json`, what a run exports), from a directory of
parts (`llm/`, `bert/`, `config.json` with upstream's `model` section, and the `.pth` files of the stages), or put
together from single paths. Opening it loads every part strictly: each tensor of the model has a supplier, or the chain
is refused with the right one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from thawline.ckpt.source import Source, open_source
from thawline.ckpt.tensors import SourceTensors
from thawline.core.config import near_names, read_yaml
from thawline.data.video import CLIP, IMAGENET
from thawline.data.videochat import ClipSettings
from thawline.errors import BaseMismatch, CheckpointError, RecipeError
from thawline.models.videochat.build import Opened, build, for_stage, read_config
from thawline.models.videochat.config import MODEL_TYPE, VideoChatConfig, config_from_json
from thawline.models.videochat.loading import Kind, LoadReport, account, copy_part_, kind_of
from thawline.models.videochat.names import Part, part_of
from thawline.models.videochat.script import read_script

NAME: Final = "videochat.json"
"""The file by which a directory describes itself as a VideoChat2 model."""
FORMAT: Final = "thawline-videochat/1"

_RANK: Final[Mapping[Kind, int]] = {"stage1": 1, "stage2": 2, "stage3": 3, "partial": 4}
_SUFFIXES: Final = (".pth", ".pt", ".safetensors")
NORMALISATIONS: Final = {"imagenet": IMAGENET, "clip": CLIP}
Command = Callable[[Sequence[str]], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatHome:
    """One model by its parts, nothing loaded yet.

    path:   what it was recognised at; for messages
    llm, bert: directories of the language model and of the Q-Former's vocabulary (None where it reads no text)
    parts:  files of the stages in the order of loading
    new:    parts of the model that start from initial values on purpose, e.g. ("lora",)
    clips:  how clips become tensors
    dtype:  of the language model's weights
    llm_fingerprint: which language model the parts belong to; "" where nobody recorded it
    """

    path: Path
    config: VideoChatConfig
    llm: Path
    bert: Path | None
    parts: tuple[Path, ...]
    new: tuple[Part, ...] = ()
    clips: ClipSettings = ClipSettings()
    dtype: str = "float32"
    llm_fingerprint: str = ""

    @classmethod
    def of(cls, path: Path, *, base: Path | None = None) -> ChatHome:
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

    @classmethod
    def assemble(
        cls,
        *,
        path: Path,
        llm: Path,
        bert: Path | None,
        upstream: Mapping[str, Any],
        parts: Sequence[Path],
        new: Sequence[Part] = (),
        stage: int | None = None,
        hd: bool = False,
        dtype: str = "float32",
    ) -> ChatHome:
        """A model put together from single paths.

        upstream: upstream's `model` section, or a whole configuration that holds it
        stage: 2 or 3 (and later); None takes 2 where every part is of stage 1 or 2 and nothing else was asked for
        hd:    the variant that cuts clips into tiles
        """
        section = dict(upstream.get("model", upstream))
        if hd:
            section["model_cls"] = "VideoChat2_it_hd_" + str(section.get("model_cls", ""))
        config = read_config(llm, bert, section)
        if stage is None:
            kinds = {kind_of(_names(part)) for part in parts}
            early = bool(kinds) and kinds <= {"stage1", "stage2"} and not new
            stage = 2 if early else 3
        config = for_stage(config, stage)
        return cls(
            path=path,
            config=config,
            llm=llm,
            bert=bert if config.qformer.text_input else None,
            parts=tuple(parts),
            new=tuple(new),
            clips=clips_of(config),
            dtype=dtype,
        )

    def open(
        self, *, seed: int = 0, random_weights: bool = False, command: Command | None = None
    ) -> tuple[Opened, LoadReport | None]:
        """The model with its tokenizers, in eval mode, and where each tensor came from.

        seed: of what starts anew; the global generators are left alone
        random_weights: draw all weights from the global generators instead of reading them
        command: turns the right chain into what to run, for a refusal
        Raises CheckpointError naming tensors, files and the remedy; BaseMismatch for another language model.
        """
        self._check_llm()
        if random_weights:
            opened = build(self.config, self.llm, self.bert, dtype=self.dtype, random_weights=True)
            opened.model.eval()
            return opened, None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            opened = build(self.config, self.llm, self.bert, dtype=self.dtype)
        report = self._load(opened, command or self.command)
        opened.model.eval()
        return opened, report

    def command(self, order: Sequence[str]) -> str:
        """What to run in the terminal once the chain is `order`."""
        files = dict(zip(_labels(self.parts), map(str, self.parts), strict=True))
        words = ["thawline", "chat", shlex.quote(str(self.llm)), "VIDEO"]
        words += [f"--part {files.get(o, o)}" for o in order if o != "<language model directory>"]
        if self.bert is not None:
            words.append(f"--bert {shlex.quote(str(self.bert))}")
        config = self.path / "config.json" if self.path.is_dir() else self.path.parent / "config.json"
        shown = config if config.is_file() and config.parent != self.llm else "<upstream's config.json>"
        return " ".join([*words, f"--config {shown}"])

    def fingerprint(self) -> str:
        """Which language model lies at `llm`."""
        if self.llm_fingerprint:
            return self.llm_fingerprint
        with open_source(self.llm) as source:
            return source.fingerprint()

    def to_json(self, folder: Path) -> dict[str, Any]:
        """The description of this home as `videochat.json` in `folder` holds it."""
        settings = dataclasses.asdict(self.clips)
        named = [name for name, value in NORMALISATIONS.items() if value == self.clips.normalisation]
        settings["normalisation"] = named[0] if named else dataclasses.asdict(self.clips.normalisation)
        return {
            "format": FORMAT,
            "config": self.config.to_json(),
            "llm": {"path": _written(self.llm, folder), "fingerprint": self.llm_fingerprint, "dtype": self.dtype},
            "bert": None if self.bert is None else _written(self.bert, folder),
            "parts": [_written(p, folder) for p in self.parts],
            "new": list(self.new),
            "clips": settings,
        }

    def _check_llm(self) -> None:
        if not self.llm.is_dir():
            raise CheckpointError(
                "the language model is not there",
                where=str(self.llm),
                fix=f"bring the directory back, or write where it is into {self.path}",
            )
        if not self.llm_fingerprint:
            return
        with open_source(self.llm) as source:
            found = source.fingerprint()
        if found != self.llm_fingerprint:
            raise BaseMismatch(
                f"another language model lies here than these parts belong to: fingerprint {found[:16]}, wanted "
                f"{self.llm_fingerprint[:16]}",
                where=str(self.llm),
                fix=f"bring back the directory that {self.path} was made with",
            )

    def _load(self, opened: Opened, command: Command) -> LoadReport:
        shapes = {name: tuple(t.shape) for name, t in opened.model.state_dict().items()}
        with ExitStack() as stack:
            sources = [
                (label, stack.enter_context(open_source(part)))
                for label, part in zip(_labels(self.parts), self.parts, strict=True)
            ]
            chain = [(label, {i.name: i.shape for i in source.infos}) for label, source in sources]
            report = account(shapes, chain, new=self.new)
            report.raise_if_refused(command)
            for (_, source), part in zip(sources, report.parts, strict=True):
                tensors = SourceTensors(source)
                copy_part_(opened.model, part, ((name, tensors[name]) for name in part.loaded))
        return report


def recognises(path: Path) -> bool:
    """Whether a path is a VideoChat2 model, or a file of its tensors; other models' paths are not."""
    if path.is_dir():
        return (path / NAME).is_file() or _section_of(path) is not None
    if path.name == NAME:
        return True
    if path.suffix not in _SUFFIXES or not path.is_file():
        return False
    try:
        return is_part(_names(path))
    except CheckpointError:
        return False


def is_part(names: Sequence[str]) -> bool:
    """Whether tensors of these names belong to a VideoChat2 model."""
    return any(part_of(n) not in ("other", "stage1_heads", "derived") for n in names)


def clips_of(config: VideoChatConfig) -> ClipSettings:
    """How a model's configuration wants its clips."""
    tiles = config.tiles
    return ClipSettings(
        frames=config.vision.num_frames,
        size=tiles.size if tiles is not None else config.vision.img_size,
        max_tiles=tiles.max_tiles if tiles is not None else 0,
        tile_padding=tiles.padding if tiles is not None else False,
    )


def read_section(path: Path) -> Mapping[str, Any]:
    """Upstream's `model` section from a JSON or YAML file, or from one of its Python scripts, which is not run.

    Raises RecipeError where it holds none.
    """
    section: Any
    if path.suffix == ".py" and path.is_file():
        section = read_script(path.read_text(encoding="utf-8"), name="model", where=str(path))
    else:
        data = read_yaml(path).data
        section = data.get("model", data) if isinstance(data, dict) else None
    if not isinstance(section, dict) or not _is_section(section):
        raise RecipeError(
            "no model section of upstream's is in it",
            where=str(path),
            fix='it holds "model": {"vision_encoder": {...}, "num_query_token": 32, ...}',
        )
    return section


def ordered(files: Sequence[Path]) -> tuple[Path, ...]:
    """Files of the stages in the order of loading, by what they hold. Raises CheckpointError where two could swap."""
    kinds: dict[Kind, list[Path]] = {}
    for file in files:
        names = _names(file)
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
        root, llm, clips = path.parent, data["llm"], dict(data["clips"])
        normalisation = clips.pop("normalisation")
        if isinstance(normalisation, str):
            normalisation = NORMALISATIONS[normalisation]
        else:
            normalisation = type(IMAGENET)(tuple(normalisation["mean"]), tuple(normalisation["std"]))
        return ChatHome(
            path=path,
            config=config_from_json(data["config"], where=str(path)),
            llm=_read(llm["path"], root),
            bert=None if data["bert"] is None else _read(data["bert"], root),
            parts=tuple(_read(p, root) for p in data["parts"]),
            new=tuple(data["new"]),
            clips=ClipSettings(**clips, normalisation=normalisation),
            dtype=str(llm["dtype"]),
            llm_fingerprint=str(llm["fingerprint"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise CheckpointError(
            f"the description of the model cannot be read: {exc}", where=str(path), fix="export the run again"
        ) from exc


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
    if not file.is_file():
        near = near_names(file.name, [p.name for p in file.parent.iterdir()]) if file.parent.is_dir() else []
        raise CheckpointError(
            "no such file", where=str(file), fix=f"did you mean {file.parent / near[0]}?" if near else "check the path"
        )
    names = _names(file)
    if base is not None and (base.is_dir() or base.name == NAME):
        home = ChatHome.of(base)
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
    return "vision_encoder" in section and section.get("model_type") not in MODEL_TYPE


def _names(path: Path) -> tuple[str, ...]:
    source: Source
    with open_source(path) as source:
        return source.names


def _labels(paths: Sequence[Path]) -> tuple[str, ...]:
    """File names, and whole paths where names repeat."""
    names = [p.name for p in paths]
    return tuple(p.name if names.count(p.name) == 1 else str(p) for p in paths)


def _written(path: Path, folder: Path) -> str:
    """A path as a description in `folder` holds it: relative where both lie in the same run, else absolute."""
    path, root = path.absolute(), folder.absolute().parent
    return os.path.relpath(path, folder.absolute()) if path.is_relative_to(root) else str(path)


def _read(written: str, root: Path) -> Path:
    return Path(os.path.normpath((root / written).absolute()))
