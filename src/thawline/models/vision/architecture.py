"""Which network an image classifier is, as plain data, and the empty network for it.

An `Architecture` is what an exported directory's `vision.json` keeps, so that a model can be built again anywhere. The
weights come from elsewhere (through `ckpt`), and every tensor is accounted for there.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor, nn

from thawline.core.config import near_names
from thawline.core.extras import need
from thawline.errors import CheckpointError, MissingExtra, RecipeError
from thawline.models.vision import efficientnet_lite

Kind = Literal["transformers", "efficientnet_lite", "function", "timm", "torchvision"]

_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_LIBRARIES = ("timm", "torchvision")
_LITE_KEYS = ("_conv_stem.weight", "_fc.weight", "_blocks.0._depthwise_conv.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A network without its weights.

    kind:   who builds it
    name:   a variant (efficientnet-lite0), a model's name in timm or torchvision, `module:function`, or for
            transformers the class (ResNetForImageClassification)
    args:   keyword arguments of the builder
    config: the Hugging Face configuration; transformers only
    """

    kind: Kind
    name: str
    args: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data without the configuration, which lies in config.json."""
        return {"kind": self.kind, "name": self.name, "args": dict(self.args)}


def named(text: str, args: Mapping[str, Any]) -> Architecture | None:
    """The architecture that a name means (`timm:resnet18`, `efficientnet-lite0`, `module:function`); None for a path.

    Only the last component counts: a recipe's resolved form writes names as absolute paths too.
    """
    word = Path(text).name
    library, _, name = word.partition(":")
    if library in _LIBRARIES and name:
        return Architecture(kind="timm" if library == "timm" else "torchvision", name=name, args=args)
    if word in efficientnet_lite.VARIANTS:
        return Architecture(kind="efficientnet_lite", name=word, args=args)
    if _FUNCTION.fullmatch(word):
        return Architecture(kind="function", name=word, args=args)
    return None


def from_config(config: Mapping[str, Any], *, where: str) -> Architecture:
    """The architecture of a Hugging Face configuration. Raises CheckpointError where it is no image classifier."""
    names = [n for n in config.get("architectures") or () if isinstance(n, str)]
    found = next((n for n in names if n.endswith("ForImageClassification")), None)
    if found is None:
        raise CheckpointError(
            f"this is no image classifier but {', '.join(names) or config.get('model_type') or 'unnamed'}",
            where=where,
            fix="give a directory whose architectures name a class ...ForImageClassification",
        )
    return Architecture(kind="transformers", name=found, config=config)


def from_names(names: Mapping[str, tuple[int, ...]]) -> Architecture | None:
    """The architecture that tensor names and shapes give away, for a bare weights file; None where they do not."""
    if not all(key in names for key in _LITE_KEYS):
        return None
    for variant in efficientnet_lite.VARIANTS:
        model = efficientnet_lite.build(variant, classes=names["_fc.weight"][0])
        if {n: tuple(t.shape) for n, t in model.state_dict().items()} == dict(names):
            return Architecture(kind="efficientnet_lite", name=variant)
    return None


def build(architecture: Architecture, *, pretrained: bool = False, where: str = "") -> nn.Module:
    """The network with fresh weights from torch's global generator, in eval mode.

    pretrained: let timm or torchvision fill it with the weights that they know under that name
    where:      where the name was written; for messages
    """
    kind, name, args = architecture.kind, architecture.name, dict(architecture.args)
    if kind == "transformers":
        return _transformers(architecture, where)
    if kind == "efficientnet_lite":
        return efficientnet_lite.build(name, **args).eval()
    if kind == "function":
        return _call(name, args, where).eval()
    model: nn.Module = _from_library(kind, name, args, pretrained, where)
    return model.eval()


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Class scores before softmax (batch, classes) of images (batch, 3, h, w), whoever wrote the model."""
    out = model(images)
    scores = out if isinstance(out, Tensor) else out.logits
    assert isinstance(scores, Tensor)
    return scores


def in_network_names(
    architecture: Architecture, model: nn.Module, tensors: Mapping[str, Tensor], *, where: str
) -> Mapping[str, Tensor]:
    """`tensors` of a Hugging Face directory under the names of the network that transformers builds.

    For some families transformers renames parts on loading (`vit.encoder.layer.0` on disk is `vit.layers.0` in memory);
    its own table is used, and its account of what did not fit is an error here. Raises CheckpointError.
    """
    names = model.state_dict().keys()
    if architecture.kind != "transformers" or tensors.keys() == names:
        return tensors
    transformers = need("transformers", extra="hf")
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    before = bars.get_verbosity()
    bars.set_verbosity_error()
    try:
        filled, account = type(model).from_pretrained(  # type: ignore[attr-defined]  # a class of transformers
            None,
            config=model.config,
            state_dict=dict(tensors),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # listed in the account, and refused below with all the others
        )
    finally:
        bars.set_verbosity(before)
        if shown:
            bars.enable_progress_bar()
    findings = [
        (f"{len(found)} {words}: {', '.join(sorted(str(name) for name in found)[:5])}")
        for words, key in (
            ("missing in it", "missing_keys"),
            ("unknown to the model", "unexpected_keys"),
            ("of another shape", "mismatched_keys"),
            ("that could not be converted", "error_msgs"),
        )
        if (found := account[key])
    ]
    if findings:
        raise CheckpointError(
            f"does not fit the model of {len(names)} tensors; nothing was loaded\n  " + "\n  ".join(findings),
            where=where,
            fix="is it the directory of this very model? config.json and the weights must belong together",
        )
    state: Mapping[str, Tensor] = filled.state_dict()
    return state


def _transformers(architecture: Architecture, where: str) -> nn.Module:
    transformers = need("transformers", extra="hf")
    assert architecture.config is not None
    values = dict(architecture.config)
    kind = values.pop("model_type", None)
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"transformers {transformers.__version__} knows no model_type {kind!r}",
            where=where,
            fix="a newer transformers, or a directory of another model",
        )
    config = transformers.CONFIG_MAPPING[kind].from_dict(values)
    config.architectures = [architecture.name]
    model: nn.Module = transformers.AutoModelForImageClassification.from_config(config, dtype="float32")
    return model.eval()


def _call(name: str, args: dict[str, Any], where: str) -> nn.Module:
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as exc:
        raise RecipeError(
            f"{name!r} cannot be imported: {exc}",
            where=where,
            fix="module:function, importable from here (PYTHONPATH, or install the package)",
        ) from exc
    try:
        model = function(**args)
    except TypeError as exc:
        raise RecipeError(f"{name}({_spelled(args)}) failed: {exc}", where=where, fix="options.model_args") from exc
    if not isinstance(model, nn.Module):
        raise RecipeError(f"{name!r} returned {type(model).__name__}, not a torch module", where=where)
    return model


def _from_library(kind: str, name: str, args: dict[str, Any], pretrained: bool, where: str) -> nn.Module:
    library = _library(kind)
    if kind == "timm":
        known = library.list_models()
        if name.partition(".")[0] in known:
            return cast(nn.Module, library.create_model(name, pretrained=pretrained, **args))
    else:
        known = library.models.list_models()
        if name in known:
            return cast(nn.Module, library.models.get_model(name, weights="DEFAULT" if pretrained else None, **args))
    near = near_names(name, known)
    raise RecipeError(
        f"{kind} has no model {name!r}", where=where, fix=f"closest: {', '.join(near)}" if near else "check the name"
    )


def _library(kind: str) -> Any:
    """timm or torchvision. Both need a torchvision that was built for this very torch, and often have another."""
    try:
        need("torchvision", extra="vision")
        return need("timm", extra="vision") if kind == "timm" else importlib.import_module("torchvision")
    except MissingExtra as exc:
        raise MissingExtra(
            exc.what if kind in exc.what else f"{kind} needs torchvision: {exc.what}",
            where=exc.where,
            fix="install the torchvision that belongs to this torch, from the same index as torch; or take the model "
            "from transformers or a module:function, which need neither",
        ) from exc


def _spelled(args: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={json.dumps(v)}" for k, v in args.items())
