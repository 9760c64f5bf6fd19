"""What lies beside a recogniser's weights and belongs to it: features, tokenizer, and the files of an export.

A home is what says what the network is: a WeNet model directory (train.yaml, units.txt, global_cmvn), a Hugging Face
Whisper directory (config.json, tokenizer.json), or OpenAI's Whisper .pt (its dims; it holds no tokenizer).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from thawline.ckpt.formats.wenet import SIDECARS as WENET_SIDECARS
from thawline.core.config import Document, bind, dump_yaml, read_yaml
from thawline.core.whisper import huggingface_values
from thawline.data.speech_frontend import SpeechFrontend
from thawline.data.text import Tokenizer, open_tokenizer
from thawline.errors import CheckpointError, DataError
from thawline.models import family
from thawline.models.wenet.config import read_config
from thawline.models.wenet.vocabulary import resized_values
from thawline.tasks.speech_vocabulary import NewUnits, change_vocabulary_

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
    """One model directory or file.

    kind:      "wenet", "whisper" (Hugging Face) or "openai"
    values:    train.yaml, config.json or OpenAI's dims as plain data
    tokenizer_place: a folder with tokenizer.json in place of the home's own; None: the home's own
    units:     a units.txt in place of the home's own; None: the home's own
    new_units: what became of the rows, once `with_units_` changed a model
    """

    path: Path
    kind: str
    values: Mapping[str, Any]
    tokenizer_place: Path | None = None
    units: Path | None = None
    new_units: NewUnits | None = None

    @classmethod
    def of(cls, path: Path, *, tokenizer: Path | None = None) -> SpeechHome:
        """Tell what `path` is. Raises CheckpointError, naming what was looked for, where it is none of the kinds."""
        folder = family.home_of(path)
        for config in (folder / "train.yaml", path.with_suffix(".yaml") if path != folder else folder / "final.yaml"):
            if config.is_file():
                return cls(folder, "wenet", read_yaml(config).data, tokenizer)
        if (folder / "config.json").is_file():
            values: Mapping[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return cls(folder, "whisper", values, tokenizer)
        if path.is_file() and path.suffix == ".pt":
            return cls(path, "openai", family.sniff(path).values, tokenizer)
        raise CheckpointError(
            "no recogniser is described here: neither train.yaml (WeNet) nor config.json (Hugging Face) is there",
            where=str(folder),
            fix="give the model's own directory",
        )

    def frontend(self, conf: Mapping[str, Any]) -> SpeechFrontend:
        """How the model hears: its own `dataset_conf`, with the recipe's `data.conf` over it, key by key."""
        return bind(SpeechFrontend, Document(_over(self._own_conf(), conf), f"{self.path.name} and data.conf"))

    def tokenizer(self) -> Tokenizer:
        """How the model spells. Raises DataError where it holds no tokenizer and none was given."""
        if self.tokenizer_place is not None:
            return open_tokenizer("whisper", {"model": str(self.tokenizer_place)}, Path())
        if self.kind == "openai":
            raise DataError(
                "OpenAI's .pt holds no tokenizer",
                where=str(self.path),
                fix="give a folder with a Whisper's tokenizer.json (--tokenizer, options.tokenizer)",
            )
        if self.kind == "whisper":
            return open_tokenizer("whisper", {}, self.path)
        kind, conf = str(self.values.get("tokenizer", "char")), dict(self.values.get("tokenizer_conf") or {})
        if self.units is not None:
            conf["symbol_table_path"] = str(self.units)
        if kind == "whisper" and not conf.get("model") and not (self.path / "tokenizer.json").is_file():
            raise DataError(
                "there is no tokenizer.json beside this Whisper of WeNet's, which takes its tokenizer from a package",
                where=str(self.path),
                fix="copy a Whisper's tokenizer.json there, or say where one is (--tokenizer, options.tokenizer)",
            )
        return open_tokenizer(kind, conf, self.path)

    @property
    def encoder_frames(self) -> Callable[[int], int] | None:
        """How many frames the encoder gives for so many of features; None where no CTC is trained over them."""
        if self.kind != "wenet":
            return None
        config = read_config(self.values, where=f"{self.path.name}: train.yaml")
        return config.encoder_frames if config.ctc_weight > 0 else None

    def with_units_(self, model: nn.Module, units: Path, *, seed: int) -> SpeechHome:
        """Give `model` the units of a file; the home that belongs to it then. See `change_vocabulary_`."""
        if not units.is_file():
            raise DataError("there is no such units.txt", where=str(units), fix="check options.units")
        own = self.sidecars().get("units.txt", self.path / "units.txt")
        changed = change_vocabulary_(model, old=own, new=units, seed=seed)
        return self if changed is None else replace(self, units=units, new_units=changed)

    def sidecars(self) -> dict[str, Path]:
        """Files that travel with the weights: name in an export -> where it is."""
        if self.kind == "openai":
            return {}
        if self.kind == "whisper":
            return {name: self.path / name for name in _HF_SIDECARS if (self.path / name).is_file()}
        beside = [*WENET_SIDECARS, *(n for n in _HF_SIDECARS if "token" in n or n in ("vocab.json", "merges.txt"))]
        found = {name: self.path / name for name in beside if (self.path / name).is_file()}
        return found | family.wenet_sidecars(self.path, self.values)[0]

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write the model as others load it: weights under their original names, and the files beside them."""
        if self.kind == "wenet":
            self._export_wenet(model, folder)
        else:
            self._export_huggingface(model, folder)

    def _export_wenet(self, model: nn.Module, folder: Path) -> None:
        """What WeNet's recognize.py and its command line read: final.pt with final.yaml, train.yaml, units, CMVN."""
        for name, file in self.sidecars().items():
            if name != "train.yaml":
                shutil.copyfile(file, folder / name)
        values = family.wenet_values_here(self.values)
        if self.new_units is not None:
            assert self.units is not None
            values = resized_values(values, self.new_units.change)
            shutil.copyfile(self.units, folder / "units.txt")
            changed = json.dumps(self.new_units.to_json(), indent=1, ensure_ascii=False)
            (folder / "vocabulary.json").write_text(changed + "\n", encoding="utf-8")
        for key in ("epoch", "step", "lrs", "loss_dict", "save_time", "tag", "init_infos", "batch_idx", "grad_norm"):
            values.pop(key, None)  # of another checkpoint, where only its sidecar described the model
        text = dump_yaml(values)
        (folder / "train.yaml").write_text(text, encoding="utf-8")
        (folder / "final.yaml").write_text(dump_yaml({**values, "tag": "final"}), encoding="utf-8")
        torch.save(_plain(model), folder / "final.pt")

    def _export_huggingface(self, model: nn.Module, folder: Path) -> None:
        for name, file in self.sidecars().items():
            shutil.copyfile(file, folder / name)
        if self.tokenizer_place is not None and not (folder / "tokenizer.json").exists():
            for name in _HF_SIDECARS:
                if "token" in name and (self.tokenizer_place / name).is_file():
                    shutil.copyfile(self.tokenizer_place / name, folder / name)
        tensors = _plain(model)
        for name in _tied(model):
            del tensors[name]
        save_file({n: t.clone() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
        config = dict(self.values)
        if self.kind == "openai":
            config, generation = huggingface_values({k: int(v) for k, v in self.values.items()})
            config["dtype"] = ""
            _write_json(folder / "generation_config.json", generation)
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = str(next(model.parameters()).dtype).removeprefix("torch.")
        _write_json(folder / "config.json", config)

    def _own_conf(self) -> dict[str, Any]:
        if self.kind == "wenet":
            return dict(self.values.get("dataset_conf") or {})
        bins = self.values["num_mel_bins" if self.kind == "whisper" else "n_mels"]
        return {
            "feats_type": "log_mel_spectrogram",
            "log_mel_spectrogram_conf": {"num_mel_bins": bins, "pad_or_trim": True},
            "filter_conf": {"max_length": 3000, "token_max_length": 440},
            "spec_aug": False,
        }


def _plain(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _tied(model: nn.Module) -> list[str]:
    """Every name of a parameter but its first."""
    first = {name for name, _ in model.named_parameters()}
    return [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in first]


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _over(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(own)
    for key, value in given.items():
        before = merged.get(key)
        merged[key] = _over(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return merged
