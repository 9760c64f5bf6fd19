"""Tiny checkpoints in the layouts of other frameworks, written without those frameworks, with their expected content.

Classes of DeepSpeed that its files name are stood in for while a file is written, under DeepSpeed's own names.
"""

from __future__ import annotations

import enum
import json
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

Tensors = dict[str, Tensor]


@dataclass
class fragment_address:  # DeepSpeed's spelling
    numel: int
    start: int


class LossScaler:
    def __init__(self) -> None:
        self.cur_scale = 1.0


class ZeroStageEnum(int, enum.Enum):
    disabled = 0
    optimizer_states = 1
    gradients = 2
    weights = 3


_CLASSES = {
    "deepspeed.utils.tensor_fragment": fragment_address,
    "deepspeed.runtime.fp16.loss_scaler": LossScaler,
    "deepspeed.runtime.zero.config": ZeroStageEnum,
}


@contextmanager
def deepspeed_names() -> Iterator[None]:
    """Let the stand-ins be pickled under DeepSpeed's names."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "deepspeed"}
    own = {cls: cls.__module__ for cls in _CLASSES.values()}
    for path in _CLASSES:
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            sys.modules[".".join(parts[:depth])] = types.ModuleType(".".join(parts[:depth]))
    for path, cls in _CLASSES.items():
        setattr(sys.modules[path], cls.__name__, cls)
        cls.__module__ = path
    try:
        yield
    finally:
        for cls, module in own.items():
            cls.__module__ = module
        for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
            del sys.modules[name]
        sys.modules.update(before)


def model(seed: int = 0) -> tuple[Tensors, Tensors, Tensors, dict[str, str]]:
    """(trainable, frozen, buffers, ties) of a small model, in full precision; widths that no world size divides."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    trainable = {"embed.weight": draw(7, 5), "up.weight": draw(11, 5), "up.bias": draw(11), "down.weight": draw(5, 11)}
    frozen = {"old.weight": draw(3, 5).bfloat16(), "old.bias": draw(3).bfloat16()}
    buffers = {
        "bn.running_mean": draw(5),
        "bn.num_batches_tracked": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
    }
    return trainable, frozen, buffers, {"head.weight": "embed.weight"}


def zero(
    folder: Path,
    *,
    stage: int,
    world: int = 2,
    seed: int = 0,
    step: float = 3.0,
    exclude: bool = False,
    refrozen: str = "",
    round_robin: bool = False,
    unstated: bool = False,
) -> Tensors:
    """A DeepSpeed checkpoint of a bf16 run; returns what it must give, in fp32.

    refrozen:    beginning of the names that were frozen after they had trained: they are in both lists
    round_robin: the ranks record the slices of another order than the flat tensors have (`round_robin_gradients`)
    unstated:    the optimizer does not state its stage (BF16_Optimizer)
    """  # fmt: skip
    trainable, frozen, buffers, ties = model(seed)
    if exclude:
        frozen = {}
    groups = [
        OrderedDict((n, t) for n, t in trainable.items() if t.dim() > 1),
        OrderedDict((n, t) for n, t in trainable.items() if t.dim() == 1),
    ]
    tag = folder / "global_step3"
    tag.mkdir(parents=True)
    (folder / "latest").write_text("global_step3")
    module: Tensors = OrderedDict((n, t.bfloat16()) for n, t in trainable.items())
    module |= {alias: module[kept] for alias, kept in ties.items()}
    module |= frozen | buffers
    fragments = frozen | {n: t.bfloat16() for n, t in trainable.items() if refrozen and n.startswith(refrozen)}
    states: dict[str, object] = {
        "buffer_names": list(buffers),
        "param_shapes": [OrderedDict((n, t.shape) for n, t in group.items()) for group in groups],
        "frozen_param_shapes": OrderedDict((n, t.shape) for n, t in fragments.items()) if stage > 1 else None,
        "shared_params": dict(ties),
        "optimizer": None,
        "global_steps": 3,
        "dp_world_size": world,
        "mp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": stage}},
        "ds_version": "0.19.8",
    }
    with deepspeed_names():
        if stage == 3:
            _stage_3(tag, world, step, states, module, groups, fragments, buffers)
        else:
            orders = [list(group) for group in groups]
            recorded = [order[::-1] if round_robin else order for order in orders]
            _stages_0_to_2(tag, stage, world, step, states, module, groups, fragments, recorded, unstated)
    expected = {n: t.clone() for n, t in trainable.items()}
    expected |= {n: t.float() for n, t in frozen.items()} | buffers
    return expected | {alias: expected[kept] for alias, kept in ties.items()}


def _stages_0_to_2(
    tag: Path, stage: int, world: int, step: float, states: dict[str, object], module: Tensors,
    groups: list[OrderedDict[str, Tensor]], frozen: Tensors, recorded: list[list[str]], unstated: bool,
) -> None:  # fmt: skip
    if stage == 0:
        masters = [list(group.values()) for group in groups]
        states |= {"optimizer": {"fp32_groups": masters}, "param_shapes": None}
    fragments = OrderedDict(frozen) if stage == 2 else None
    torch.save({"module": module, "frozen_param_fragments": fragments, **states}, tag / "mp_rank_00_model_states.pt")
    for rank in range(world if stage else 0):
        parts, paddings, mappings = [], [], []
        for group, order in zip(groups, recorded, strict=True):
            flat = torch.cat([t.reshape(-1) for t in group.values()])
            size = -(-flat.numel() // (2 * world)) * 2
            low, high = min(rank * size, flat.numel()), min((rank + 1) * size, flat.numel())
            # A view over padded storage, as the last rank saves it: the record is longer than the tensor.
            padded = torch.zeros(size)
            padded[: high - low] = flat[low:high]
            parts.append(padded[: high - low])
            paddings.append(size - (high - low))
            mapping, position = OrderedDict(), 0
            for name in order:
                count = group[name].numel()
                start, stop = max(position, low), min(position + count, high)
                if start < stop:
                    mapping[name] = fragment_address(numel=stop - start, start=start - low)
                position += count
            mappings.append(mapping)
        state = {i: {"step": torch.tensor(step), "exp_avg": torch.zeros_like(p)} for i, p in enumerate(parts)}
        optimizer = {
            "loss_scaler": LossScaler(),
            "base_optimizer_state": {"state": state, "param_groups": []},
            "single_partition_of_fp32_groups": parts,
            **({} if unstated else {"zero_stage": ZeroStageEnum(stage)}),
            "group_paddings": paddings,
            "partition_count": [world] * len(groups),
            "param_slice_mappings": mappings,
        }
        torch.save({"optimizer_state_dict": optimizer}, tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def _stage_3(
    tag: Path, world: int, step: float, states: dict[str, object], module: Tensors,
    groups: list[OrderedDict[str, Tensor]], frozen: Tensors, buffers: Tensors,
) -> None:  # fmt: skip
    def piece(tensor: Tensor, rank: int) -> Tensor:
        size = -(-tensor.numel() // world)
        own = tensor.reshape(-1)[rank * size : (rank + 1) * size]
        return torch.cat([own, torch.zeros(size - own.numel(), dtype=tensor.dtype)])

    for rank in range(world):
        placeholders = OrderedDict(
            (n, t if n in buffers else torch.empty(0, dtype=torch.bfloat16)) for n, t in module.items()
        )
        fragments = OrderedDict((n, piece(t, rank)) for n, t in frozen.items())
        torch.save(
            {"module": placeholders, "frozen_param_fragments": fragments, **states},
            tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt",
        )
        flats = [torch.cat([piece(t, rank) for t in group.values()]) for group in groups]
        optimizer = {
            "zero_stage": ZeroStageEnum(3),
            "loss_scaler": LossScaler(),
            "partition_count": world,
            "optimizer_state_dict": {"state": {i: {"step": torch.tensor(step)} for i in range(len(flats))}},
            "fp32_flat_groups": flats,
        }
        torch.save({"optimizer_state_dict": optimizer}, tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def universal(folder: Path) -> Tensors:
    """What ds_to_universal makes of a stage-3 checkpoint: a folder of masters, and the model states copied."""
    expected = zero(folder, stage=3)
    tag = folder / "global_step3"
    for path in tag.glob("*optim_states.pt"):
        path.unlink()
    for name, tensor in model()[0].items():
        (tag / "zero" / name).mkdir(parents=True)
        torch.save({"param": tensor}, tag / "zero" / name / "fp32.pt")
    return expected


def dcp(folder: Path, cuts: Mapping[str, tuple[Tensor, list[tuple[tuple[int, ...], tuple[int, ...]]]]]) -> Tensors:
    """A torch.distributed.checkpoint. cuts: name -> (tensor, boxes as (offsets, sizes)). Returns what it must give."""
    folder.mkdir(parents=True)
    entries: dict[str, object] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for number, (name, (tensor, boxes)) in enumerate(cuts.items()):
        file = f"__{number % 2}_0.distcp"
        chunks = []
        for index, (offset, size) in enumerate(boxes):
            place = tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))
            with open(folder / file, "ab") as out:
                start = out.tell()
                torch.save(tensor[place].clone(), out)
                length = out.tell() - start
            chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(size)))
            storage[MetadataIndex(f"model.{name}", torch.Size(offset), index)] = _StorageInfo(file, start, length)
        entries[f"model.{name}"] = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, chunks)
    entries["step"] = BytesStorageMetadata()
    paths: dict[str, tuple[str | int, ...]] = {f"model.{name}": ("model", name) for name in cuts} | {"step": ("step",)}
    metadata = Metadata(entries, planner_data=paths, storage_data=storage)  # type: ignore[arg-type]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return {name: tensor for name, (tensor, _) in cuts.items()}


def small_dcp(folder: Path) -> Tensors:
    """Shards along the first axis, along the second, a grid of both, and an uncut scalar."""
    g = torch.Generator().manual_seed(1)
    rows, columns = torch.randn(5, 4, generator=g), torch.randn(6, 7, generator=g).bfloat16()
    grid, scalar = torch.randn(4, 6, 3, generator=g), torch.tensor(9)
    return dcp(
        folder,
        {
            "rows.w": (rows, [((0, 0), (3, 4)), ((3, 0), (2, 4))]),
            "columns.w": (columns, [((0, 0), (6, 4)), ((0, 4), (6, 3))]),
            "grid.w": (grid, [((a, b, 0), (2, 3, 3)) for a in (0, 2) for b in (0, 3)]),
            "count": (scalar, [((), ())]),
        },
    )


def huggingface(folder: Path) -> Tensors:
    """Two safetensors shards with an index and a tied output that is not stored."""
    g = torch.Generator().manual_seed(2)
    embed, norm = torch.randn(6, 4, generator=g), torch.randn(4, generator=g)
    folder.mkdir(parents=True)
    save_file({"model.embed_tokens.weight": embed}, folder / "model-00001-of-00002.safetensors")
    save_file({"model.norm.weight": norm}, folder / "model-00002-of-00002.safetensors")
    places = {
        "model.embed_tokens.weight": "model-00001-of-00002.safetensors",
        "model.norm.weight": "model-00002-of-00002.safetensors",
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True,
        "vocab_size": 6, "hidden_size": 4,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return {"model.embed_tokens.weight": embed, "model.norm.weight": norm, "lm_head.weight": embed}


def lightning(path: Path) -> Tensors:
    """A single-file Lightning checkpoint."""
    trainable, frozen, buffers, _ = model(3)
    state = OrderedDict((f"net.{n}", t) for n, t in (trainable | frozen | buffers).items())
    torch.save(
        {"epoch": 1, "pytorch-lightning_version": "2.6.6", "state_dict": state, "optimizer_states": [{"state": {}}]},
        path,
    )
    return dict(state)


def state_dict(path: Path, *, legacy: bool = False) -> Tensors:
    """A flat state dict with ties, views and strides, in today's form or that of before torch 1.6."""
    trainable, frozen, buffers, ties = model(4)
    state = OrderedDict(trainable | frozen | buffers)
    state |= {alias: state[kept] for alias, kept in ties.items()}
    wide = torch.arange(24.0).reshape(4, 6)
    state |= {"turned": wide.t(), "corner": wide[1:3, 2:5], "row": wide[2]}
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    return dict(state)


def whisper(path: Path, *, dtype: torch.dtype = torch.float16) -> Tensors:
    """OpenAI's `{"dims", "model_state_dict"}` of a Whisper of width 8."""
    g = torch.Generator().manual_seed(5)
    width, vocabulary = 8, 20

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    state: Tensors = {
        "encoder.positional_embedding": draw(6, width), "encoder.conv1.weight": draw(width, 4, 3),
        "encoder.conv1.bias": draw(width), "encoder.conv2.weight": draw(width, width, 3),
        "encoder.conv2.bias": draw(width),
        "encoder.ln_post.weight": draw(width), "encoder.ln_post.bias": draw(width),
        "decoder.token_embedding.weight": draw(vocabulary, width), "decoder.positional_embedding": draw(5, width),
        "decoder.ln.weight": draw(width), "decoder.ln.bias": draw(width),
    }  # fmt: skip
    for side, kinds in (("encoder", ("attn",)), ("decoder", ("attn", "cross_attn"))):
        block = f"{side}.blocks.0"
        for kind in kinds:
            for part in ("query", "key", "value", "out"):
                state[f"{block}.{kind}.{part}.weight"] = draw(width, width)
                if part != "key":
                    state[f"{block}.{kind}.{part}.bias"] = draw(width)
            state |= {f"{block}.{kind}_ln.{leaf}": draw(width) for leaf in ("weight", "bias")}
        state |= {f"{block}.mlp_ln.{leaf}": draw(width) for leaf in ("weight", "bias")}
        state |= {f"{block}.mlp.0.weight": draw(2 * width, width), f"{block}.mlp.0.bias": draw(2 * width)}
        state |= {f"{block}.mlp.2.weight": draw(width, 2 * width), f"{block}.mlp.2.bias": draw(width)}
    dims = {
        "n_mels": 4, "n_vocab": vocabulary, "n_audio_ctx": 6, "n_audio_state": width, "n_audio_head": 2,
        "n_audio_layer": 1,
        "n_text_ctx": 5, "n_text_state": width, "n_text_head": 2, "n_text_layer": 1,
    }  # fmt: skip
    torch.save({"dims": dims, "model_state_dict": state}, path)
    return state
