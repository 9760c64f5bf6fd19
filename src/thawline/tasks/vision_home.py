"""What a directory or weights file of an image classifier says of it: network, classes, input; and its export.

A home is one of: a directory that `export` wrote (vision.json, model.safetensors), a Hugging Face directory of an image
classifier (config.json, preprocessor_config.json), a weights file whose network is known by its tensor names or given
by `module:function`, or a name (`timm:resnet18`, `efficientnet-lite0`, `module:function`) without weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from thawline.ckpt.load import load_strict_
from thawline.ckpt.source import open_source
from thawline.ckpt.tensors import SourceTensors
from thawline.core import hub
from thawline.core.config import Document, bind, near_names
from thawline.data.image_transforms import ImageInput
from thawline.errors import CheckpointError, RecipeError
from thawline.freeze.norm import convert_to_groupnorm_
from thawline.models.vision.architecture import Architecture, build, from_config, from_names, in_network_names, named
from thawline.models.vision.head import find_head, head_layer, resize_head_

NOTE = "vision.json"
"""The file that makes a directory an exported classifier."""

_FORMAT = 1
_LITE_INPUT = ImageInput(size=224, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
"""As the lite models were trained: (byte - 127) / 128 (efficientnet_lite_builder.py, MEAN_RGB and STDDEV_RGB)."""
_PIL_NAMES = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionHome:
    """An image classifier without its weights.

    path:      where it was found; a name where there are no files
    classes:   names of the outputs in order; empty where nothing names them
    input:     what it wants to see
    groupnorm: paths of the layers that are GroupNorm in place of what the architecture has
    head:      path of the layer that gives the logits; empty where it is still to be found
    weights:   what is opened for the tensors; None without any
    """

    path: Path
    architecture: Architecture
    classes: tuple[str, ...] = ()
    input: ImageInput = field(default_factory=ImageInput)
    groupnorm: tuple[str, ...] = ()
    head: str = ""
    weights: Path | None = None

    @classmethod
    def of(cls, path: Path, *, model_fn: str = "", model_args: Mapping[str, Any] | None = None) -> VisionHome:
        """Tell what `path` is. Raises CheckpointError, naming what was looked for, where it is no classifier.

        model_fn: `module:function` that makes the network of a bare weights file
        """
        args = dict(model_args or {})
        path = hub.local(path)
        if path.is_dir():
            return _of_folder(path, model_fn, args)
        if path.is_file():
            return cls(path=path, architecture=_of_file(path, model_fn, args), weights=path).with_known_input()
        made = named(str(path), args)
        if made is None:
            near = near_names(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else []
            raise CheckpointError(
                "no such file or directory, nor the name of an architecture",
                where=str(path),
                fix=f"did you mean {path.parent / near[0]}?"
                if near
                else hub.remedy(path)
                or "a directory, a weights file, timm:NAME, torchvision:NAME, efficientnet-lite0, or module:function",
            )
        return cls(path=path, architecture=made).with_known_input()

    @property
    def names_its_classes(self) -> bool:
        """Whether the classes have names of their own, and not only numbers."""
        return any(name != f"LABEL_{i}" for i, name in enumerate(self.classes))

    def with_known_input(self) -> VisionHome:
        """The same with the input of its architecture, where that is known without a file."""
        return replace(self, input=_LITE_INPUT) if self.architecture.kind == "efficientnet_lite" else self

    def empty(self, *, pretrained: bool = False) -> nn.Module:
        """The network with fresh weights, its head of the right size, GroupNorm where it belongs."""
        model = build(self.architecture, pretrained=pretrained, where=str(self.path))
        if self.head and self.classes:
            resize_head_(model, self.head, len(self.classes))
        if self.groupnorm:
            convert_to_groupnorm_(model, self.groupnorm)
        return model

    def load(self) -> nn.Module:
        """The network with its weights, in eval mode; every tensor accounted for. Half precision becomes fp32.

        A name without files gets the weights that timm or torchvision know under it. Raises CheckpointError naming
        what does not fit.
        """
        if self.weights is None:
            if self.architecture.kind in ("timm", "torchvision"):
                return self.empty(pretrained=True)
            raise CheckpointError(
                f"{self.architecture.name!r} names a network without weights",
                where=str(self.path),
                fix="give a weights file or directory as model, or init: random to draw them",
            )
        model = self.empty()
        with open_source(self.weights) as source:
            held = in_network_names(self.architecture, model, SourceTensors(source), where=str(self.weights))
            load_strict_(model, _widened(held, model), source=str(self.weights))
        return model.eval()

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write `model` as others load it: weights under their names, vision.json, and the files of transformers."""
        tensors = {n: t.detach().cpu().contiguous().clone() for n, t in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        note = {
            "format": _FORMAT,
            "architecture": self.architecture.to_json(),
            "head": self.head,
            "classes": list(self.classes),
            "input": self.input.model_dump(mode="json"),
            "groupnorm": list(self.groupnorm),
        }
        _write(folder / NOTE, note)
        if self.architecture.config is not None:
            names = {str(i): name for i, name in enumerate(self.classes)}
            config = {k: v for k, v in self.architecture.config.items() if k not in ("num_labels", "torch_dtype")}
            config |= {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}
            config |= {"architectures": [self.architecture.name], "dtype": "float32"}
            _write(folder / "config.json", config)
            _write(folder / "preprocessor_config.json", self._preprocessor())

    def _preprocessor(self) -> dict[str, Any]:
        before = _json(self.path / "preprocessor_config.json") if self.path.is_dir() else {}
        side, resample = self.input.size, {v: k for k, v in _PIL_NAMES.items()}[self.input.interpolation]
        size = {"shortest_edge": round(side / self.input.crop)}
        fixed = {"do_resize": True, "size": size, "do_center_crop": True, "crop_size": {"height": side, "width": side}}
        fixed |= {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "resample": resample}
        return {**before, **fixed, "image_mean": list(self.input.mean), "image_std": list(self.input.std)}


def describes(folder: Path) -> bool:
    """Whether the files of `folder` are those of an image classifier."""
    if (folder / NOTE).is_file():
        return True
    names = _json(folder / "config.json").get("architectures") or ()
    return any(isinstance(n, str) and n.endswith("ForImageClassification") for n in names)


def find_head_of(home: VisionHome, model: nn.Module, name: str) -> VisionHome:
    """The home with its head named, and with numbered classes where none are named."""
    head = find_head(model, name=name or home.head, classes=len(home.classes))
    count = head_layer(model, head).out_features
    return replace(home, head=head, classes=home.classes or tuple(f"LABEL_{i}" for i in range(count)))


def _of_folder(path: Path, model_fn: str, args: dict[str, Any]) -> VisionHome:
    if (path / NOTE).is_file():
        return _exported(path)
    if (path / "config.json").is_file():
        config = _json(path / "config.json")
        made = from_config(config, where=str(path / "config.json"))
        return VisionHome(
            path=path, architecture=made, classes=_labels(config), input=_hf_input(path, config), weights=path
        )
    inside = [p for p in sorted(path.iterdir()) if p.suffix in (".safetensors", ".pt", ".pth", ".bin")]
    if len(inside) == 1:
        made = _of_file(inside[0], model_fn, args)
        return VisionHome(path=path, architecture=made, weights=inside[0]).with_known_input()
    raise CheckpointError(
        "no image classifier is described here: neither vision.json nor config.json nor one weights file is there",
        where=str(path),
        fix=f"give the model's directory; here lie {', '.join(sorted(p.name for p in path.iterdir())[:6]) or 'none'}",
    )


def _exported(path: Path) -> VisionHome:
    note = _json(path / NOTE)
    where = str(path / NOTE)
    if note.get("format") != _FORMAT:
        raise CheckpointError(
            f"written in format {note.get('format')!r}, this version reads {_FORMAT}",
            where=where,
            fix="use the version of thawline that wrote it, or a newer one",
        )
    try:
        made = Architecture(
            kind=note["architecture"]["kind"],
            name=note["architecture"]["name"],
            args=note["architecture"]["args"],
            config=_json(path / "config.json") if note["architecture"]["kind"] == "transformers" else None,
        )
        return VisionHome(
            path=path,
            architecture=made,
            classes=tuple(note["classes"]),
            input=bind(ImageInput, Document(note["input"], where)),
            groupnorm=tuple(note["groupnorm"]),
            head=note["head"],
            weights=path,
        )
    except (KeyError, TypeError) as exc:
        raise CheckpointError(
            f"the description of the model cannot be read: {exc}", where=where, fix="export the run again"
        ) from exc


def _of_file(path: Path, model_fn: str, args: dict[str, Any]) -> Architecture:
    if model_fn:
        made = named(model_fn, args)
        if made is None:
            raise RecipeError(
                f"{model_fn!r} names no network", where="options.model_fn", fix="module:function, or timm:NAME"
            )
        return made
    with open_source(path) as source:
        found = from_names({info.name: tuple(info.shape) for info in source.infos})
        if found is None:
            raise CheckpointError(
                f"its tensors ({', '.join(source.names[:3])} ...) do not tell which network they belong to",
                where=str(path),
                fix="say what builds it: options.model_fn: module:function (or timm:NAME, torchvision:NAME)",
            )
    return found


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get("id2label")
    if isinstance(names, Mapping) and names:
        return tuple(str(names[key]) for key in sorted(names, key=int))
    return tuple(f"LABEL_{i}" for i in range(int(config.get("num_labels", 2))))


def _hf_input(path: Path, config: Mapping[str, Any]) -> ImageInput:
    """What preprocessor_config.json asks for; the network's own image size where there is none."""
    given = _json(path / "preprocessor_config.json")
    size = _side(given.get("crop_size") if given.get("do_center_crop") else None) or _side(given.get("size"))
    whole = _side(given.get("size"))
    crop = given.get("crop_pct") or (size / whole if size and whole and whole >= size else 1.0)
    made: dict[str, Any] = {"size": size or _side(config.get("image_size")) or 224, "crop": crop}
    if given.get("do_normalize", True):
        made |= {key: given[f"image_{key}"] for key in ("mean", "std") if given.get(f"image_{key}")}
    else:
        made |= {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    if given.get("resample") in _PIL_NAMES:
        made["interpolation"] = _PIL_NAMES[given["resample"]]
    return bind(ImageInput, Document(made, str(path / "preprocessor_config.json")))


def _side(value: Any) -> int | None:
    """Hugging Face writes a size as a number, {"height", "width"} or {"shortest_edge"}; only square input is known."""
    if isinstance(value, Mapping):
        value = value.get("height", value.get("shortest_edge"))
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[0] if value else None
    return int(value) if value else None


def _widened(given: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Half precision becomes fp32 where the model is in fp32, which is exact; nothing else is cast."""
    single = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    half = (torch.float16, torch.bfloat16)
    return {n: t.float() if t.dtype in half and n in single else t for n, t in given.items()}


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"this cannot be read as JSON: {exc}", where=str(path)) from exc
    if not isinstance(value, dict):
        raise CheckpointError("this is not a JSON object", where=str(path))
    return value


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
