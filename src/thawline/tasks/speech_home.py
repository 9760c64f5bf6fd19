"""What lies beside a recogniser's weights and belongs to it: features, tokenizer, and the files of an export.

A home is the directory that says what the network is: a WeNet model directory (train.yaml, units.txt, global_cmvn) or a
Hugging Face Whisper directory (config.json, tokenizer.json).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from thawline.ckpt.source import open_source
from thawline.core.config import Document, bind, read_yaml
from thawline.data.speech import SpeechFrontend
from thawline.data.text import Tokenizer, open_tokenizer
from thawline.errors import CheckpointError

_HF_SIDECARS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "normalizer.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True, slots=True)
class SpeechHome:
    """One model directory. `kind` is "wenet" or "whisper"."""

    path: Path
    kind: str

    @classmethod
    def of(cls, path: Path) -> SpeechHome:
        """Tell what `path` is. Raises CheckpointError, naming what was looked for, where it is neither."""
        folder = path if path.is_dir() else path.parent
        if (folder / "train.yaml").is_file():
            return cls(folder, "wenet")
        if (folder / "config.json").is_file():
            return cls(folder, "whisper")
        raise CheckpointError(
            "no recogniser is described here: neither train.yaml (WeNet) nor config.json (Hugging Face) is there",
            where=str(folder),
            fix="give the model's own directory",
        )

    @property
    def settings(self) -> Mapping[str, Any]:
        """train.yaml or config.json as plain data."""
        if self.kind == "wenet":
            data: Mapping[str, Any] = read_yaml(self.path / "train.yaml").data
            return data
        loaded: Mapping[str, Any] = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        return loaded

    def frontend(self, conf: Mapping[str, Any]) -> SpeechFrontend:
        """How the model hears: its own `dataset_conf`, with the recipe's `data.conf` over it, key by key."""
        return bind(SpeechFrontend, Document(_over(self._own_conf(), conf), f"{self.path.name} and data.conf"))

    def tokenizer(self) -> Tokenizer:
        """How the model spells."""
        if self.kind == "whisper":
            return open_tokenizer("whisper", {}, self.path)
        settings = self.settings
        conf = settings.get("tokenizer_conf") or {}
        return open_tokenizer(str(settings.get("tokenizer", "char")), conf, self.path)

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the model as others load it: weights under their original names, and the files beside them."""
        if self.kind == "wenet":
            for file in sorted(self.path.iterdir()):
                if file.is_file() and file.suffix not in (".pt", ".safetensors") and not _is_checkpoint_note(file):
                    shutil.copyfile(file, folder / file.name)
            torch.save(_plain(model), folder / "final.pt")
            return
        for name in _HF_SIDECARS:
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, folder / name)
        tensors = _plain(model)
        with open_source(self.path) as source:
            left_out = [name for name in tensors if name not in source and name in _tied(model)]
        for name in left_out:
            del tensors[name]
        save_file({n: t.clone() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
        config = dict(self.settings)
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = str(next(model.parameters()).dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _own_conf(self) -> dict[str, Any]:
        if self.kind == "wenet":
            return dict(self.settings.get("dataset_conf") or {})
        return {
            "feats_type": "log_mel_spectrogram",
            "log_mel_spectrogram_conf": {"num_mel_bins": self.settings["num_mel_bins"], "pad_or_trim": True},
            "filter_conf": {"max_length": 3000, "token_max_length": 440},
            "spec_aug": False,
        }


def _plain(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _tied(model: nn.Module) -> set[str]:
    """Every name of a parameter but its first."""
    first = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - first


def _over(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(own)
    for key, value in given.items():
        before = merged.get(key)
        merged[key] = _over(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return merged


def _is_checkpoint_note(file: Path) -> bool:
    """WeNet writes `epoch_3.yaml` beside `epoch_3.pt`; only train.yaml describes the model."""
    return file.suffix == ".yaml" and file.name != "train.yaml"
