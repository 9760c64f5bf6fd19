"""A recogniser with its weights, from one model directory or weights file: read, renamed, completed, loaded strictly.

What a file lacks by its nature is set deliberately and said in a note: WeNet's converted Whisper has no output bias and
no CTC head (wenet/models/whisper/convert_whisper_to_wenet_config_and_ckpt.py), older WeNet files no positional tables.
Anything else that is missing or surplus is refused with its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thawline.ckpt.load import load_strict_
from thawline.ckpt.source import open_source
from thawline.ckpt.tensors import SourceTensors
from thawline.core.config import read_yaml
from thawline.core.rng import derive
from thawline.errors import CheckpointError
from thawline.models import family
from thawline.models.family import ModelFiles
from thawline.models.wenet.cmvn import CmvnStatistics, read_cmvn
from thawline.models.wenet.config import U2Config
from thawline.models.wenet.lora import resolve_lora
from thawline.models.whisper_names import NAME_RULES, Spelling, rule_of, translate

NEW_TENSOR_KEY = ("thawline", "new tensor")
"""A new tensor NAME is drawn from `derive(0, *NEW_TENSOR_KEY, NAME)`: the same wherever and whenever it is loaded."""


def load_recogniser(path: Path, *, weights: Path | None = None, base: Path | None = None) -> nn.Module:
    """The recogniser that `path` (a directory, or a weights file beside its configuration) describes, in eval mode.

    weights: where its tensors are, if not there
    base:    the model that a LoRA file or a partial file belongs to
    Notes on what was set deliberately are left on the model; see `notes_of`.
    """
    files = _described(path, base)
    model = family.build_empty(files)
    tensors, notes = _tensors(files, weights or path, base)
    tensors = _spelt(tensors, files, path)
    if files.family == "wenet":
        notes += _complete(tensors, model, files)
    load_strict_(model, widened(tensors, model), source=str(weights or path))
    remember_(model, notes)
    return model.eval()


def notes_of(model: nn.Module) -> tuple[str, ...]:
    """What loading did beyond copying tensors, one sentence each."""
    notes: tuple[str, ...] = getattr(model, "load_notes", ())
    return notes


def remember_(model: nn.Module, notes: list[str]) -> None:
    """Add notes to those of the model."""
    model.load_notes = (*notes_of(model), *notes)  # type: ignore[assignment]  # a plain attribute, not a submodule


def cmvn_of(files: ModelFiles) -> CmvnStatistics | None:
    """Statistics from the CMVN file beside a WeNet model; None where it names none or the file is gone."""
    config = family.wenet_config(files)
    if not config.cmvn_file or "global_cmvn" not in files.sidecars:
        return None
    return read_cmvn(files.sidecars["global_cmvn"], is_json=config.cmvn_is_json)


def _described(path: Path, base: Path | None) -> ModelFiles:
    """What the network is: said beside `path`, else (a bare file of factors) beside the base."""
    try:
        return family.sniff(path)
    except CheckpointError:
        if base is None or path.is_dir():
            raise
        return family.sniff(base)


def _tensors(files: ModelFiles, weights: Path, base: Path | None) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors, LoRA factors added exactly once."""
    # Of a WeNet directory the family has chosen the file: final.pt may be a dangling link, or one of many.
    place = files.weights[0] if files.family == "wenet" and weights.is_dir() else weights
    given = _read(place)
    if not any(name.endswith((".lora_A", ".lora_B")) for name in given):
        if base is None:
            return given, []
        with open_source(place, base=_weights_of(base)) as source:
            return dict(SourceTensors(source)), list(source.notes)
    config = family.wenet_config(files)
    if config.lora is None:
        raise CheckpointError(
            "it holds LoRA factors, and train.yaml has no lora_conf that gives their scale",
            where=str(place),
            fix="write lora_conf (lora_modules, lora_rank, lora_alpha) into train.yaml as it was in training",
        )
    under = None if base is None else _read(_weights_of(base))
    merged = _merged_by_tag(place) if base is None else None
    try:
        found = resolve_lora(given, scale=config.lora.scale, base=under, merged=merged)
    except CheckpointError as error:
        raise CheckpointError(error.what, where=error.where or str(place), fix=error.fix) from error
    notes = [f"LoRA: {len(found.factors)} pairs of factors, found {found.kind}, are part of the weights once"]
    if merged is not None:
        notes.append(f"its tag says that WeNet wrote it {'with' if merged else 'without'} the factors in its weights")
    return dict(found.tensors), notes


def _merged_by_tag(weights: Path) -> bool | None:
    """What WeNet's sidecar says: it merges before saving at the end of an epoch, not in step mode. None: no word."""
    sidecar = weights.with_suffix(".yaml")
    if not sidecar.is_file():
        return None
    values = read_yaml(sidecar).data
    tag = str(values.get("tag", "")) if isinstance(values, Mapping) else ""
    return True if tag.startswith("epoch_") else False if tag.startswith(("step_", "init")) else None


def _weights_of(path: Path) -> Path:
    if path.is_file():
        return path
    files = family.sniff(path)
    return files.weights[0] if files.family == "wenet" else path


def _read(path: Path) -> dict[str, Tensor]:
    with open_source(path) as source:
        return dict(SourceTensors(source))


def _spelt(tensors: dict[str, Tensor], files: ModelFiles, path: Path) -> dict[str, Tensor]:
    """Whisper's tensors under the names of the network that is built."""
    found = _spelling(tensors)
    if found is None or found == files.network:
        return tensors
    target: Spelling = files.network
    out: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        other = translate(name, found, target)
        rule = rule_of(name, found)
        if other is None or rule is None:
            unknown.append(name)
            continue
        if rule.leading_axis and found == "wenet":
            tensor = tensor.squeeze(0)
        elif rule.leading_axis and target == "wenet":
            tensor = tensor.unsqueeze(0)
        out[other] = tensor
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} tensors have no name in {target}'s Whisper: {', '.join(sorted(unknown)[:5])}",
            where=str(path),
            fix="thawline convert says what can be left out",
        )
    return out


def _spelling(tensors: Mapping[str, Tensor]) -> Spelling | None:
    for spelling in ("openai", "wenet", "huggingface"):
        if all(_first_layer(getattr(rule, spelling)) in tensors for rule in NAME_RULES):
            return spelling
    return None


def _first_layer(template: str) -> str:
    return template.replace(".N.", ".0.")


def _complete(tensors: dict[str, Tensor], model: nn.Module, files: ModelFiles) -> list[str]:
    """Set what a WeNet file lacks by its nature; the note of each."""
    config = family.wenet_config(files)
    wanted = model.state_dict()
    buffers = {name for name, _ in model.named_buffers()}
    notes: list[str] = []
    surplus = [n for n in tensors if n not in wanted and n.endswith(".linear_k.bias")]
    if surplus and has_bare_keys(config):
        for name in surplus:
            del tensors[name]
        notes.append(f"{len(surplus)} key biases left out: the same is added to every score, so softmax removes it")
    for name, make in _makers(config, files).items():
        if name in wanted and name not in tensors:
            tensors[name], note = make(name, wanted[name])
            notes.append(f"{name}: {note}")
    tables = [n for n in wanted if n.endswith(".pe") and n in buffers and n not in tensors]
    for name in tables:
        tensors[name] = wanted[name].clone()
    if tables:
        notes.append(f"{', '.join(tables)}: computed, as the file was written by a WeNet that does not save it")
    return notes


def has_bare_keys(config: U2Config) -> bool:
    """Whether some attention of the network has keys without bias, as Whisper's."""
    decoder = config.decoder
    return not config.encoder.key_bias or (decoder is not None and not (decoder.key_bias and decoder.src_key_bias))


Maker = Callable[[str, Tensor], tuple[Tensor, str]]


def _makers(config: U2Config, files: ModelFiles) -> dict[str, Maker]:
    """Name -> how to make the tensor where the file lacks it."""
    makers: dict[str, Maker] = {}
    statistics = cmvn_of(files)
    if statistics is not None:
        mean, istd = torch.tensor(statistics.mean).float(), torch.tensor(statistics.istd).float()
        source = files.sidecars["global_cmvn"].name
        makers["encoder.global_cmvn.mean"] = lambda name, like: (mean, f"from {source}")
        makers["encoder.global_cmvn.istd"] = lambda name, like: (istd, f"from {source}")
    if config.is_whisper:
        makers["decoder.output_layer.bias"] = _zeros("zero, as Whisper has no output bias")
        makers["ctc.ctc_lo.weight"] = _drawn
        makers["ctc.ctc_lo.bias"] = _zeros("zero, of a new CTC head")
    return makers


def _zeros(note: str) -> Maker:
    return lambda name, like: (torch.zeros_like(like), note)


def _drawn(name: str, like: Tensor) -> tuple[Tensor, str]:
    """Uniform in +-1/sqrt(inputs), torch's own range for a linear layer, from a stream of the tensor's own."""
    bound = 1.0 / math.sqrt(like.size(-1))
    generator = torch.Generator().manual_seed(derive(0, *NEW_TENSOR_KEY, name))
    value = (torch.rand(like.shape, generator=generator) * 2 - 1) * bound
    key = ", ".join(repr(part) for part in (0, *NEW_TENSOR_KEY, name))
    return value.to(like.dtype), f"new, as Whisper has no CTC head: uniform in +-{bound:.4g}, drawn from derive({key})"


def widened(given: Mapping[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """Half precision becomes fp32 where the model is in fp32, which is exact; nothing else is cast."""
    wanted = model.state_dict()
    tensors: dict[str, Any] = {}
    for name, tensor in given.items():
        exact = name in wanted and wanted[name].dtype == torch.float32
        half = tensor.dtype in (torch.float16, torch.bfloat16)
        tensors[name] = tensor.float() if exact and half else tensor
    return tensors
