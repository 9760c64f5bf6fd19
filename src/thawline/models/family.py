"""What kind of model a path is, which files hold its weights, what travels with it, and the empty network for it.

Recognising reads names and small text files only. The weights are loaded elsewhere (through `ckpt`); here a network is
built with fresh weights, whose every tensor the loader must account for.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from thawline.core.config import read_yaml
from thawline.core.whisper import check_dims, huggingface_values
from thawline.errors import CheckpointError
from thawline.models.wenet.config import U2Config, read_config
from thawline.models.whisper_names import Spelling

if TYPE_CHECKING:
    from torch import nn

Family = Literal["wenet", "whisper-hf", "whisper-openai"]

_INDEXED = ("model.safetensors", "pytorch_model.bin")
_HF_SIDECARS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "normalizer.json",
)
# Keys of tokenizer_conf and cmvn_conf that name files.
_WENET_FILES = ("symbol_table_path", "bpe_path", "non_lang_syms_path", "model_path")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A recognised model.

    family:      what it is
    path:        the directory, or the single file
    weights:     the file or files that hold all tensors (an index names its shards; both are listed, the index first)
    spelling:    whose tensor names those files use
    network:     whose tensor names the built network uses; where it differs, rename with `whisper_names.translate`
    sidecars:    files that belong into an exported directory beside the weights, by their role, without missing ones
    values:      the configuration as plain data: train.yaml, config.json, or OpenAI's dims
    generation:  generation_config.json, where there is one
    """

    family: Family
    path: Path
    weights: tuple[Path, ...]
    spelling: Spelling
    network: Spelling
    sidecars: Mapping[str, Path]
    values: Mapping[str, Any]
    generation: Mapping[str, Any] | None = None
    missing: tuple[str, ...] = field(default=())
    """Sidecars that the configuration names and that were not found, as written there."""


def sniff(path: Path) -> ModelFiles:
    """Recognise a WeNet directory (or one checkpoint in it), a Hugging Face Whisper directory, or OpenAI's .pt.

    Raises CheckpointError: nothing there (with similar names), or nothing recognised (with what was looked for).
    """
    if not path.exists():
        raise CheckpointError("there is no such file or directory", where=str(path), fix=_similar(path))
    folder = home_of(path)
    config = _wenet_config(path, folder)
    if config is not None:
        return _wenet(path, folder, config)
    if path.is_dir():
        if (path / "config.json").is_file():
            return _huggingface(path)
        raise CheckpointError(
            "no model recognised here",
            where=str(path),
            fix="expected train.yaml and final.pt (WeNet), or config.json and model.safetensors (Hugging Face); found "
            + (", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"),
        )
    return _openai(path)


def home_of(path: Path) -> Path:
    """The folder that describes the model at `path`: its own, or that of a file or of DeepSpeed's shards (EXP/TAG/)."""
    return path if path.is_dir() and not any(path.glob("*mp_rank_*_model_states.pt")) else path.parent


def build_empty(files: ModelFiles) -> nn.Module:
    """The network of `files` with fresh weights (torch's global generator) in eval mode, to be loaded strictly."""
    if files.family == "wenet":
        from thawline.models.wenet.model import build

        return build(wenet_config(files)).eval()
    from thawline.models import whisper

    if files.family == "whisper-openai":
        config, generation = huggingface_values(check_dims(files.values, where=str(files.path)))
        return whisper.build(config, generation)
    return whisper.build(files.values, files.generation)


def wenet_config(files: ModelFiles) -> U2Config:
    """The typed configuration of a WeNet model."""
    return read_config(files.values, where=str(files.sidecars["train.yaml"]))


# --- WeNet
# ----------------------------------------------------------------------------------------------------------------


def _wenet_config(path: Path, folder: Path) -> Path | None:
    """train.yaml of the directory, or the sidecar that WeNet writes beside each checkpoint."""
    own = path.with_suffix(".yaml")
    for candidate in (folder / "train.yaml", own if path != folder else folder / "final.yaml"):
        if candidate.is_file() and path.suffix in ("", ".pt", ".safetensors"):
            return candidate
    return None


def _wenet(path: Path, folder: Path, config: Path) -> ModelFiles:
    values = read_yaml(config).data
    if not isinstance(values, Mapping) or "encoder_conf" not in values:
        raise CheckpointError(
            "this yaml is not a WeNet model configuration",
            where=str(config),
            fix="give a directory whose train.yaml WeNet wrote",
        )
    found, missing = wenet_sidecars(folder, values)
    sidecars = {"train.yaml": config, **found}
    return ModelFiles(
        family="wenet",
        path=path,
        weights=(path,) if path != folder else (_wenet_weights(folder),),
        spelling="wenet",
        network="wenet",
        sidecars=sidecars,
        values=values,
        missing=tuple(missing),
    )


def wenet_sidecars(folder: Path, values: Mapping[str, Any]) -> tuple[dict[str, Path], list[str]]:
    """Role -> file of what a train.yaml names (units.txt, global_cmvn, a bpe model), and the names that lead nowhere.

    A role is the name that the file gets in an export. No weights are looked for.
    """
    sidecars: dict[str, Path] = {}
    missing: list[str] = []
    for role, written in _named_files(values):
        found = _resolve(written, folder)
        if found is None:
            missing.append(written)
        else:
            sidecars[role] = found
    if "units.txt" not in sidecars and (folder / "units.txt").is_file():
        sidecars["units.txt"] = folder / "units.txt"
    return sidecars, missing


def wenet_values_here(values: Mapping[str, Any]) -> dict[str, Any]:
    """A train.yaml whose paths are the bare roles: right in a directory where `wenet_sidecars` lie beside it."""
    out = dict(values)
    tokenizer = dict(out.get("tokenizer_conf") or {})
    for key in _WENET_FILES:
        if tokenizer.get(key):
            tokenizer[key] = "units.txt" if key == "symbol_table_path" else Path(str(tokenizer[key])).name
    if tokenizer:
        out["tokenizer_conf"] = tokenizer
    conf = dict(out.get("cmvn_conf") or {})
    if conf.get("cmvn_file"):
        out["cmvn_conf"] = {**conf, "cmvn_file": "global_cmvn"}
    if out.get("cmvn_file"):
        out["cmvn_file"] = "global_cmvn"
    return out


def _named_files(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(role, path as written) of every file that a train.yaml names; the role is the name it gets in an export."""
    tokenizer = values.get("tokenizer_conf") or {}
    for key in _WENET_FILES:
        if tokenizer.get(key):
            written = str(tokenizer[key])
            yield "units.txt" if key == "symbol_table_path" else Path(written).name, written
    cmvn = (values.get("cmvn_conf") or {}).get("cmvn_file") or values.get("cmvn_file")
    if cmvn and values.get("cmvn", "global_cmvn") is not None:
        yield "global_cmvn", str(cmvn)


def _resolve(written: str, folder: Path) -> Path | None:
    """A path written where WeNet was run: as it stands, beside the configuration, or only its name beside it."""
    name = Path(written)
    for candidate in (folder / name, folder / name.name, name):
        if candidate.is_file():
            return candidate
    return None


def _wenet_weights(folder: Path) -> Path:
    """final.pt, else an average, else the last epoch: WeNet itself leaves final.pt as a dangling link."""
    for name in ("final.pt", "model.safetensors", "final.safetensors"):
        if (folder / name).is_file():
            return folder / name
    for stem in ("avg", "epoch", "step", ""):
        numbered = [(int(m[1]), p) for p in folder.glob("*.pt") if (m := re.fullmatch(rf"{stem}_?(\d+)\.pt", p.name))]
        if numbered:
            return max(numbered)[1]
    raise CheckpointError(
        "a WeNet configuration, but no weights beside it",
        where=str(folder),
        fix="expected final.pt, avg_N.pt, epoch_N.pt, step_N.pt or N.pt; found "
        + (", ".join(sorted(p.name for p in folder.iterdir())[:8])),
    )


# --- Whisper
# --------------------------------------------------------------------------------------------------------------


def _huggingface(path: Path) -> ModelFiles:
    config = _json(path / "config.json")
    if config.get("model_type") != "whisper":
        raise CheckpointError(
            f"a Hugging Face directory of the kind {config.get('model_type')!r}; here only whisper is known",
            where=str(path / "config.json"),
            fix="give a Whisper directory",
        )
    generation = path / "generation_config.json"
    return ModelFiles(
        family="whisper-hf",
        path=path,
        weights=_huggingface_weights(path),
        spelling="huggingface",
        network="huggingface",
        sidecars={name: path / name for name in _HF_SIDECARS if (path / name).is_file()},
        values=config,
        generation=_json(generation) if generation.is_file() else None,
    )


def _huggingface_weights(path: Path) -> tuple[Path, ...]:
    for name in _INDEXED:
        if (path / name).is_file():
            return (path / name,)
        index = path / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(_json(index).get("weight_map", {}).values()))
            absent = [s for s in shards if not (path / s).is_file()]
            if absent or not shards:
                raise CheckpointError(
                    f"the index names files that are not there: {', '.join(absent) or 'none at all'}",
                    where=str(index),
                    fix="bring the missing shards",
                )
            return (index, *(path / s for s in shards))
    raise CheckpointError(
        "a Whisper configuration, but no weights beside it",
        where=str(path),
        fix="expected model.safetensors, model.safetensors.index.json or pytorch_model.bin",
    )


def _openai(path: Path) -> ModelFiles:
    import pickle

    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError, KeyError) as exc:
        raise CheckpointError(
            "neither OpenAI's Whisper nor a WeNet file with its train.yaml beside it: " + str(exc).splitlines()[0],
            where=str(path),
            fix="put WeNet's train.yaml beside a WeNet .pt",
        ) from exc
    if not isinstance(content, dict) or not {"dims", "model_state_dict"} <= content.keys():
        raise CheckpointError(
            "neither OpenAI's Whisper (dims, model_state_dict) nor a WeNet file with its train.yaml beside it",
            where=str(path),
            fix="put WeNet's train.yaml beside a WeNet .pt",
        )
    return ModelFiles(
        family="whisper-openai",
        path=path,
        weights=(path,),
        spelling="openai",
        network="huggingface",
        sidecars={},
        values=check_dims(content["dims"], where=str(path)),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"this cannot be read as JSON: {exc}", where=str(path)) from exc
    if not isinstance(values, dict):
        raise CheckpointError("this is not a JSON object", where=str(path))
    return values


def _similar(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"{folder} does not exist either"
    close = difflib.get_close_matches(path.name, [p.name for p in folder.iterdir()], n=3, cutoff=0.5)
    return f"closest: {', '.join(close)}" if close else f"look into {folder}"
