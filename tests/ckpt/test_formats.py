"""Foreign checkpoints, one by one: everything they hold comes out bit for bit; what is not whole is refused by name."""

from __future__ import annotations

import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.ckpt import foreign

from thawline.ckpt.convert import convert
from thawline.ckpt.formats.pieces import Planned, TensorInfo, Zeros, read
from thawline.ckpt.source import Source, open_source
from thawline.errors import CheckpointError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32, "F8_E4M3": torch.float8_e4m3fn, "C64": torch.complex64,
}  # fmt: skip


def tensor(source: Source, name: str) -> torch.Tensor:
    """A tensor of a source, as torch's."""
    info = source.info(name)
    data = bytearray(source.read(name))
    dtype = DTYPES[info.dtype]
    if not data:
        return torch.empty(info.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(info.shape)


def agree(path: Path, expected: foreign.Tensors) -> Source:
    """Open and compare; half-precision tensors may be given as they are stored."""
    source = open_source(path)
    assert set(source.names) == set(expected)
    for name, want in expected.items():
        have = tensor(source, name)
        assert have.shape == want.shape, name
        assert torch.equal(have.to(want.dtype), want), name
    return source


def read_all(path: Path) -> None:
    """Open a source and read each of its tensors."""
    with open_source(path) as source:
        for name in source.names:
            source.read(name)


# --- DeepSpeed ---


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_masters_of_every_zero_stage_and_world_size_come_out_bit_for_bit(
    stage: int, world: int, tmp_path: Path
) -> None:
    expected = foreign.zero(tmp_path / "run", stage=stage, world=world)
    source = agree(tmp_path / "run", expected)
    assert source.info("up.weight").origin == "master weights"
    assert source.info("up.weight").dtype == "F32"
    assert source.info("head.weight").tied_to == "embed.weight"
    assert source.info("bn.running_mean").origin == "buffer"
    assert source.info("old.weight").origin == ("frozen fragment" if stage > 1 else "module")


@pytest.mark.parametrize("stage", [2, 3])
def test_what_was_frozen_after_it_had_trained_comes_from_its_master(stage: int, tmp_path: Path) -> None:
    expected = foreign.zero(tmp_path / "run", stage=stage, refrozen="up.")
    source = agree(tmp_path / "run", expected)
    assert source.info("up.weight").origin == source.info("down.weight").origin == "master weights"
    assert source.info("old.weight").origin == "frozen fragment"


@pytest.mark.parametrize("given", ["", "global_step3"], ids=["the folder", "the tag's"])
def test_shards_in_a_trainers_checkpoint_travel_with_the_description_of_the_model(given: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    expected = foreign.zero(folder, stage=2)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    (folder / "tokenizer.json").write_text("{}")
    rounded = {name: tensor.bfloat16() for name, tensor in expected.items() if tensor.is_floating_point()}
    save_file({name: tensor.clone() for name, tensor in rounded.items()}, folder / "model.safetensors")
    source = agree(folder / given, expected)
    assert source.info("up.weight").dtype == "F32"
    assert source.notes[-1].startswith("model.safetensors lies beside the shards and was not read")
    report = convert(folder / given, tmp_path / "hf", to="hf")
    assert report.verified
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "float32"


def test_an_optimizer_of_bf16_that_states_no_stage_is_cut_as_stage_1(tmp_path: Path) -> None:
    expected = foreign.zero(tmp_path / "run", stage=1, world=3, unstated=True)
    source = agree(tmp_path / "run", expected)
    assert source.format == "deepspeed zero-1 (3 ranks)"
    assert source.info("up.weight").dtype == "F32"


@pytest.mark.parametrize("stage", [1, 2])
def test_slices_recorded_in_another_order_than_the_data_are_settled_by_the_module(stage: int, tmp_path: Path) -> None:
    # What DeepSpeed 0.19 writes with round_robin_gradients; its own accessors give pieces of other parameters then.
    agree(tmp_path / "run", foreign.zero(tmp_path / "run", stage=stage, world=3, round_robin=True))


def test_shapes_in_another_order_than_the_data_are_refused(tmp_path: Path) -> None:
    foreign.zero(tmp_path / "run", stage=2)
    path = tmp_path / "run/global_step3/mp_rank_00_model_states.pt"
    states = torch.load(path, weights_only=False)
    first = states["param_shapes"][0]
    states["param_shapes"][0] = type(first)((name, first[name]) for name in reversed(first))
    torch.save(states, path)
    with pytest.raises(
        CheckpointError, match=r"another cut of group 0 .* 'down.weight' does not round to the module's"
    ):
        open_source(tmp_path / "run")


def test_a_dispute_is_settled_by_all_elements_and_not_by_the_first(tmp_path: Path) -> None:
    foreign.zero(tmp_path / "run", stage=2, round_robin=True)
    path = tmp_path / "run/global_step3/mp_rank_00_model_states.pt"
    states = torch.load(path, weights_only=False)
    states["module"]["up.weight"][-1, -1] += 1
    torch.save(states, path)
    with pytest.raises(CheckpointError, match=r"'up.weight' does not round to the module's"):
        open_source(tmp_path / "run")


def test_a_universal_checkpoint_gives_masters_frozen_ones_and_buffers(tmp_path: Path) -> None:
    source = agree(tmp_path / "run", foreign.universal(tmp_path / "run"))
    assert source.format == "deepspeed universal"
    (tmp_path / "run/global_step3/zero/up.bias/fp32.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no file zero/up\.bias/fp32\.pt"):
        open_source(tmp_path / "run")


def test_the_folder_of_one_tag_can_be_given_itself(tmp_path: Path) -> None:
    agree(tmp_path / "run" / "global_step3", foreign.zero(tmp_path / "run", stage=2))


def test_a_missing_latest_is_recovered_if_there_is_one_tag(tmp_path: Path) -> None:
    expected = foreign.zero(tmp_path / "run", stage=1)
    (tmp_path / "run" / "latest").unlink()
    assert "global_step3" in agree(tmp_path / "run", expected).notes[0]


def test_several_tags_without_latest_are_listed_and_one_can_be_asked_for(tmp_path: Path) -> None:
    foreign.zero(tmp_path / "run", stage=1)
    shutil.copytree(tmp_path / "run" / "global_step3", tmp_path / "run" / "global_step6")
    (tmp_path / "run" / "latest").unlink()
    with pytest.raises(CheckpointError, match="global_step3, global_step6"):
        open_source(tmp_path / "run")
    assert len(open_source(tmp_path / "run", tag="global_step6"))


@pytest.mark.parametrize("named", ["../elsewhere", "/etc", "..", "", "a/b", "absent"])
def test_latest_names_a_folder_and_nothing_else(named: str, tmp_path: Path) -> None:
    foreign.zero(tmp_path / "run", stage=1)
    (tmp_path / "run" / "latest").write_text(named)
    with pytest.raises(CheckpointError, match="latest"):
        open_source(tmp_path / "run")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_missing_optimizer_shard_is_named(stage: int, tmp_path: Path) -> None:
    foreign.zero(tmp_path / "run", stage=stage, world=3)
    (tmp_path / "run/global_step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match="rank 1 is missing"):
        open_source(tmp_path / "run")


def test_all_optimizer_shards_missing_does_not_silently_give_half_precision(tmp_path: Path) -> None:
    foreign.zero(tmp_path / "run", stage=2)
    for path in (tmp_path / "run/global_step3").glob("*optim_states.pt"):
        path.unlink()
    with pytest.raises(CheckpointError, match="without any optimizer shard"):
        open_source(tmp_path / "run")


@pytest.mark.parametrize("stage", [2, 3])
def test_shards_of_two_runs_are_refused_by_their_step_counters(stage: int, tmp_path: Path) -> None:
    foreign.zero(tmp_path / "run", stage=stage)
    foreign.zero(tmp_path / "other", stage=stage, step=5.0)
    name = "global_step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(tmp_path / "other" / name, tmp_path / "run" / name)
    with pytest.raises(CheckpointError, match="optimizer steps 5 against 3"):
        open_source(tmp_path / "run")


def test_shards_of_another_run_at_the_same_step_are_refused_by_their_values(tmp_path: Path) -> None:
    foreign.zero(tmp_path / "run", stage=2)
    foreign.zero(tmp_path / "other", stage=2, seed=9)
    for rank in (0, 1):
        name = f"global_step3/bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        shutil.copy(tmp_path / "other" / name, tmp_path / "run" / name)
    with pytest.raises(CheckpointError, match="different runs"):
        open_source(tmp_path / "run")


def test_shards_of_another_world_size_are_refused(tmp_path: Path) -> None:
    foreign.zero(tmp_path / "run", stage=2, world=2)
    foreign.zero(tmp_path / "other", stage=2, world=3)
    name = "global_step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(tmp_path / "other" / name, tmp_path / "run" / name)
    with pytest.raises(CheckpointError, match="partition counts"):
        open_source(tmp_path / "run")


@pytest.mark.parametrize("ranks", [0, -1, 1 << 62, "2", 1.5])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_number_of_ranks_that_cannot_be_is_refused_and_costs_no_memory(
    stage: int, ranks: object, tmp_path: Path
) -> None:
    foreign.zero(tmp_path / "run", stage=stage)
    (shard, *_) = sorted((tmp_path / "run/global_step3").glob("*model_states.pt"))
    state = torch.load(shard, weights_only=True)
    torch.save(state | {"dp_world_size": ranks}, shard)
    with pytest.raises(CheckpointError, match="ranks"):
        open_source(tmp_path / "run")


def test_model_parallel_shards_are_refused_by_name(tmp_path: Path) -> None:
    foreign.zero(tmp_path / "run", stage=2)
    folder = tmp_path / "run/global_step3"
    shutil.copy(folder / "mp_rank_00_model_states.pt", folder / "mp_rank_01_model_states.pt")
    with pytest.raises(CheckpointError, match="mp_rank_01_model_states"):
        open_source(tmp_path / "run")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_flipped_byte_of_the_weights_is_found_by_the_checksum(stage: int, tmp_path: Path) -> None:
    foreign.zero(tmp_path / "run", stage=stage)
    pattern = "mp_rank_00_model*" if stage == 0 else "*rank_1_mp_rank_00_optim*"
    (shard,) = (tmp_path / "run/global_step3").glob(pattern)
    with zipfile.ZipFile(shard) as archive:
        record = max((i for i in archive.infolist() if "/data/" in i.filename), key=lambda i: i.file_size)
    data = bytearray(shard.read_bytes())
    lengths = struct.unpack_from("<HH", data, record.header_offset + 26)
    data[record.header_offset + 30 + sum(lengths) + record.file_size - 2] ^= 0x10
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"CRC-32|rounds to no parameter") as caught:
        read_all(tmp_path / "run")
    assert str(tmp_path) in str(caught.value)


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    foreign.zero(tmp_path / "run", stage=2)
    shard = tmp_path / "run/global_step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shard.rename(tmp_path / "elsewhere.pt")
    shard.symlink_to(tmp_path / "elsewhere.pt")
    with pytest.raises(CheckpointError, match="leads outside"):
        open_source(tmp_path / "run")


# --- torch.distributed.checkpoint ---


def test_shards_along_any_axis_come_out_bit_for_bit(tmp_path: Path) -> None:
    source = agree(tmp_path / "ckpt", foreign.small_dcp(tmp_path / "ckpt"))
    assert source.notes == ("not weights, left out: step (1)",)


def test_chunks_that_overlap_or_leave_a_hole_are_refused(tmp_path: Path) -> None:
    t = torch.zeros(4, 4)
    foreign.dcp(tmp_path / "hole", {"w": (t, [((0, 0), (2, 4))])})
    with pytest.raises(CheckpointError, match="its chunks 8"):
        open_source(tmp_path / "hole")
    foreign.dcp(tmp_path / "double", {"w": (t, [((0, 0), (2, 4)), ((1, 0), (2, 4))])})
    with pytest.raises(CheckpointError, match="overlap"):
        open_source(tmp_path / "double")


def test_a_missing_or_cut_distcp_file_is_named(tmp_path: Path) -> None:
    foreign.small_dcp(tmp_path / "ckpt")
    shard = tmp_path / "ckpt/__1_0.distcp"
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=r"cut short.*'count'|cut short.*'columns"):
        open_source(tmp_path / "ckpt")
    shard.unlink()
    with pytest.raises(CheckpointError, match="is missing") as caught:
        open_source(tmp_path / "ckpt")
    assert caught.value.where.endswith("__1_0.distcp")


# --- Hugging Face ---


def test_shards_by_index_come_with_the_tied_name_that_is_not_stored(tmp_path: Path) -> None:
    source = agree(tmp_path / "hf", foreign.huggingface(tmp_path / "hf"))
    assert source.info("lm_head.weight").tied_to == "model.embed_tokens.weight"


def test_an_untied_configuration_adds_no_name(tmp_path: Path) -> None:
    foreign.huggingface(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    assert "lm_head.weight" not in open_source(tmp_path / "hf")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("../outside.safetensors", "leads outside"),
        ("/etc/passwd", "leads outside"),
        ("model-00001-of-00002.safetensors", "does not hold it"),
        ("absent.safetensors", "is missing"),
        (7, "not a file name"),
    ],
)
def test_an_index_that_lies_is_refused(place: object, message: str, tmp_path: Path) -> None:
    foreign.huggingface(tmp_path / "hf")
    index = tmp_path / "hf/model.safetensors.index.json"
    listing = json.loads(index.read_text())
    listing["weight_map"]["model.norm.weight"] = place
    index.write_text(json.dumps(listing))
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path / "hf")


def test_a_tensor_that_the_index_does_not_list_is_an_error_not_a_loss(tmp_path: Path) -> None:
    foreign.huggingface(tmp_path / "hf")
    index = tmp_path / "hf/model.safetensors.index.json"
    listing = json.loads(index.read_text())
    save_file(
        {"model.norm.weight": torch.ones(4), "extra": torch.ones(1)}, tmp_path / "hf/model-00002-of-00002.safetensors"
    )
    index.write_text(json.dumps(listing))
    with pytest.raises(CheckpointError, match="'extra'"):
        open_source(tmp_path / "hf")


def test_bin_files_and_wenets_folder_called_like_a_file_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "epoch_3.pt"
    folder.mkdir()
    expected = foreign.state_dict(folder / "pytorch_model.bin")
    agree(folder, expected)


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b/snapshots/abc"
    expected = foreign.huggingface(snapshot)
    blobs = tmp_path / "models--a--b/blobs"
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    agree(snapshot, expected)


def test_pieces_whose_number_nobody_states_are_refused_alone_and_together(tmp_path: Path) -> None:
    # As torch.distributed.checkpoint's HuggingFaceStorageWriter(save_distributed=True) names and marks them.
    for rank in (0, 1):
        info = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [2 * rank, 0]}}), "DCP_VERSION": "1.0"}
        path = tmp_path / f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"
        save_file({"w": torch.ones(2, 3)}, path, metadata=info)
    for place in (tmp_path, path):
        with pytest.raises(CheckpointError, match=r"holds pieces of tensors .* a missing one would not show") as caught:
            open_source(place)
        assert "enable_consolidation" in caught.value.fix
    whole = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [0, 0]}})}
    save_file({"w": torch.ones(2, 3)}, tmp_path / "model-00001-of-00001.safetensors", metadata=whole)
    agree(tmp_path / "model-00001-of-00001.safetensors", {"w": torch.ones(2, 3)})


# --- single files ---


@pytest.mark.parametrize("legacy", [False, True])
def test_state_dicts_with_views_strides_and_ties_come_out(legacy: bool, tmp_path: Path) -> None:
    source = agree(tmp_path / "x.pt", foreign.state_dict(tmp_path / "x.pt", legacy=legacy))
    assert source.info("head.weight").tied_to == "embed.weight"


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
def test_every_element_type_comes_out(dtype: torch.dtype, tmp_path: Path) -> None:
    data = (
        torch.arange(0, 24, dtype=torch.uint8).view(dtype) if dtype is not torch.bool else torch.tensor([True, False])
    )
    torch.save({"x": data.clone()}, tmp_path / "x.pt")
    have = tensor(open_source(tmp_path / "x.pt"), "x")
    assert have.dtype == dtype
    assert torch.equal(have.view(torch.uint8), data.contiguous().view(torch.uint8))


def test_lightnings_file_gives_its_state_dict_and_says_what_it_leaves(tmp_path: Path) -> None:
    source = agree(tmp_path / "x.ckpt", foreign.lightning(tmp_path / "x.ckpt"))
    assert source.format == "lightning"
    assert "optimizer_states" in source.notes[0]


def test_averaged_weights_are_given_when_asked_for(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(3)}, "ema": {"w": torch.ones(3)}}, tmp_path / "x.pt")
    assert tensor(open_source(tmp_path / "x.pt"), "w").sum() == 0
    assert tensor(open_source(tmp_path / "x.pt", only="ema"), "w").sum() == 3
    torch.save({"w": torch.zeros(3)}, tmp_path / "y.pt")
    with pytest.raises(CheckpointError, match="no averaged weights"):
        open_source(tmp_path / "y.pt", only="ema")


def test_wenets_directory_gives_final_or_the_tag_that_is_asked_for(tmp_path: Path) -> None:
    for name in ("epoch_0", "epoch_1"):
        foreign.state_dict(tmp_path / f"{name}.pt")
    (tmp_path / "train.yaml").write_text("model: asr_model\n")
    (tmp_path / "final.pt").symlink_to("gone.pt")
    with pytest.raises(CheckpointError, match="epoch_0, epoch_1"):
        open_source(tmp_path)
    assert open_source(tmp_path, tag="epoch_1").format == "wenet (epoch_1.pt)"
    (tmp_path / "final.pt").unlink()
    (tmp_path / "final.pt").symlink_to("epoch_1.pt")
    source = open_source(tmp_path)
    assert source.format == "wenet (final.pt)"
    assert list(source.sidecars) == ["train.yaml"]


def test_a_directory_of_wenet_before_2024_lists_its_numbered_files(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("encoder: conformer\n")
    for epoch in (0, 1):
        expected = foreign.state_dict(tmp_path / f"{epoch}.pt")
    with pytest.raises(CheckpointError, match=r"no final\.pt and several others") as caught:
        open_source(tmp_path)
    assert caught.value.fix == "ask for a tag: 0, 1"
    with open_source(tmp_path, tag="1") as source:
        assert set(source.names) == set(expected)


def test_a_missing_path_is_answered_with_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "final.pt").touch()
    with pytest.raises(CheckpointError, match=r"final\.pt"):
        open_source(tmp_path / "finl.pt")


def test_a_git_lfs_pointer_and_an_empty_file_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (tmp_path / "y.pt").touch()
    for name in ("x.safetensors", "y.pt"):
        with pytest.raises(CheckpointError):
            open_source(tmp_path / name)


def test_an_adapter_without_its_base_is_read_as_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora/adapter_config.json").write_text("{}")
    state = {"base_model.model.q.lora_A.weight": torch.ones(2, 4), "base_model.model.q.lora_B.weight": torch.ones(4, 2)}
    save_file(state, tmp_path / "lora/adapter_model.safetensors")
    assert agree(tmp_path / "lora", state).format == "peft adapter"


def test_a_safetensors_file_is_not_taken_for_an_old_torch_file_by_the_length_of_its_header(tmp_path: Path) -> None:
    for length in (0x280, 0x380, 0x480, 0x580):
        text = json.dumps({"__metadata__": {"note": ""}, "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
        text = text.replace('"note": ""', f'"note": "{"-" * (length - len(text))}"')
        (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text.encode() + bytes(4))
        assert open_source(tmp_path / "x").format == "safetensors"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_old_torch_files_are_known_whatever_their_pickle_protocol(protocol: int, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "x", _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    agree(tmp_path / "x", {"w": torch.ones(3)})


# --- archives made to deceive ---


def rezip(path: Path, change: Callable[[zipfile.ZipFile, zipfile.ZipFile], None]) -> None:
    """Write a torch file's archive again with `change(old, new)`."""
    old = path.with_suffix(".old")
    path.rename(old)
    with zipfile.ZipFile(old) as source, zipfile.ZipFile(path, "w") as target:
        change(source, target)


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    foreign.state_dict(tmp_path / "x.pt")

    def compress(source: zipfile.ZipFile, target: zipfile.ZipFile) -> None:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info), zipfile.ZIP_DEFLATED)

    rezip(tmp_path / "x.pt", compress)
    with pytest.raises(CheckpointError, match="compressed record"):
        open_source(tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_records_of_one_name_are_refused(tmp_path: Path) -> None:
    foreign.state_dict(tmp_path / "x.pt")

    def twice(source: zipfile.ZipFile, target: zipfile.ZipFile) -> None:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
        target.writestr("x/data/0", source.read("x/data/1"))

    rezip(tmp_path / "x.pt", twice)
    with pytest.raises(CheckpointError, match="two records named 'x/data/0'"):
        open_source(tmp_path / "x.pt")


def test_overlapping_records_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(8), "b": torch.ones(8)}, tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        places = {i.filename: i.header_offset for i in archive.infolist()}
    # In the directory, let the second storage's entry lead to the first one's header.
    entry = data.rindex(b"x/data/1")
    struct.pack_into("<L", data, entry - 4, places["x/data/0"])
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"calls itself other|overlapping"):
        open_source(tmp_path / "x.pt")


def test_a_tensor_that_reaches_past_its_record_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(200)}, tmp_path / "x.pt")

    def widen(source: zipfile.ZipFile, target: zipfile.ZipFile) -> None:
        for info in source.infolist():
            data = source.read(info)
            if info.filename.endswith("data.pkl"):
                data = data.replace(b"K\xc8\x85", b"K\xc9\x85")  # the shape says 201
            target.writestr(info.filename, data)

    rezip(tmp_path / "x.pt", widen)
    with pytest.raises(CheckpointError, match="reaches past the end"):
        open_source(tmp_path / "x.pt")


def test_a_view_that_repeats_a_few_bytes_into_terabytes_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(1 << 40)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="without end"):
        open_source(tmp_path / "x.pt")
    torch.save({"w": torch.ones(1).expand(5, 3)}, tmp_path / "y.pt")
    assert tensor(open_source(tmp_path / "y.pt"), "w").sum() == 15


def test_safetensors_headers_that_do_not_cover_the_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(3), "b": torch.ones(2)}, path)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    for old, new in ((b"[0,12]", b"[0,16]"), (b"[12,20]", b"[13,21]"), (b'"shape":[3]', b'"shape":[9]')):
        assert old in data[: 8 + length]
        changed = data[8 : 8 + length].replace(old, new)
        path.write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + length :])
        with pytest.raises(CheckpointError):
            open_source(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match="lists 20 bytes of data; the file has 21"):
        open_source(path)


def test_zeros_stand_for_what_is_absent() -> None:
    planned = Planned(info=TensorInfo(name="b", dtype="F16", shape=(3,)), parts=(Zeros(3),))
    assert bytes(read(planned)) == bytes(6)


# --- real checkpoints of every framework ---


def test_real_files_of_wenet_whisper_and_videochat_are_what_torch_loads(shared: Path) -> None:
    paths = sorted(
        p for p in (shared / "parity").rglob("*.pt*") if "sharded" not in p.parts and p.suffix in (".pt", ".pth")
    )
    assert len(paths) > 20
    for path in paths:
        value = torch.load(path, weights_only=True)
        agree(path, value.get("model_state_dict", value.get("model", value)))


def test_videochats_stages_are_put_over_each_other_by_the_base(shared: Path) -> None:
    folder = shared / "parity/videochat2/mistral_a"
    base = torch.load(folder / "base_vit_qformer.pth", weights_only=True)
    stage = torch.load(folder / "stage2_delta.pth", weights_only=True)["model"]
    source = open_source(folder / "stage2_delta.pth", base=folder / "base_vit_qformer.pth")
    assert set(source.names) == set(base) | set(stage)
    assert torch.equal(tensor(source, "query_tokens"), stage["query_tokens"])
    assert source.info("itm_head.weight").origin == "base"


def _cases(shared: Path, kind: str) -> list[dict[str, object]]:
    cases: list[dict[str, object]] = json.loads((shared / "parity/sharded/manifest.json").read_text())[kind]
    return cases


def test_every_real_checkpoint_holds_what_the_live_model_held(shared: Path) -> None:
    root = shared / "parity/sharded"
    cases = _cases(shared, "checkpoints")
    assert len(cases) == 19
    for case in cases:
        source = open_source(root / str(case["path"]))
        expected = open_source(root / str(case["expected"]))
        assert set(source.names) == set(expected.names), case["name"]
        for name in expected.names:
            want = tensor(expected, name)
            assert torch.equal(tensor(source, name).to(want.dtype), want), (case["name"], name)


def test_every_damaged_checkpoint_is_refused_by_file_and_cause(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = shared / "parity/sharded"
    bases = {case["name"]: case for case in _cases(shared, "checkpoints")}
    for case in _cases(shared, "corrupt"):
        copy = tmp_path / str(case["name"])
        base = root / str(bases[case["base"]]["path"])
        copy.mkdir()
        for path in base.rglob("*") if base.is_dir() else [base]:
            if path.is_file():
                target = copy / (path.relative_to(base) if base.is_dir() else path.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        for name in case["deleted"]:  # type: ignore[attr-defined]
            (copy / name).unlink()
        for name in case["replaced"]:  # type: ignore[attr-defined]
            shutil.copyfile(root / str(case["overlay"]) / name, copy / name)
        if case["name"] == "z1_no_latest":
            read_all(copy)
            continue
        with pytest.raises(CheckpointError) as caught:
            read_all(copy)
        assert str(copy) in str(caught.value)
        assert caught.value.fix
    assert not os.path.lexists(tmp_path / "pickle_code_ran")


@pytest.mark.parametrize("stage", [0, 2])
def test_weights_of_a_run_that_diverged_are_not_taken_for_those_of_another(
    stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = foreign.model

    def diverged(seed: int = 0) -> tuple[foreign.Tensors, foreign.Tensors, foreign.Tensors, dict[str, str]]:
        trainable, *others = sound(seed)
        trainable["up.weight"].fill_(float("nan"))  # as bf16 it has other bits than the widened and rounded one
        return trainable, *others

    monkeypatch.setattr(foreign, "model", diverged)
    foreign.zero(tmp_path / "run", stage=stage)
    with open_source(tmp_path / "run") as source:
        assert torch.frombuffer(bytearray(source.read("up.weight")), dtype=torch.float32).isnan().all()
