"""What a video-chat run leaves: a directory that describes itself, upstream's file, and a plain language model.

videochat.json      the shape, and where the rest lies
model.safetensors   every tensor but the language model's own: vision, Q-Former, queries, projection, adapters
bert/               the Q-Former's vocabulary
llm/                the language model, only where the run changed it; else videochat.json names the directory it
                    was read from, with its fingerprint
upstream.pth        {"model": what trained, and the buffers}, as Ask-Anything saves it
merged/             the language model with its adapters added in, as a Hugging Face directory
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from thawline.ckpt import store, tensorfile
from thawline.ckpt.source import open_source
from thawline.freeze.lora import has_adapters, merged_copy
from thawline.models.videochat.loading import upstream_delta
from thawline.models.videochat.names import canonical, is_rotary, part_of
from thawline.tasks.videochat_home import NAME, ChatHome

Extra = Literal["upstream", "merged"]
WEIGHTS: Final = "model.safetensors"
UPSTREAM: Final = "upstream.pth"

_TEXT_FILES: Final = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_BERT_FILES: Final = ("config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def export(
    model: nn.Module,
    home: ChatHome,
    folder: Path,
    *,
    trained: Collection[str],
    whole: bool = False,
    extras: Collection[Extra] = ("upstream", "merged"),
) -> None:
    """Write `model` into `folder`, so that `videochat_recognition.home_at(folder)` opens it again to the same tensors.

    trained: names of the parameters that some phase of the plan lets train
    whole:   write the language model too, although no plan names it (a random start)

    Adapters that a plan put in (`plan.lora`) are added into the language model, whose `llm/` is then written; those of
    the model's own configuration stay adapters.
    """
    if "upstream" in extras and not whole:
        torch.save({"model": upstream_delta(model, trained)}, folder / UPSTREAM)
    planned = has_adapters(model) and home.config.lora is None
    plain: Any = merged_copy(model) if planned else model
    changed = whole or planned or any(part_of(name) == "llm" for name in trained)
    kept = {n: t for n, t in plain.state_dict().items() if part_of(n) != "llm" and not is_rotary(n)}
    _write(folder / WEIGHTS, kept)
    bert = None
    if home.bert is not None:
        bert = folder / "bert"
        _copy(home.bert, bert, _BERT_FILES)
    llm = folder / "llm" if changed else home.llm
    if changed:
        write_llm(plain, home, llm, merge=False)
        with open_source(llm) as source:
            fingerprint = source.fingerprint()
    else:
        fingerprint = home.fingerprint()
    if "merged" in extras and home.config.lora is not None and not whole:
        write_llm(plain, home, folder / "merged", merge=True)
    described = dataclasses.replace(
        home, llm=llm, bert=bert, parts=(folder / WEIGHTS,), new=(), llm_fingerprint=fingerprint
    )
    text = json.dumps(described.to_json(folder), indent=1, ensure_ascii=False)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def write_llm(model: nn.Module, home: ChatHome, folder: Path, *, merge: bool) -> None:
    """The language model as a Hugging Face directory with its tokenizer, under its own names and without adapters.

    merge: add the adapters into the weights (in float32, then cast back), else leave them out
    """
    _copy(home.llm, folder, _TEXT_FILES)
    layers = _adapted(model) if merge else {}
    prefix = f"{home.config.llm_name}."
    tied = _second_names(model)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if part_of(name) != "llm":
            continue
        own = canonical(name).removeprefix(prefix)
        if name in tied and name not in layers:
            continue  # the configuration ties it to its first name, and the library leaves it out too
        tensors[own] = _merged(tensor, layers[name]) if name in layers else tensor
    _write(folder / WEIGHTS, tensors)
    config: dict[str, Any] = json.loads((home.llm / "config.json").read_text(encoding="utf-8"))
    for key in ("dtype", "torch_dtype"):
        if key in config:
            config[key] = _dtype(tensors.values())
    if any(name in layers for name in tied):
        config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _adapted(model: nn.Module) -> Mapping[str, Any]:
    """Name of an adapted layer's own weight -> the layer, which knows its update."""
    return {
        f"{path}.base_layer.weight": module
        for path, module in model.named_modules()
        if hasattr(module, "base_layer") and hasattr(module, "get_delta_weight")
    }


def _merged(weight: Tensor, layer: Any) -> Tensor:
    made = weight.detach().float()
    for adapter in layer.active_adapters:
        update: Tensor = layer.get_delta_weight(adapter)
        made = made + update.detach().float()
    return made.to(weight.dtype)


def _second_names(model: nn.Module) -> set[str]:
    """Every name of a tied parameter but its first."""
    first = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - first


def _dtype(tensors: Iterable[Tensor]) -> str:
    return str(next(iter(tensors)).dtype).removeprefix("torch.")


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    store.write_file(path, tensorfile.pieces(tensors, {"format": "pt"}))


def _copy(source: Path, target: Path, names: Iterable[str]) -> None:
    target.mkdir(exist_ok=True)
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
