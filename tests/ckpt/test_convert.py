"""Conversion: bit for bit, whole or not at all, verified, in bounded memory, the source untouched."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.ckpt import foreign

from thawline.ckpt import store, targets
from thawline.ckpt.convert import convert, write
from thawline.ckpt.delta import BaseRef, apply, delta_of, read_delta, write_delta
from thawline.ckpt.engine import Engine
from thawline.ckpt.formats import whisper_names
from thawline.ckpt.formats.casting import cast
from thawline.ckpt.rename import Rename, read_rename_table
from thawline.ckpt.source import Source, open_source
from thawline.core.digest import digest_bytes, digest_tensor, fingerprint
from thawline.errors import BaseMismatch, CheckpointError, RecipeError


def tree(path: Path) -> dict[str, str]:
    """File -> digest of its bytes."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def same(have: foreign.Tensors, want: foreign.Tensors) -> None:
    assert set(have) == set(want)
    for name, tensor in want.items():
        assert have[name].dtype == tensor.dtype, name
        assert have[name].shape == tensor.shape, name
        assert torch.equal(have[name].contiguous().view(-1), tensor.contiguous().view(-1)), name


# --- targets ---


def test_safetensors_are_read_by_the_reference_reader_and_are_aligned(tmp_path: Path) -> None:
    expected = foreign.zero(tmp_path / "run", stage=2)
    report = convert(tmp_path / "run", tmp_path / "m.safetensors", to="safetensors")
    same(load_file(tmp_path / "m.safetensors"), expected)
    assert report.verified
    assert report.tensors == len(expected)
    assert report.bytes == sum(t.numel() * t.element_size() for t in expected.values())
    assert report.tied == {"head.weight": "embed.weight"}
    assert report.origins["old.weight"] == "frozen fragment"
    assert report.dtype_changes == {"old.weight": "BF16 -> F32", "old.bias": "BF16 -> F32"}
    assert report.fingerprint == fingerprint({name: digest_tensor(t) for name, t in expected.items()})
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert json.loads(file.metadata()["thawline.tied"]) == {"head.weight": "embed.weight"}
    assert "tied names" in report.table()
    json.dumps(report.to_json())


def test_torch_files_load_with_weights_only_and_tie_again(tmp_path: Path) -> None:
    expected = foreign.zero(tmp_path / "run", stage=3)
    convert(tmp_path / "run", tmp_path / "m.pt", to="torch")
    for mmap in (False, True):
        state = torch.load(tmp_path / "m.pt", weights_only=True, mmap=mmap)
        same(state, expected)
        assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    with zipfile.ZipFile(tmp_path / "m.pt") as archive:
        assert archive.testzip() is None


def test_views_and_strides_are_written_dense(tmp_path: Path) -> None:
    expected = foreign.state_dict(tmp_path / "x.pt")
    for to, name in (("torch", "m.pt"), ("safetensors", "m.safetensors")):
        convert(tmp_path / "x.pt", tmp_path / name, to=to)
    same(torch.load(tmp_path / "m.pt", weights_only=True), expected)
    same(load_file(tmp_path / "m.safetensors"), expected)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_element_types_without_a_storage_class_are_written_for_torch(dtype: torch.dtype, tmp_path: Path) -> None:
    data = torch.arange(16, dtype=torch.uint8).view(dtype)
    torch.save({"x": data}, tmp_path / "x.pt")
    convert(tmp_path / "x.pt", tmp_path / "m.pt", to="torch")
    have = torch.load(tmp_path / "m.pt", weights_only=True)["x"]
    assert have.dtype == dtype
    assert torch.equal(have.view(torch.uint8), data.view(torch.uint8))


def test_empty_and_scalar_tensors_survive_every_target(tmp_path: Path) -> None:
    state = {"none": torch.empty(0, 3), "one": torch.tensor(2.5), "w": torch.ones(2)}
    torch.save(state, tmp_path / "x.pt")
    for to, name in (("torch", "m.pt"), ("safetensors", "m.safetensors"), ("hf", "m")):
        convert(tmp_path / "x.pt", tmp_path / name, to=to)
        source = open_source(tmp_path / name)
        assert source.info("none").shape == (0, 3)
        assert source.info("one").shape == ()
        assert bytes(source.read("one")) == bytes(state["one"].numpy().tobytes())


def test_huggingface_folders_are_sharded_indexed_and_keep_their_configuration(tmp_path: Path) -> None:
    expected = foreign.huggingface(tmp_path / "hf")
    (tmp_path / "hf/tokenizer.json").write_text("{}")
    report = convert(tmp_path / "hf", tmp_path / "out", to="hf", dtype="bf16", max_shard_bytes=40)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    assert "lm_head.weight" not in json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert report.tensors == 3
    source = open_source(tmp_path / "out")
    assert bytes(source.read("lm_head.weight")) == bytes(
        expected["lm_head.weight"].bfloat16().view(torch.uint8).numpy().tobytes()
    )


def test_a_configuration_that_contradicts_the_tensors_stops_the_export(tmp_path: Path) -> None:
    foreign.huggingface(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text()) | {"vocab_size": 7}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"shape \(6, 4\), the configuration says \(7, 4\)"):
        convert(tmp_path / "hf", tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


def test_wenets_configuration_travels_with_the_weights(tmp_path: Path) -> None:
    exp = tmp_path / "exp"
    foreign.zero(exp, stage=2)
    (exp / "train.yaml").write_text("model: asr_model\n")
    convert(exp, tmp_path / "final.pt", to="wenet")
    assert (tmp_path / "final.yaml").read_text() == "model: asr_model\n"
    convert(exp, tmp_path / "model", to="wenet")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["final.pt", "train.yaml"]
    assert open_source(tmp_path / "model").format == "wenet (final.pt)"


# --- Whisper ---


def test_whisper_goes_round_through_all_three_spellings_bit_for_bit(tmp_path: Path) -> None:
    state = foreign.whisper(tmp_path / "openai.pt")
    convert(tmp_path / "openai.pt", tmp_path / "hf", to="hf")
    convert(tmp_path / "hf", tmp_path / "wenet.pt", to="wenet")
    (tmp_path / "wenet.yaml").write_text("encoder_conf: {attention_heads: 2}\ndecoder_conf: {attention_heads: 2}\n")
    convert(tmp_path / "wenet.pt", tmp_path / "back.pt", to="whisper")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    same(back["model_state_dict"], state)
    assert back["dims"] == torch.load(tmp_path / "openai.pt", weights_only=True)["dims"]


def test_wenets_whisper_has_a_zero_output_bias_and_a_tied_output(tmp_path: Path) -> None:
    foreign.whisper(tmp_path / "openai.pt")
    convert(tmp_path / "openai.pt", tmp_path / "wenet.pt", to="wenet", dtype="fp32")
    state = torch.load(tmp_path / "wenet.pt", weights_only=True)
    assert torch.equal(state["decoder.output_layer.bias"], torch.zeros(20))
    assert state["decoder.output_layer.weight"].data_ptr() == state["decoder.embed.0.weight"].data_ptr()
    assert state["encoder.embed.pos_enc.pe"].shape == (1, 6, 8)


def test_what_openais_whisper_cannot_hold_is_refused_unless_it_changes_nothing(tmp_path: Path) -> None:
    foreign.whisper(tmp_path / "openai.pt")
    convert(tmp_path / "openai.pt", tmp_path / "w.pt", to="wenet", dtype="fp32")
    (tmp_path / "w.yaml").write_text("encoder_conf: {attention_heads: 2}\ndecoder_conf: {attention_heads: 2}\n")
    state = torch.load(tmp_path / "w.pt", weights_only=True)
    torch.save(state | {"ctc.ctc_lo.weight": torch.ones(20, 8), "ctc.ctc_lo.bias": torch.ones(20)}, tmp_path / "w.pt")
    report = convert(tmp_path / "w.pt", tmp_path / "x.pt", to="whisper")
    assert report.dropped == ("ctc.ctc_lo.weight", "ctc.ctc_lo.bias")
    torch.save(state | {"decoder.output_layer.bias": torch.ones(20)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="is not zero"):
        convert(tmp_path / "w.pt", tmp_path / "y.pt", to="whisper")
    torch.save(state | {"decoder.output_layer.weight": torch.ones(20, 8)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="not the embedding any more"):
        convert(tmp_path / "w.pt", tmp_path / "y.pt", to="whisper")
    torch.save(state | {"encoder.adapter.weight": torch.ones(2)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="no counterpart"):
        convert(tmp_path / "w.pt", tmp_path / "y.pt", to="whisper")


def test_a_model_that_is_no_whisper_is_not_written_as_one(tmp_path: Path) -> None:
    foreign.state_dict(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is no Whisper"):
        convert(tmp_path / "x.pt", tmp_path / "y.pt", to="whisper")


def test_the_table_of_names_is_one_to_one() -> None:
    for column in range(3):
        names = [row[column] for row in whisper_names.ROWS]
        assert len(set(names)) == len(names)
    for row in whisper_names.ROWS:
        for here, source in enumerate(whisper_names.SPELLINGS):
            for there, target in enumerate(whisper_names.SPELLINGS):
                name = row[here].replace("{i}", "17")
                assert whisper_names.translate(name, source, target) == row[there].replace("{i}", "17")


def test_huggingfaces_own_whisper_has_exactly_the_names_of_the_table() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        vocab_size=20, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_source_positions=6,
        max_target_positions=5, num_mel_bins=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    names = set(transformers.WhisperForConditionalGeneration(config).state_dict())
    table = {row[2].replace("{i}", "0") for row in whisper_names.ROWS} | {whisper_names.TIED["huggingface"]}
    assert names == table


def test_huggingface_loads_what_was_made_from_openais_file(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    state = foreign.whisper(tmp_path / "openai.pt", dtype=torch.float32)
    convert(tmp_path / "openai.pt", tmp_path / "hf", to="hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    loaded = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**config))
    weights = load_file(tmp_path / "hf/model.safetensors")
    result = loaded.load_state_dict(weights, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["proj_out.weight"], [])
    loaded.tie_weights()
    assert torch.equal(loaded.proj_out.weight, state["decoder.token_embedding.weight"])


def test_openais_file_gives_what_wenets_own_converter_gives(shared: Path, tmp_path: Path) -> None:
    folder = shared / "parity/wenet/whisper_from_openai"
    convert(folder / "openai.pt", tmp_path / "final.pt", to="wenet", dtype="fp32")
    have = torch.load(tmp_path / "final.pt", weights_only=True)
    want = torch.load(folder / "final.pt", weights_only=True)
    added = {"decoder.output_layer.weight", "decoder.output_layer.bias"}
    assert set(have) == set(want) | added
    for name, tensor in want.items():
        assert torch.equal(have[name], tensor), name
    convert(tmp_path / "final.pt", tmp_path / "back.pt", to="whisper", dtype="fp16")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    same(back["model_state_dict"], torch.load(folder / "openai.pt", weights_only=True)["model_state_dict"])


# --- element types ---


@pytest.mark.parametrize("have", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("want", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_casting_gives_torchs_bits(have: torch.dtype, want: torch.dtype) -> None:
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), (1 << 31) - 1, (200_000,), generator=g, dtype=torch.int64).to(torch.int32)
    special = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, 65504.0, 65520.0, 1e-8, 6e-8, 3.4e38, 1.0039062, 1.0117188]
    )
    values = torch.cat([bits.view(torch.float32), special]).to(have)
    data = values.view(torch.uint8).numpy().tobytes()
    raw = torch.frombuffer(bytearray(cast(data, names[have], names[want])), dtype=want)
    reference = values.to(want)
    nan = torch.isnan(reference)
    assert torch.equal(torch.isnan(raw), nan)
    assert torch.equal(raw[~nan].view(torch.uint8), reference[~nan].view(torch.uint8))


def test_values_too_large_for_the_element_type_are_an_error_with_their_name(tmp_path: Path) -> None:
    torch.save({"big": torch.tensor([1e6, 2.0])}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="1 values of 'big' are too large for F16"):
        convert(tmp_path / "x.pt", tmp_path / "y.pt", to="torch", dtype="fp16")
    assert not (tmp_path / "y.pt").exists()
    assert convert(tmp_path / "x.pt", tmp_path / "y.pt", to="torch", dtype="bf16").verified


def test_integers_and_booleans_keep_their_element_type(tmp_path: Path) -> None:
    foreign.state_dict(tmp_path / "x.pt")
    convert(tmp_path / "x.pt", tmp_path / "y.safetensors", to="safetensors", dtype="bf16")
    have = load_file(tmp_path / "y.safetensors")
    assert have["mask"].dtype == torch.bool
    assert have["bn.num_batches_tracked"].dtype == torch.int64
    assert have["up.weight"].dtype == torch.bfloat16


def test_an_unknown_element_type_or_target_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    foreign.state_dict(tmp_path / "x.pt")
    with pytest.raises(RecipeError, match="fp32, bf16"):
        convert(tmp_path / "x.pt", tmp_path / "y", to="torch", dtype="int4")
    with pytest.raises(RecipeError, match="safetensors, torch"):
        convert(tmp_path / "x.pt", tmp_path / "y", to="onnx")


# --- names ---


def test_names_are_changed_by_a_mapping_with_prefixes_or_by_patterns(tmp_path: Path) -> None:
    state = foreign.lightning(tmp_path / "x.ckpt")
    convert(tmp_path / "x.ckpt", tmp_path / "a.safetensors", to="safetensors", rename={"net.": "", "net.mask": "m"})
    convert(
        tmp_path / "x.ckpt", tmp_path / "b.safetensors", to="safetensors", rename=[(r"^net\.", ""), (r"^mask$", "m")]
    )
    want = {"m" if n == "net.mask" else n.removeprefix("net.") for n in state}
    assert set(load_file(tmp_path / "a.safetensors")) == want == set(load_file(tmp_path / "b.safetensors"))


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"nte.": ""}, "changes none"),
        ([("net.up.weight", "x"), ("net.down.weight", "x")], "2 tensors the name 'x'"),
        ([("(", "x")], "no regular expression"),
        ([("net", r"\9")], "no regular expression and replacement"),
        ({"net.up.weight": ""}, "'net.up.weight' the name ''"),
        ({"net.up.weight": "\ud800"}, "'net.up.weight' the name"),
    ],
)
def test_a_table_of_names_that_cannot_be_meant_is_refused(rename: Rename, message: str, tmp_path: Path) -> None:
    foreign.lightning(tmp_path / "x.ckpt")
    with pytest.raises(RecipeError, match=message):
        convert(tmp_path / "x.ckpt", tmp_path / "y.pt", to="torch", rename=rename)
    assert not (tmp_path / "y.pt").exists()


def test_tables_are_read_from_json_and_yaml(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"net.": ""}')
    (tmp_path / "b.yaml").write_text("- [^net\\., '']\n")
    assert read_rename_table(tmp_path / "a.json") == {"net.": ""}
    assert read_rename_table(tmp_path / "b.yaml") == [("^net\\.", "")]
    (tmp_path / "c.json").write_text("3")
    with pytest.raises(RecipeError, match="neither a mapping"):
        read_rename_table(tmp_path / "c.json")


# --- base and delta ---


def test_what_a_checkpoint_leaves_out_comes_from_the_base(tmp_path: Path) -> None:
    expected = foreign.zero(tmp_path / "run", stage=2, exclude=True)
    _, frozen, _, _ = foreign.model()
    save_file(frozen | {"up.bias": torch.zeros(11)}, tmp_path / "base.safetensors")
    report = convert(tmp_path / "run", tmp_path / "m.safetensors", to="safetensors", base=tmp_path / "base.safetensors")
    same(load_file(tmp_path / "m.safetensors"), expected | {n: t.float() for n, t in frozen.items()})
    assert report.origins["old.weight"] == "base"
    assert report.origins["up.bias"] == "master weights"


def test_a_base_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    foreign.zero(tmp_path / "run", stage=2)
    save_file({"other": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(BaseMismatch, match="shares no tensor name"):
        convert(tmp_path / "run", tmp_path / "m.pt", to="torch", base=tmp_path / "a.safetensors")
    save_file({"up.weight": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(BaseMismatch, match=r"'up.weight' is \(11, 5\), there \(1,\)"):
        convert(tmp_path / "run", tmp_path / "m.pt", to="torch", base=tmp_path / "b.safetensors")


def test_our_delta_is_put_over_its_base_and_only_over_that(tmp_path: Path) -> None:
    base = foreign.state_dict(tmp_path / "base.pt")
    trained = {n: t.clone() for n, t in base.items()} | {"up.bias": torch.full((11,), 3.0)}
    write_delta(tmp_path / "delta.safetensors", delta_of(BaseRef.of(base, path="base.pt"), trained))
    with pytest.raises(CheckpointError, match="is a delta"):
        convert(tmp_path / "delta.safetensors", tmp_path / "m.pt", to="torch")
    report = convert(tmp_path / "delta.safetensors", tmp_path / "m.pt", to="torch", base=tmp_path / "base.pt")
    same(torch.load(tmp_path / "m.pt", weights_only=True), trained)
    assert report.origins["up.bias"] == "delta"
    torch.save(base | {"down.weight": torch.zeros(5, 11)}, tmp_path / "wrong.pt")
    with pytest.raises(BaseMismatch, match=r"(?s)made over.*given.*1 of \d+ tensors differ, first: 'down.weight'"):
        convert(tmp_path / "delta.safetensors", tmp_path / "n.pt", to="torch", base=tmp_path / "wrong.pt")


def test_a_delta_over_a_base_kept_in_half_precision_finds_it(tmp_path: Path) -> None:
    half = {n: t.half() for n, t in foreign.model()[0].items()}
    torch.save(half, tmp_path / "base.pt")
    full = {n: t.float() for n, t in half.items()}
    trained = full | {"up.bias": torch.ones(11)}
    write_delta(tmp_path / "delta.safetensors", delta_of(BaseRef.of(full), trained))
    convert(tmp_path / "delta.safetensors", tmp_path / "m.safetensors", to="safetensors", base=tmp_path / "base.pt")
    same(load_file(tmp_path / "m.safetensors"), trained)


def test_a_tensor_that_the_run_made_anew_in_another_shape_need_not_be_in_the_base(tmp_path: Path) -> None:
    """A run with other units begins by resizing the base's head; what its delta holds whole needs no base."""
    encoder, old, resized = torch.ones(3), torch.zeros(4, 2), torch.zeros(6, 2)
    torch.save({"encoder": encoder, "head": old}, tmp_path / "base.pt")
    begun = BaseRef.of({"encoder": encoder, "head": resized})
    write_delta(tmp_path / "d.safetensors", delta_of(begun, {"encoder": encoder, "head": resized + 1}))
    convert(tmp_path / "d.safetensors", tmp_path / "full.safetensors", to="safetensors", base=tmp_path / "base.pt")
    same(load_file(tmp_path / "full.safetensors"), {"encoder": encoder, "head": resized + 1})
    write_delta(tmp_path / "e.safetensors", delta_of(begun, {"encoder": encoder + 1, "head": resized}))
    with pytest.raises(BaseMismatch, match=r"1 of 2 tensors differ, first: 'head'"):
        convert(tmp_path / "e.safetensors", tmp_path / "x", to="safetensors", base=tmp_path / "base.pt")


def test_the_difference_of_two_checkpoints_is_a_delta_that_our_reader_applies(tmp_path: Path) -> None:
    base = {n: t.float() if t.is_floating_point() else t for n, t in foreign.state_dict(tmp_path / "base.pt").items()}
    torch.save(base, tmp_path / "base.pt")
    trained = {n: t.clone() for n, t in base.items()} | {"up.bias": torch.ones(11), "new": torch.arange(3)}
    trained["embed.weight"] = trained["head.weight"] = torch.full((7, 5), 2.0)
    del trained["turned"]
    torch.save(trained, tmp_path / "new.pt")
    convert(tmp_path / "new.pt", tmp_path / "delta.safetensors", to="delta", base=tmp_path / "base.pt")
    delta = read_delta(tmp_path / "delta.safetensors")
    assert set(delta.tensors) == {"up.bias", "embed.weight", "head.weight", "new"}
    assert delta.removed == ("turned",)
    same(dict(apply(base, delta)), trained)
    convert(tmp_path / "delta.safetensors", tmp_path / "m.pt", to="torch", base=tmp_path / "base.pt")
    same(torch.load(tmp_path / "m.pt", weights_only=True), trained)


# --- whole or not at all ---


def test_an_existing_target_needs_force_and_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    foreign.state_dict(tmp_path / "x.pt")
    (tmp_path / "y.safetensors").write_text("precious")
    with pytest.raises(CheckpointError, match="exists already"):
        convert(tmp_path / "x.pt", tmp_path / "y.safetensors", to="safetensors")
    assert (tmp_path / "y.safetensors").read_text() == "precious"
    torch.save({"big": torch.tensor([1e6])}, tmp_path / "big.pt")
    with pytest.raises(CheckpointError):
        convert(tmp_path / "big.pt", tmp_path / "y.safetensors", to="safetensors", dtype="fp16", force=True)
    assert (tmp_path / "y.safetensors").read_text() == "precious"
    convert(tmp_path / "x.pt", tmp_path / "y.safetensors", to="safetensors", force=True)
    assert len(load_file(tmp_path / "y.safetensors")) > 3


@pytest.mark.parametrize("target", ["run", "run/out.safetensors", "run/global_step3/x", "link/x", "."])
def test_a_target_in_around_or_on_the_source_is_refused(target: str, tmp_path: Path) -> None:
    foreign.zero(tmp_path / "run", stage=1)
    (tmp_path / "link").symlink_to("run")
    before = tree(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"would replace|lies inside|contains"):
        convert(tmp_path / "run", tmp_path / target, to="safetensors", force=True)
    assert tree(tmp_path / "run") == before


def test_a_result_that_reads_back_differently_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign.state_dict(tmp_path / "x.pt")

    class Failing(store.FileSystem):
        def write_at(self, descriptor: int, data: store.Buffer, place: int) -> int:
            altered = bytes(data[:-1]) + bytes([data[-1] ^ 1]) if len(data) == 140 else data
            return super().write_at(descriptor, altered, place)

    monkeypatch.setattr(store, "SYSTEM", Failing())
    for to in ("torch", "safetensors"):
        with pytest.raises(CheckpointError, match=r"reading the result again gives|is altered"):
            convert(tmp_path / "x.pt", tmp_path / "y", to=to)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pt"]


def test_a_source_that_is_written_meanwhile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign.state_dict(tmp_path / "x.pt")
    honest = targets.to_torch

    def meddle(*args: object) -> list[Path]:
        os.utime(tmp_path / "x.pt", ns=(1, 1))
        return honest(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(targets, "to_torch", meddle)
    with pytest.raises(CheckpointError, match="was written to while"):
        convert(tmp_path / "x.pt", tmp_path / "y.pt", to="torch")
    assert not (tmp_path / "y.pt").exists()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(300_000)}, tmp_path / "x.pt")
    code = (
        "import resource, signal, sys\nfrom thawline.ckpt.convert import convert\n"
        "from thawline.errors import CheckpointError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))\n"
        "try:\n    convert(sys.argv[1], sys.argv[2], to='safetensors')\n"
        "except CheckpointError as exc:\n    print(exc)\n    sys.exit(exc.exit_code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "x.pt", tmp_path / "y"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 4, done.stderr
    assert "cannot write" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pt"]


@pytest.mark.long
def test_killed_at_any_moment_the_target_is_absent_or_whole_and_the_source_untouched(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    torch.save({f"w{i}": torch.randn(200_000, generator=g) for i in range(40)}, tmp_path / "x.pt")
    before = tree(tmp_path / "x.pt")
    code = (
        "import sys\nfrom thawline.ckpt.convert import convert\nprint('go', flush=True)\n"
        "convert(sys.argv[1], sys.argv[2], to='safetensors')"
    )
    seen = set()
    for delay_ms in (0, 5, 10, 20, 30, 45, 60, 90, 140, 250, 600):
        target = tmp_path / "y.safetensors"
        target.unlink(missing_ok=True)
        child = subprocess.Popen([sys.executable, "-c", code, tmp_path / "x.pt", target], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(delay_ms / 1000)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if target.exists():
            same(load_file(target), torch.load(tmp_path / "x.pt", weights_only=True))
        seen.add(target.exists())
        assert tree(tmp_path / "x.pt") == before
    assert False in seen
    # What the killed ones left is hidden, and the next conversion removes it.
    convert(tmp_path / "x.pt", tmp_path / "y.safetensors", to="safetensors", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.pt", "y.safetensors"]


# --- cost ---


def test_the_whole_path_to_safetensors_does_not_import_torch(tmp_path: Path) -> None:
    foreign.zero(tmp_path / "run", stage=2)
    code = (
        "import sys\nfrom thawline.ckpt.convert import convert\nfrom thawline.ckpt.verify import verify\n"
        "convert(sys.argv[1], sys.argv[2], to='safetensors')\nassert verify(sys.argv[2]).ok\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "run", tmp_path / "m.safetensors"], check=True)


def sparse(path: Path, tensors: int, nbytes: int) -> None:
    """A safetensors file of fp32 zeros that takes no room on the disk."""
    from thawline.ckpt.formats.pieces import TensorInfo
    from thawline.ckpt.formats.safetensors_header import make_header

    infos = [TensorInfo(name=f"w{i}", dtype="F32", shape=(nbytes // 4,)) for i in range(tensors)]
    head, places = make_header(infos, {})
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(max(places.values()) + nbytes)


WATCHED = """
import re, sys, threading, time
from thawline.ckpt.convert import convert
peak = {"RssAnon": 0, "VmRSS": 0}
done = False
def watch():
    while not done:
        text = open("/proc/self/status").read()
        for key in peak:
            peak[key] = max(peak[key], int(re.search(key + r":\\s+(\\d+)", text)[1]))
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
try:
    convert(sys.argv[1], sys.argv[2], to=sys.argv[3], dtype="bf16")
finally:
    done = True
    thread.join()
print(*peak.values())
"""


def peaks(source: Path, target: Path, to: str) -> tuple[int, int]:
    """Greatest anonymous and whole resident memory of a conversion to half precision, in bytes."""
    command = [sys.executable, "-c", WATCHED, source, target, to]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    anonymous, resident = (int(word) * 1024 for word in done.stdout.split())
    return anonymous, resident


@pytest.mark.long
@pytest.mark.parametrize("to", ["safetensors", "torch"])
def test_memory_does_not_grow_with_the_checkpoint(to: str, tmp_path: Path) -> None:
    sparse(tmp_path / "x.safetensors", 6, 256 << 20)
    anonymous, _ = peaks(tmp_path / "x.safetensors", tmp_path / "y", to)
    assert anonymous < 100_000_000


@pytest.mark.storm
@pytest.mark.parametrize("to", ["safetensors", "torch"])
def test_thirty_gigabytes_are_converted_within_half_a_gigabyte_of_memory(to: str, tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 20_000_000_000:
        pytest.skip("the result takes 15 GB, and less than 20 are free here")
    target = tmp_path / "y"
    try:
        sparse(tmp_path / "x.safetensors", 30, 1_000_000_000)
        anonymous, resident = peaks(tmp_path / "x.safetensors", target, to)
        assert target.stat().st_size > 15_000_000_000
    finally:
        target.unlink(missing_ok=True)
        (tmp_path / "x.safetensors").unlink(missing_ok=True)
    assert anonymous < 100_000_000
    assert resident < 500_000_000  # with the pages of the maps that happen to be in memory


def test_digests_given_a_piece_at_a_time_are_those_of_the_whole(tmp_path: Path) -> None:
    foreign.state_dict(tmp_path / "x.pt")
    with open_source(tmp_path / "x.pt") as source:
        for info in source.infos:
            assert source.digest(info.name) == digest_bytes(info.dtype, info.shape, source.read(info.name))


# --- real checkpoints ---


@pytest.mark.parametrize(("to", "suffix"), [("safetensors", ".safetensors"), ("torch", ".pt"), ("hf", "")])
def test_every_real_checkpoint_converts_bit_for_bit(to: str, suffix: str, shared: Path, tmp_path: Path) -> None:
    root = shared / "parity/sharded"
    for case in json.loads((root / "manifest.json").read_text())["checkpoints"]:
        source, target = root / case["path"], tmp_path / f"{case['name']}{suffix}"
        before = tree(source)
        report = convert(source, target, to=to, dtype="fp32")
        assert report.verified
        assert tree(source) == before
        with open_source(target) as have, open_source(root / case["expected"]) as want:
            assert set(have.names) == set(want.names), case["name"]
            assert len(want) == case["tensors"]
            for name in want.names:
                assert have.info(name).dtype == want.info(name).dtype, (case["name"], name)
                assert have.info(name).shape == want.info(name).shape, (case["name"], name)
                assert have.read(name) == want.read(name), (case["name"], name)


def test_a_report_is_the_same_but_for_the_time_when_made_twice(tmp_path: Path) -> None:
    foreign.zero(tmp_path / "run", stage=2)
    convert(tmp_path / "run", tmp_path / "a.safetensors", to="safetensors")
    convert(tmp_path / "run", tmp_path / "b.safetensors", to="safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert re.fullmatch(r"[0-9a-f]{64}", convert(tmp_path / "run", tmp_path / "c.pt", to="torch").fingerprint)


def test_a_delta_may_be_the_base_of_the_one_made_over_it(tmp_path: Path) -> None:
    base = foreign.state_dict(tmp_path / "0.pt")
    states = [base, base | {"up.bias": torch.full((11,), 3.0)}]
    states.append(states[1] | {"down.weight": torch.ones_like(base["down.weight"])})
    for number in (1, 2):
        torch.save(states[number], tmp_path / f"{number}.pt")
        convert(
            tmp_path / f"{number}.pt",
            tmp_path / f"{number}.safetensors",
            to="delta",
            base=tmp_path / f"{number - 1}.pt",
        )
    convert(tmp_path / "2.safetensors", tmp_path / "m.pt", to="torch", base=tmp_path / "1.safetensors")
    same(torch.load(tmp_path / "m.pt", weights_only=True), states[2])
    # And the base of one that is made: what it stands for, not the few tensors in the file.
    convert(tmp_path / "2.pt", tmp_path / "again.safetensors", to="delta", base=tmp_path / "1.safetensors")
    convert(tmp_path / "again.safetensors", tmp_path / "o.pt", to="torch", base=tmp_path / "1.pt")
    same(torch.load(tmp_path / "o.pt", weights_only=True), states[2])
    with pytest.raises(BaseMismatch, match="belongs to another base"):
        convert(tmp_path / "1.safetensors", tmp_path / "n.pt", to="torch", base=tmp_path / "2.safetensors")


def test_what_a_delta_takes_from_its_base_under_a_new_name_is_not_lost_without_it(tmp_path: Path) -> None:
    base = {"w": torch.ones(2)}
    delta = delta_of(BaseRef.of(base), {"inner.w": torch.ones(2), "new": torch.zeros(1)})
    write_delta(tmp_path / "d.safetensors", delta)
    with pytest.raises(CheckpointError, match="1 tensors are in its base only"):
        convert(tmp_path / "d.safetensors", tmp_path / "m.pt", to="torch")


def test_a_tag_that_chooses_nothing_and_averages_that_are_not_there_are_refused(tmp_path: Path) -> None:
    state = foreign.state_dict(tmp_path / "x.pt")
    foreign.huggingface(tmp_path / "hf")
    foreign.small_dcp(tmp_path / "dcp")
    write_delta(tmp_path / "d.safetensors", delta_of(BaseRef.of({"w": torch.ones(1)}), {"w": torch.zeros(1)}))
    (tmp_path / "run/checkpoints/step-00000010").mkdir(parents=True)
    for name, message in (
        ("x.pt", "is one checkpoint"),
        ("hf", "is one checkpoint"),
        ("dcp", "no first key 'step-00000020'"),
        ("run", "has no checkpoint 'step-00000020'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert(tmp_path / name, tmp_path / "m.pt", to="torch", tag="step-00000020")
    with pytest.raises(CheckpointError, match="is a delta, which keeps no averaged weights"):
        convert(tmp_path / "d.safetensors", tmp_path / "m.pt", to="torch", only="ema")
    # A folder of somebody else's checkpoints is no run.
    (tmp_path / "exp/checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "exp/final.pt")
    assert convert(tmp_path / "exp", tmp_path / "m.pt", to="torch").tensors == len(state)


def test_what_safetensors_cannot_name_is_refused_with_the_cause(tmp_path: Path) -> None:
    torch.save({"__metadata__": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="a name that safetensors keeps for itself"):
        convert(tmp_path / "x.pt", tmp_path / "m.safetensors", to="safetensors")


def test_a_device_or_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="neither a file nor a folder"):
        convert(tmp_path / "pipe", tmp_path / "m.pt", to="torch")


# --- tied names ---


def _tied(path: Path, alias: torch.Tensor, kept: torch.Tensor) -> Source:
    """A source whose second tensor calls itself tied to the third, which comes after it."""
    save_file({"a": torch.zeros(3), "head": alias, "wte": kept}, path)
    source = open_source(path)
    tensors = dict(source.plan.tensors)
    tensors["head"] = tensors["head"].renamed("head", tied_to="wte")
    return Source(path, replace(source.plan, tensors=tensors))


def test_an_alias_that_comes_before_the_name_it_is_tied_to_shares_its_storage(tmp_path: Path) -> None:
    weight = torch.randn(4, 5)
    report = write(_tied(tmp_path / "a.safetensors", weight.clone(), weight), tmp_path / "m.pt", to="torch")
    have = torch.load(tmp_path / "m.pt")
    assert list(have) == ["a", "head", "wte"]
    assert torch.equal(have["head"], weight)
    assert have["head"].data_ptr() == have["wte"].data_ptr()
    assert report.tied == {"head": "wte"}


def test_names_that_are_called_tied_and_are_not_equal_are_refused(tmp_path: Path) -> None:
    source = _tied(tmp_path / "a.safetensors", torch.zeros(4, 5), torch.ones(4, 5))
    with pytest.raises(CheckpointError, match=r"is called tied to .*, and their values differ"):
        write(source, tmp_path / "m.pt", to="torch")
    assert not (tmp_path / "m.pt").exists()


def test_a_tie_that_the_configuration_states_is_found_whatever_the_strides(tmp_path: Path) -> None:
    embedding = torch.randn(500, 300)
    tied = embedding.t().contiguous().t()
    assert not tied.is_contiguous()
    (tmp_path / "hf").mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    torch.save({"model.embed_tokens.weight": embedding, "lm_head.weight": tied}, tmp_path / "hf" / "pytorch_model.bin")
    report = convert(tmp_path / "hf", tmp_path / "out", to="hf")
    assert report.tensors == 2
    same(load_file(tmp_path / "out" / "model.safetensors"), {"model.embed_tokens.weight": embedding})


def test_a_delta_believes_no_tie_that_is_not_there(tmp_path: Path) -> None:
    new = {"a": torch.ones(3), "b": torch.zeros(3)}
    save_file(new, tmp_path / "new.safetensors", metadata={"thawline.tied": json.dumps({"b": "a"})})
    save_file({"a": torch.zeros(3), "b": torch.ones(3)}, tmp_path / "base.safetensors")
    convert(tmp_path / "new.safetensors", tmp_path / "d.safetensors", to="delta", base=tmp_path / "base.safetensors")
    convert(tmp_path / "d.safetensors", tmp_path / "o.safetensors", to="safetensors")
    same(load_file(tmp_path / "o.safetensors"), new)


def test_a_delta_that_was_put_where_its_base_was_asks_for_the_base(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3), "b": torch.ones(2)}, tmp_path / "base.pt")
    torch.save({"a": torch.ones(3), "b": torch.ones(2)}, tmp_path / "new.pt")
    convert(tmp_path / "new.pt", tmp_path / "d.safetensors", to="delta", base=tmp_path / "base.pt")
    shutil.copy(tmp_path / "base.pt", tmp_path / "elsewhere.pt")
    os.replace(tmp_path / "d.safetensors", tmp_path / "base.pt")
    with pytest.raises(CheckpointError, match="tensors are in its base only"):
        convert(tmp_path / "base.pt", tmp_path / "o.pt", to="torch")
    convert(tmp_path / "base.pt", tmp_path / "o.pt", to="torch", base=tmp_path / "elsewhere.pt")
    same(torch.load(tmp_path / "o.pt"), torch.load(tmp_path / "new.pt"))


def test_a_source_that_is_gone_at_the_end_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Engine.finish

    def finish(self: Engine, names: Iterable[str], where: Path) -> None:
        (tmp_path / "m.pt").unlink()
        whole(self, names, where)

    torch.save({"w": torch.ones(3)}, tmp_path / "m.pt")
    monkeypatch.setattr(Engine, "finish", finish)
    with pytest.raises(CheckpointError, match="vanished while it was converted"):
        convert(tmp_path / "m.pt", tmp_path / "o.safetensors", to="safetensors")
    assert not (tmp_path / "o.safetensors").exists()
