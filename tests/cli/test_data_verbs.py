"""`thawline data check` as a model would see the data: a run, OpenAI's file with a tokenizer given, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.cli.speech_fixture import write_all

from thawline.cli.app import run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_all(tmp_path)
    return tmp_path


@pytest.fixture
def openai(tmp_path: Path) -> Path:
    """The dimensions of a small Whisper in OpenAI's form; nothing else of it is looked at."""
    dims = dict.fromkeys(("n_audio_layer", "n_text_layer"), 1) | dict.fromkeys(("n_audio_head", "n_text_head"), 2)
    dims |= {"n_mels": 80, "n_vocab": 51865, "n_audio_ctx": 1500, "n_text_ctx": 448}
    dims |= dict.fromkeys(("n_audio_state", "n_text_state"), 16)
    torch.save({"dims": dims, "model_state_dict": {}}, tmp_path / "openai.pt")
    return tmp_path / "openai.pt"


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer.json that spells a to h, letter by letter."""
    folder.mkdir()
    words = {"<unk>": 0, "<|endoftext|>": 1} | {letter: i for i, letter in enumerate("abcdefgh", 2)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
    text = {"version": "1.0", "model": model, "pre_tokenizer": split, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(text))
    return folder


def test_openai_s_file_needs_a_tokenizer_and_the_option_that_the_message_names_gives_it(
    folder: Path, openai: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["data", "check", str(folder / "dev.list"), "--model", str(openai)]
    assert run(argv) == 3
    err = capsys.readouterr().err
    assert "OpenAI's .pt holds no tokenizer" in err
    assert "fix: give a folder with a Whisper's tokenizer.json (--tokenizer, options.tokenizer)" in err
    assert run([*argv, "--tokenizer", str(write_tokenizer(folder / "tokens")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["utterances"] == 4


def test_a_tokenizer_without_a_model_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "check", str(folder / "dev.list"), "--tokenizer", "x"]) == 2
    assert "--tokenizer goes with --model" in capsys.readouterr().err


def test_a_run_and_its_checkpoint_see_data_as_their_model_does(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", str(folder / "recipe.yaml"), "run.epochs=1", "--run", str(folder / "run")]) == 0
    (folder / "odd.list").write_text((folder / "dev.list").read_text().replace('"a d"', '"a z"'))
    found = []
    checkpoint = next((folder / "run" / "checkpoints").glob("step-*"))
    for model in (folder / "base", folder / "run", checkpoint):
        capsys.readouterr()
        assert run(["data", "check", str(folder / "odd.list"), "--model", str(model), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] == found[2]
    assert "z" in json.dumps(found[0])
