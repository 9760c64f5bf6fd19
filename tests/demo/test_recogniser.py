from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from thawline.core.config import read_yaml
from thawline.data.text import open_tokenizer
from thawline.demo.recogniser import write_recogniser
from thawline.demo.voices import WORDS
from thawline.models.wenet.cmvn import read_cmvn
from thawline.models.wenet.config import read_config
from thawline.models.wenet.model import build

soundfile = pytest.importorskip("soundfile", reason="the extra `speech` is not installed")
pytest.importorskip("kaldi_native_fbank", reason="the extra `speech` is not installed")


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    rng = np.random.default_rng(0)
    soundfile.write(folder / "a.wav", rng.normal(0, 0.1, 16000), 16000)
    (folder / "data.list").write_text(json.dumps({"key": "a", "wav": "a.wav", "txt": "one two"}) + "\n")
    units = ("<blank>", "<unk>", *WORDS, "<sos/eos>")
    (folder / "units.txt").write_text("".join(f"{unit} {i}\n" for i, unit in enumerate(units)))
    write_recogniser(folder / "recogniser", units=folder / "units.txt", train_list=folder / "data.list")
    return folder / "recogniser"


def test_the_directory_describes_a_u2_model_of_about_a_third_of_a_million_parameters(recogniser: Path):
    config = read_config(read_yaml(recogniser / "train.yaml").data)
    model = build(config, read_cmvn(recogniser / "global_cmvn", is_json=True))
    assert 300_000 < sum(p.numel() for p in model.parameters()) < 400_000
    assert config.vocabulary == 13
    assert (config.blank, config.sos, config.eos) == (0, 12, 12)
    assert [type(block.conv_module.norm).__name__ for block in model.encoder.encoders] == ["BatchNorm1d"] * 3


def test_its_units_are_words(recogniser: Path):
    settings = read_yaml(recogniser / "train.yaml").data
    tokenizer = open_tokenizer(settings["tokenizer"], settings["tokenizer_conf"], recogniser)
    assert tokenizer.encode("one two") == [3, 4]
    assert tokenizer.decode([3, 4]) == "one two"
