"""Recognisers between WeNet's, OpenAI's and Hugging Face's forms, through the verb: bit for bit, there and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.models.wenet_cases import CASES
from torch import Tensor

import thawline as tl
from thawline.cli.app import run
from thawline.tasks.speech_home import SpeechHome


def convert(source: Path, target: Path, to: str, *more: str) -> None:
    assert run(["convert", str(source), str(target), "--to", to, *more]) == 0


def read(path: Path) -> dict[str, Tensor]:
    content = torch.load(path, weights_only=True)
    return dict(content.get("model_state_dict", content))


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("name", CASES)
def test_what_is_exported_for_wenet_has_wenets_names_shapes_and_types(shared: Path, tmp_path: Path, name: str) -> None:
    source = shared / "parity" / "wenet" / name
    SpeechHome.of(source).export(tl.load(source), tmp_path)
    meta = json.loads((source / "meta.json").read_text())
    state = torch.load(tmp_path / "final.pt", weights_only=True)
    found = {n: [list(t.shape), str(t.dtype).removeprefix("torch.")] for n, t in state.items()}
    assert found == meta["state_dict"]
    assert list(state) == list(torch.load(source / "final.pt", weights_only=True))
    assert same_bits(dict(state), read(source / "final.pt"))


@pytest.mark.parametrize("name", ["u2_conformer", "u2pp_conformer", "whisper"])
def test_an_exported_wenet_directory_is_complete_and_loads_again(shared: Path, tmp_path: Path, name: str) -> None:
    import yaml

    source = tmp_path / "moved"
    shutil.copytree(shared / "parity" / "wenet" / name, source)
    source.chmod(0o755)
    values = yaml.safe_load((source / "train.yaml").read_text())
    if values["tokenizer_conf"].get("symbol_table_path"):
        values["tokenizer_conf"]["symbol_table_path"] = "data/dict/units.txt"  # where WeNet was run, not here
    if values.get("cmvn"):
        values["cmvn_conf"]["cmvn_file"] = "data/train/global_cmvn"
    (source / "train.yaml").chmod(0o644)
    (source / "train.yaml").write_text(yaml.safe_dump(values))
    target = tmp_path / "exported"
    target.mkdir()
    SpeechHome.of(source).export(tl.load(source), target)
    shutil.rmtree(source)
    names = {p.name for p in target.iterdir()}
    assert {"train.yaml", "final.yaml", "final.pt", "units.txt"} <= names
    assert "io.safetensors" not in names
    written = yaml.safe_load((target / "train.yaml").read_text())
    assert written["tokenizer_conf"].get("symbol_table_path") in (None, "units.txt")
    assert (written.get("cmvn_conf") or {}).get("cmvn_file") in (None, "global_cmvn")
    assert yaml.safe_load((target / "final.yaml").read_text()) == {**written, "tag": "final"}
    again = target.parent / "again"
    again.mkdir()
    SpeechHome.of(target).export(tl.load(target), again)
    assert same_bits(read(target / "final.pt"), read(again / "final.pt"))
    assert (again / "train.yaml").read_bytes() == (target / "train.yaml").read_bytes()


def test_openai_to_wenet_and_back_is_bit_equal(shared: Path, tmp_path: Path) -> None:
    source = shared / "parity" / "wenet" / "whisper_from_openai"
    convert(source / "openai.pt", tmp_path / "wenet.pt", "wenet")
    convert(tmp_path / "wenet.pt", tmp_path / "back.pt", "whisper")
    assert same_bits(read(tmp_path / "back.pt"), read(source / "openai.pt"))
    converted, wenets_own = read(tmp_path / "wenet.pt"), read(source / "final.pt")
    assert all(torch.equal(converted[name].float(), tensor) for name, tensor in wenets_own.items())
    assert converted.keys() - wenets_own.keys() == {"decoder.output_layer.weight", "decoder.output_layer.bias"}
    assert not converted["decoder.output_layer.bias"].any()


def test_openai_to_hugging_face_to_wenet_and_back_is_bit_equal(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = shared / "parity" / "wenet" / "whisper_from_openai"
    shutil.copyfile(source / "openai.pt", tmp_path / "openai.pt")
    convert(tmp_path / "openai.pt", tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "wenet", "wenet")
    shutil.copyfile(source / "train.yaml", tmp_path / "wenet" / "train.yaml")  # says how many heads there are
    convert(tmp_path / "wenet", tmp_path / "hf2", "hf")
    convert(tmp_path / "hf2", tmp_path / "back.pt", "whisper")
    assert same_bits(read(tmp_path / "back.pt"), read(source / "openai.pt"))
    one, two = (load_file(tmp_path / d / "model.safetensors") for d in ("hf", "hf2"))
    assert same_bits(one, two)


def test_a_ctc_head_that_the_target_cannot_hold_is_named(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """WeNet's golden Whisper was trained with an output bias: openai's form cannot hold it, and says so."""
    source = shared / "parity" / "wenet" / "whisper"
    assert run(["convert", str(source), str(tmp_path / "o.pt"), "--to", "whisper"]) == 4
    assert "'decoder.output_layer.bias' is not zero, and openai has no output bias" in capsys.readouterr().err
    state = read(source / "final.pt")
    state["decoder.output_layer.bias"].zero_()
    folder = tmp_path / "zeroed"
    folder.mkdir()
    torch.save(state, folder / "final.pt")
    shutil.copyfile(source / "train.yaml", folder / "train.yaml")
    capsys.readouterr()
    assert run(["convert", str(folder), str(tmp_path / "o.pt"), "--to", "whisper", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["dropped"]) == {"ctc.ctc_lo.weight", "ctc.ctc_lo.bias"}


def test_a_converted_wenet_directory_loads(shared: Path, tmp_path: Path) -> None:
    source = shared / "parity" / "wenet" / "u2_conformer"
    convert(source, tmp_path / "made", "wenet")
    assert {p.name for p in (tmp_path / "made").iterdir()} >= {"final.pt", "train.yaml", "units.txt", "global_cmvn"}
    one, two = tl.load(source).state_dict(), tl.load(tmp_path / "made").state_dict()
    assert same_bits(dict(one), dict(two))


def openai_with_real_vocabulary(shared: Path, path: Path) -> None:
    """The golden OpenAI file with as many tokens as OpenAI's multilingual models have."""
    content = torch.load(shared / "parity" / "wenet" / "whisper_from_openai" / "openai.pt", weights_only=True)
    content["dims"]["n_vocab"] = 51865
    width = content["dims"]["n_text_state"]
    content["model_state_dict"]["decoder.token_embedding.weight"] = torch.randn(51865, width).half()
    torch.save(content, path)


def test_a_whisper_becomes_a_directory_that_wenet_can_use(shared: Path, tmp_path: Path) -> None:
    """train.yaml against the one that WeNet's own converter wrote; the special tokens against Hugging Face's."""
    import yaml

    golden = yaml.safe_load((shared / "parity" / "wenet" / "whisper_from_openai" / "train.yaml").read_text())
    openai_with_real_vocabulary(shared, tmp_path / "openai.pt")
    convert(tmp_path / "openai.pt", tmp_path / "wenet", "wenet")
    made = yaml.safe_load((tmp_path / "wenet" / "train.yaml").read_text())
    assert made.keys() == golden.keys()
    same = (
        "input_dim", "encoder", "encoder_conf", "decoder", "decoder_conf", "model", "model_conf", "tokenizer", "cmvn",
        "cmvn_conf", "dataset", "dataset_conf", "ctc",
    )  # fmt: skip
    assert {key: made[key] for key in same} == {key: golden[key] for key in same}
    assert made["output_dim"] == 51865
    generation = json.loads((shared / "models" / "whisper-base" / "generation_config.json").read_text())
    special = made["tokenizer_conf"]["special_tokens"]
    assert special["no_timestamps"] == generation["no_timestamps_token_id"]
    assert special["transcribe"] == generation["task_to_id"]["transcribe"]
    assert special["sot"] == generation["decoder_start_token_id"]
    assert made["tokenizer_conf"]["num_languages"] == len(generation["lang_to_id"])
    model = tl.load(tmp_path / "wenet")
    names = {name: tensor.shape for name, tensor in model.state_dict().items()}
    written = read(tmp_path / "wenet" / "final.pt")
    assert {name: written[name].shape for name in written} == {name: names[name] for name in written}
    convert(tmp_path / "openai.pt", tmp_path / "one.pt", "wenet")
    assert yaml.safe_load((tmp_path / "one.yaml").read_text()) == made


def test_the_units_are_the_vocabulary_of_the_hugging_face_folder(shared: Path, tmp_path: Path) -> None:
    openai_with_real_vocabulary(shared, tmp_path / "openai.pt")
    convert(tmp_path / "openai.pt", tmp_path / "hf", "hf")
    for name in ("vocab.json", "added_tokens.json", "tokenizer.json"):
        shutil.copyfile(shared / "models" / "whisper-base" / name, tmp_path / "hf" / name)
    convert(tmp_path / "hf", tmp_path / "wenet", "wenet")
    lines = (tmp_path / "wenet" / "units.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 51865
    assert lines[0] == "b'!' 0"
    the = json.loads((tmp_path / "hf" / "vocab.json").read_text())["\u0120the"]
    assert lines[the] == f"b'<space>the' {the}"
    assert lines[50257] == "b'<|endoftext|>' 50257"
    assert all(line.split(" ")[1] == str(number) for number, line in enumerate(lines))
