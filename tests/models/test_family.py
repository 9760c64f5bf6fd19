"""What a path is taken for, and what is said where it is nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from thawline.core.whisper import huggingface_values
from thawline.errors import CheckpointError, RecipeError
from thawline.models.family import build_empty, sniff
from thawline.models.whisper_names import translate

TINY = {
    "n_mels": 4,
    "n_vocab": 51865,
    "n_audio_ctx": 10,
    "n_audio_state": 4,
    "n_audio_head": 1,
    "n_audio_layer": 1,
    "n_text_ctx": 8,
    "n_text_state": 4,
    "n_text_head": 1,
    "n_text_layer": 1,
}


def test_a_wenet_directory(shared: Path) -> None:
    folder = shared / "parity" / "wenet" / "u2_conformer"
    files = sniff(folder)
    assert files.family == "wenet"
    assert files.weights == (folder / "final.pt",)
    assert files.sidecars == {
        "train.yaml": folder / "train.yaml",
        "units.txt": folder / "units.txt",
        "global_cmvn": folder / "global_cmvn",
    }
    model = build_empty(files)
    assert not model.training
    model.load_state_dict(torch.load(files.weights[0], weights_only=True), strict=True)


def test_a_moved_cmvn_file_does_not_matter_for_a_checkpoint(shared: Path, tmp_path: Path) -> None:
    source = shared / "parity" / "wenet" / "u2_conformer"
    for name in ("train.yaml", "final.pt"):
        shutil.copy(source / name, tmp_path / name)
    files = sniff(tmp_path)
    assert files.missing == ("units.txt", "global_cmvn")
    model = build_empty(files)
    assert bool(model.get_buffer("encoder.global_cmvn.mean").isnan().all())
    model.load_state_dict(torch.load(files.weights[0], weights_only=True), strict=True)
    assert bool(model.get_buffer("encoder.global_cmvn.mean").isfinite().all())


def test_wenets_dangling_final_link_falls_back_to_the_last_epoch(shared: Path, tmp_path: Path) -> None:
    source = shared / "parity" / "wenet" / "exp_dir_epoch_mode"
    for name in ("train.yaml", "units.txt", "init.pt", "epoch_0.pt", "epoch_1.pt"):
        shutil.copy(source / name, tmp_path / name)
    os.symlink("1.pt", tmp_path / "final.pt")
    assert sniff(tmp_path).weights == (tmp_path / "epoch_1.pt",)
    shutil.copy(tmp_path / "epoch_0.pt", tmp_path / "avg_10.pt")
    shutil.copy(tmp_path / "epoch_0.pt", tmp_path / "avg_9.pt")
    assert sniff(tmp_path).weights == (tmp_path / "avg_10.pt",)


def test_one_checkpoint_inside_a_wenet_directory(shared: Path) -> None:
    file = shared / "parity" / "wenet" / "exp_dir_epoch_mode" / "epoch_0.pt"
    files = sniff(file)
    assert files.weights == (file,)
    build_empty(files).load_state_dict(torch.load(file, weights_only=True), strict=True)


def test_a_sharded_hugging_face_whisper(shared: Path) -> None:
    folder = shared / "parity" / "sharded" / "hf_whisper_fp32" / "checkpoint"
    files = sniff(folder)
    assert files.family == "whisper-hf"
    assert files.weights[0].name == "model.safetensors.index.json"
    assert len(files.weights) == 6
    assert {"config.json", "generation_config.json"} <= files.sidecars.keys()


def hugging_face(folder: Path) -> Path:
    config, generation = huggingface_values(TINY)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_a_hugging_face_directory_builds_its_network(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model: Any = build_empty(sniff(hugging_face(tmp_path)))
    assert model.generation_config.begin_suppress_tokens == [220, 50257]
    assert model.prompt(1, torch.device("cpu"), ["zh"]).tolist() == [[50258, 50260, 50359, 50363]]


def test_openais_file_builds_a_network_whose_names_the_table_gives(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source: Any = build_empty(sniff(hugging_face(tmp_path)))
    state = {translate(n, "huggingface", "openai"): t for n, t in source.state_dict().items()}
    state.pop(None, None)
    torch.save({"dims": TINY, "model_state_dict": state}, tmp_path / "tiny.pt")
    files = sniff(tmp_path / "tiny.pt")
    assert (files.family, files.spelling, files.network) == ("whisper-openai", "openai", "huggingface")
    model = build_empty(files)
    names = {translate(n, files.spelling, files.network) for n in state}
    assert model.state_dict().keys() - names == {"proj_out.weight"}
    assert names <= model.state_dict().keys()


def test_what_is_nothing_is_named_with_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "exp").mkdir()
    with pytest.raises(CheckpointError, match="closest: exp"):
        sniff(tmp_path / "exq")
    with pytest.raises(CheckpointError, match=r"expected train.yaml and final.pt .* found nothing"):
        sniff(tmp_path / "exp")
    (tmp_path / "exp" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="the kind 'bert'"):
        sniff(tmp_path / "exp")
    (tmp_path / "exp" / "config.json").write_text('{"model_type": "whisper"}')
    with pytest.raises(CheckpointError, match="no weights beside it"):
        sniff(tmp_path / "exp")
    (tmp_path / "exp" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"not there: one\.safetensors"):
        sniff(tmp_path / "exp")
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(CheckpointError, match="neither OpenAI's Whisper nor a WeNet file"):
        sniff(tmp_path / "torn.pt")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"neither OpenAI's Whisper \(dims"):
        sniff(tmp_path / "other.pt")
    (tmp_path / "exp" / "train.yaml").write_text("a: 1\n")
    with pytest.raises(CheckpointError, match="not a WeNet model configuration"):
        sniff(tmp_path / "exp")


def test_a_network_that_is_not_built_here_is_refused_when_building(shared: Path, tmp_path: Path) -> None:
    text = (shared / "parity" / "wenet" / "transformer" / "train.yaml").read_text(encoding="utf-8")
    (tmp_path / "train.yaml").write_text(text.replace("model: asr_model", "model: paraformer"), encoding="utf-8")
    (tmp_path / "final.pt").write_bytes(b"")
    with pytest.raises(RecipeError, match="'paraformer' is not supported"):
        build_empty(sniff(tmp_path))
