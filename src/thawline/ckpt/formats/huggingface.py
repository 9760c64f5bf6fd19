"""Hugging Face folders: one or several safetensors or `.bin` files with an index, and PEFT adapters.

An index is untrusted: every name must be where it says, every tensor of every shard must be listed, no path may leave
the folder. A name that `save_pretrained` leaves out because it is tied (`lm_head.weight`) is given back, if the
configuration says that it is tied and this module knows to what.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from thawline.ckpt.formats.mapped import MappedFile, inside
from thawline.ckpt.formats.pieces import Plan, Planned
from thawline.ckpt.formats.safetensors_header import read_header
from thawline.ckpt.formats.torch_archive import open_archive
from thawline.errors import CheckpointError

_WHOLE: Final = (
    "model.safetensors",
    "adapter_model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "adapter_model.bin",
)
_INDEXES: Final = (
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors.index.json",
)
_MAX_JSON: Final = 256 << 20

TIED: Final[Mapping[str, tuple[str, str]]] = {
    "whisper": ("proj_out.weight", "model.decoder.embed_tokens.weight"),
    "gpt2": ("lm_head.weight", "transformer.wte.weight"),
    "opt": ("lm_head.weight", "model.decoder.embed_tokens.weight"),
    "t5": ("lm_head.weight", "shared.weight"),
    "bart": ("lm_head.weight", "model.shared.weight"),
    "bloom": ("lm_head.weight", "transformer.word_embeddings.weight"),
    "": ("lm_head.weight", "model.embed_tokens.weight"),
}
"""Model type -> (tied output name, the name it is tied to); "" is for decoder-only models of today's naming."""

_TIED_UNLESS_SAID: Final = frozenset({"whisper", "gpt2", "opt", "t5", "bart", "bloom", "gemma", "gemma2", "gemma3"})

SIDECARS: Final = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "normalizer.json", "tokenizer.model", "spiece.model", "adapter_config.json", "chat_template.jinja",
)  # fmt: skip
"""Files that belong to a model and hold no weights."""


def looks_like(path: Path) -> bool:
    """Whether a folder is laid out this way."""
    return path.is_dir() and bool(whole_file(path) or _pieces(path))


def plan(path: Path) -> Plan:
    """What the folder holds. Raises CheckpointError naming the file and the cause."""
    index = next((name for name in _INDEXES if (path / name).is_file()), None)
    whole = next((name for name in _WHOLE if (path / name).is_file()), None)
    if index is not None and whole is not None and not whole.startswith("adapter"):
        raise CheckpointError(
            f"has both {whole} and {index}, which may differ", where=str(path), fix="remove the one that is not meant"
        )
    notes: list[str] = []
    if index is not None:
        tensors, files = _sharded(path, index, notes)
    elif whole is not None:
        tensors, file = _file(inside(path, whole))
        files = [file]
    else:
        pieces = _pieces(path)
        _file(inside(path, pieces[0]))  # says why it cannot be used, if it is what it is called
        raise CheckpointError(
            f"has {len(pieces)} shards and no index of them", where=str(path), fix=f"bring {_INDEXES[0]} back"
        )
    config, sidecars = described(path)
    if config is not None:
        tensors = _with_tied(tensors, config, notes)
    kind = "peft adapter" if (path / "adapter_config.json").is_file() else "hugging face"
    how = f"{kind}, {len(files)} files" if index is not None else kind
    return Plan(format=how, tensors=tensors, files=tuple(files), notes=tuple(notes), sidecars=sidecars, config=config)


def described(path: Path) -> tuple[Mapping[str, object] | None, dict[str, Path]]:
    """The configuration in a folder, and the files that travel with a model; a Trainer leaves both beside shards."""
    config = _json(inside(path, "config.json")) if (path / "config.json").is_file() else None
    return config, {name: inside(path, name) for name in SIDECARS if (path / name).is_file()}


def whole_file(path: Path) -> str:
    """The name of a file that holds all weights of a folder, or lists those that do; "" if there is none."""
    return next((name for name in (*_WHOLE, *_INDEXES) if (path / name).is_file()), "")


def _pieces(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.glob("shard-*-model-*-of-*.safetensors"))


def tied_name(config: Mapping[str, object]) -> tuple[str, str] | None:
    """(tied output name, kept name) for a configuration that ties its output to its embedding; None if it does not."""
    kind = config.get("model_type")
    architectures = config.get("architectures")
    heads = [a for a in architectures if isinstance(a, str)] if isinstance(architectures, list) else []
    if not isinstance(kind, str) or not any(
        name.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")) for name in heads
    ):
        return None
    if config.get("tie_word_embeddings", kind in _TIED_UNLESS_SAID) is not True:
        return None
    return TIED.get(kind, TIED[""])


def _with_tied(tensors: dict[str, Planned], config: Mapping[str, object], notes: list[str]) -> dict[str, Planned]:
    tied = tied_name(config)
    if tied is None or tied[0] in tensors:
        return tensors
    alias, kept = tied
    if kept not in tensors:
        notes.append(f"the configuration ties the output to the embedding, but {kept!r} is not here")
        return tensors
    notes.append(f"{alias!r} is tied to {kept!r} by the configuration; it is not stored")
    return {**tensors, alias: tensors[kept].renamed(alias, tied_to=kept)}


def _sharded(path: Path, index: str, notes: list[str]) -> tuple[dict[str, Planned], list[MappedFile]]:
    where = path / index
    listing = _json(inside(path, index))
    weight_map = listing.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("lists no tensors", where=str(where), fix="copy the file again")
    shards: dict[str, dict[str, Planned]] = {}
    files: list[MappedFile] = []
    for name, shard in weight_map.items():
        source = inside(path, shard)
        if shard not in shards:
            shards[shard], file = _file(source)
            files.append(file)
        if name not in shards[shard]:
            raise CheckpointError(
                f"says that tensor {name!r} is in {shard}, which does not hold it",
                where=str(where),
                fix="the index is of other files: copy the folder again",
            )
    for shard, held in shards.items():
        extra = [name for name in held if weight_map.get(name) != shard]
        if extra:
            raise CheckpointError(
                f"does not list tensor {extra[0]!r} of {shard} ({len(extra)} such)",
                where=str(where),
                fix="the index is of other files: copy the folder again",
            )
    stated = listing.get("metadata")
    size = stated.get("total_size") if isinstance(stated, dict) else None
    # Kept names only: a tie inside one .bin shard is one tensor under two names.
    have = sum(t.info.nbytes for held in shards.values() for t in held.values() if t.info.tied_to is None)
    if isinstance(size, int) and size != have:
        notes.append(f"the index states {size} bytes of tensors, the files hold {have}")
    return {name: shards[shard][name] for name, shard in weight_map.items()}, files


def _file(path: Path) -> tuple[dict[str, Planned], MappedFile]:
    if path.suffix == ".safetensors":
        file = MappedFile(path)
        return read_header(file, "file")[0], file
    archive = open_archive(path)
    if not isinstance(archive.value, dict):
        raise CheckpointError("holds no state dict", where=str(path), fix="give a file with a state dict")
    tensors = archive.plan_state_dict(archive.value, "file")
    if not tensors:
        raise CheckpointError("holds no tensors at its top level", where=str(path), fix="convert the file itself")
    return tensors, archive.file


def _json(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_JSON + 1)
        value = json.loads(data) if len(data) <= _MAX_JSON else None
    except (OSError, ValueError, RecursionError) as exc:
        raise CheckpointError(f"cannot be read: {exc}", where=str(path), fix="copy the file again") from exc
    if not isinstance(value, dict):
        raise CheckpointError("is no JSON object", where=str(path), fix="copy the file again")
    return value
