"""Where the parts of a stage-1 model lie, how they are loaded, and what a run of that stage leaves.

alignment.json      the shape, and how clips become tensors
model.safetensors   every tensor
bert/               the vocabulary
upstream.pth        {"model": every tensor}, as Ask-Anything saves it: the first part of stage 2
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from thawline.ckpt import store, tensorfile
from thawline.ckpt.load import load_strict_
from thawline.ckpt.source import open_source
from thawline.ckpt.tensors import SourceTensors
from thawline.data.videochat import ClipSettings
from thawline.errors import CheckpointError, RecipeError
from thawline.models.videochat.alignment import VideoAlignment
from thawline.models.videochat.alignment_config import AlignmentConfig, alignment_from_json
from thawline.models.videochat.alignment_loading import New, begin_anew, supply_of
from thawline.models.videochat.llm import InstructionTokenizer

NAME: Final = "alignment.json"
"""The file by which a directory describes itself as a stage-1 model."""
FORMAT: Final = "thawline-videochat-stage1/1"
WEIGHTS: Final = "model.safetensors"
_BERT_FILES: Final = ("config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignmentHome:
    """One stage-1 model by its parts, nothing loaded yet.

    bert:  the directory of the vocabulary
    parts: files of weights; their order does not matter, but for tensors that two of them hold (the later counts)
    new:   what begins anew on purpose
    """

    path: Path
    config: AlignmentConfig
    bert: Path
    parts: tuple[Path, ...]
    new: tuple[New, ...] = ()
    clips: ClipSettings = ClipSettings()

    @classmethod
    def of(cls, folder: Path) -> AlignmentHome:
        """The model that describes itself in `folder`. Raises CheckpointError where the description is torn."""
        path = folder / NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r}, this version reads {FORMAT!r}")
            return cls(
                path=folder,
                config=alignment_from_json(data["config"], where=str(path)),
                bert=folder / "bert",
                parts=(folder / WEIGHTS,),
                clips=ClipSettings(frames=data["frames"], size=data["size"]),
            )
        except RecipeError as exc:
            raise RecipeError(exc.what, where=exc.where or str(path), fix=exc.fix) from exc
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as exc:
            raise CheckpointError(
                f"the description of the model cannot be read: {exc}", where=str(path), fix="export the run again"
            ) from exc

    def tokenizer(self) -> InstructionTokenizer:
        """BERT's, with `[DEC]`; captions lose their end where they are too long."""
        words = InstructionTokenizer.load(self.bert, max_tokens=self.config.max_words, cut="right")
        if len(words) != self.config.qformer.vocab_size:
            raise CheckpointError(
                f"the vocabulary has {len(words)} words with [DEC], the embedding {self.config.qformer.vocab_size} "
                "rows",
                where=str(self.bert),
                fix="give the vocabulary that the weights were trained with",
            )
        return words

    def open(self, *, seed: int = 0, random_weights: bool = False) -> tuple[VideoAlignment, tuple[str, ...]]:
        """The model in eval mode, and notes on what was left out and what began anew.

        seed: of what begins anew; the global generators are left alone
        random_weights: draw all weights from the global generators instead of reading them
        Raises CheckpointError naming tensors, files and the remedy.
        """
        words = self.tokenizer()
        if random_weights:
            return VideoAlignment(self.config, dec_id=words.dec_id, pad_id=words.pad_id).eval(), ()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = VideoAlignment(self.config, dec_id=words.dec_id, pad_id=words.pad_id)
        return model.eval(), _fill_(model, self.parts, self.new)

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write `model` so that `AlignmentHome.of(folder)` opens it again to the same tensors."""
        stored, _ = tensorfile.untied({n: t.detach().cpu() for n, t in model.state_dict().items()})
        store.write_file(folder / WEIGHTS, tensorfile.pieces(stored, {"format": "pt"}))
        torch.save({"model": {n: t.detach().cpu() for n, t in model.state_dict().items()}}, folder / "upstream.pth")
        (folder / "bert").mkdir()
        for name in _BERT_FILES:
            if (self.bert / name).is_file():
                shutil.copyfile(self.bert / name, folder / "bert" / name)
        described = {
            "format": FORMAT,
            "config": self.config.to_json(),
            "frames": self.clips.frames,
            "size": self.clips.size,
        }
        (folder / NAME).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def is_alignment(path: Path) -> bool:
    """Whether a directory is an exported stage-1 model."""
    return (path / NAME).is_file()


def _fill_(model: VideoAlignment, parts: Sequence[Path], new: Sequence[New]) -> tuple[str, ...]:
    """Load every part; what no part supplies stays as it was drawn, if `new` says so."""
    own = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    tensors: dict[str, Tensor] = {}
    supplies = []
    notes: list[str] = []
    for part in parts:
        with open_source(part) as source:
            held = SourceTensors(source)
            supply = supply_of(str(part), {i.name: i.shape for i in source.infos}, shapes)
            tensors.update((target, _grown(held[name], own[target])) for target, name in supply.tensors.items())
        supplies.append(supply)
        if supply.left_out:
            notes.append(f"{part.name}: {len(supply.left_out)} tensors left out ({', '.join(supply.left_out[:3])} ...)")
    anew = begin_anew([n for n in shapes if n not in _second_names(model, tensors)], supplies, new)
    if anew:
        notes.append(f"{len(anew)} tensors begin anew: {', '.join(anew[:3])} ...")
    load_strict_(
        model,
        {**{name: own[name].clone() for name in own if name in anew or name.endswith(".position_ids")}, **tensors},
        source=" + ".join(str(part) for part in parts),
        allow_cast=True,
    )
    return tuple(notes)


def _second_names(model: nn.Module, given: Mapping[str, Tensor]) -> set[str]:
    """Names that are tied to one that is given."""
    own = model.state_dict()
    places = {own[name].data_ptr() for name in given}
    return {name for name, tensor in own.items() if name not in given and tensor.data_ptr() in places}


def _grown(tensor: Tensor, own: Tensor) -> Tensor:
    """With the rows that only the model has, as they were drawn (`[DEC]`)."""
    return torch.cat((tensor.to(own.dtype), own[len(tensor) :])) if tensor.shape != own.shape else tensor
