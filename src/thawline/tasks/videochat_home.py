"""Where the parts of a VideoChat2 model lie and how they go together: the one place that puts such a model on its feet.

Opening a home loads every part strictly: each tensor of the model has a supplier, or the chain is refused with the
right one. What a path is, and which home it leads to, is `videochat_recognition`'s matter.
"""

from __future__ import annotations

import dataclasses
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
from thawline.data.video import CLIP, IMAGENET
from thawline.data.videochat import ClipSettings
from thawline.errors import BaseMismatch, CheckpointError
from thawline.models.videochat.build import Opened, build, for_stage, read_config
from thawline.models.videochat.config import VideoChatConfig
from thawline.models.videochat.loading import LoadReport, account, copy_part_, kind_of
from thawline.models.videochat.names import Part
from thawline.tasks.videochat_settings import upstream_values

NAME: Final = "videochat.json"
"""The file by which a directory describes itself as a VideoChat2 model."""
FORMAT: Final = "thawline-videochat/1"

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
        with upstream_values(str(path)):
            config = read_config(llm, bert, section)
        if stage is None:
            kinds = {kind_of(tensor_names(part)) for part in parts}
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


def clips_of(config: VideoChatConfig) -> ClipSettings:
    """How a model's configuration wants its clips."""
    tiles = config.tiles
    return ClipSettings(
        frames=config.vision.num_frames,
        size=tiles.size if tiles is not None else config.vision.img_size,
        max_tiles=tiles.max_tiles if tiles is not None else 0,
        tile_padding=tiles.padding if tiles is not None else False,
    )


def tensor_names(path: Path) -> tuple[str, ...]:
    """The names in a file of weights; its tensors are not read."""
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
