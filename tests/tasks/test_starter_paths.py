"""`thawline init` and paths of every kind: what it writes is what the recipe reader gives back."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from thawline.cli.app import run
from thawline.core.config import dump_yaml, parse_yaml, scalar_text
from thawline.tasks.foreign import WenetRun
from thawline.tasks.starter import continuing_recipe, starter_recipe
from thawline.train.recipe import read_recipe

ODD = (
    "my data #1", "a: b", "*glob", "&anchor", "!tag", "%directive", "@at", "`tick`", "- item", "? key", "[x]", "{x}",
    "it's", 'say "so"', "'both' \"kinds\"", "back\\slash", "数据/语音", "naïve", "😀", "new\nline", "tab\there",
    "bell\a", "\u2028line", "\x85next", "\ufeffmark", "trailing ", "null", "true", "1e3", "0x1f", "~", "on", ".inf",
    "a,b", "#first", "x #y", "|", ">", "=", "<<", "-", "---", "...", os.fsdecode(b"caf\xe9"),
)  # fmt: skip
"""Names that YAML would read otherwise, or that no comment and no terminal can hold."""

ANY_NAME = st.one_of(
    st.text(min_size=1),
    st.binary(min_size=1).map(os.fsdecode),
    st.text(alphabet="#:*&!%@'\"\\ ,[]{}|>-?`~\n\t0e.", min_size=1),
    st.sampled_from(ODD),
)


@settings(max_examples=400, deadline=None)
@given(ANY_NAME)
def test_a_scalar_reads_back_as_itself_wherever_it_stands(name: str) -> None:
    text = scalar_text(name)
    assert "\n" not in text
    text.encode()
    read = parse_yaml(f"a: {text}   # why\nb: [{text}, {text}]\nc: {{d: {text}}}\n", "r.yaml").data
    assert read == {"a": name, "b": [name, name], "c": {"d": name}}


@settings(max_examples=100, deadline=None)
@given(ANY_NAME)
@example("\x85")  # PyYAML's single quotes lose it
def test_what_a_run_keeps_of_its_recipe_reads_back_too(name: str) -> None:
    text = dump_yaml({"model": name})
    assert parse_yaml(text.encode().decode(), "r.yaml").data == {"model": name}


def whisper(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "whisper"}))
    return folder


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(train=ANY_NAME, valid=ANY_NAME, name=ANY_NAME)
def test_data_of_any_name_stands_in_the_recipe_as_given(tmp_path: Path, train: str, valid: str, name: str) -> None:
    text = starter_recipe(whisper(tmp_path / "w"), train=train, valid=valid, name=name)
    (tmp_path / "r.yaml").write_bytes(text.encode())
    recipe = read_recipe(tmp_path / "r.yaml")
    assert (recipe.data.train, recipe.data.valid) == (train, valid)


@pytest.mark.parametrize("name", ODD)
def test_a_model_of_any_name_is_found_by_its_recipe(tmp_path: Path, name: str) -> None:
    folder = whisper(tmp_path / name.lstrip("/"))
    out = tmp_path / f"{name.replace('/', '_')}.yaml"
    assert run(["init", str(folder), "--train", name, "--out", str(out)]) == 0
    recipe = read_recipe(out)
    assert recipe.path("model") == folder.absolute()
    assert recipe.path("data", "train") == tmp_path / Path(name).expanduser()  # a lone ~ is the home, as ever
    assert recipe.resolved()["model"] == str(folder.absolute())
    lines = out.read_text().splitlines()
    assert lines[0].startswith("# thawline plan ")
    assert lines[1].startswith("# thawline train ")
    assert lines[2] == "task: speech"


@pytest.mark.parametrize("name", ["my run #2", "it's: a\nrun", os.fsdecode(b"caf\xe9")])
def test_going_on_with_a_training_of_any_name_finds_weights_and_moments(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name / "epoch_1"
    training = {"optim_conf": {"lr": 0.1}, "lrs": [0.1], "max_epoch": 3, "scheduler_conf": {"warmup_steps": 5}}
    folder.mkdir(parents=True)
    settings_of_it = {**training, "grad_clip": 5.0, "accum_grad": 1}
    found = WenetRun(tag="epoch_1", weights=folder, settings=settings_of_it, step=7, epoch=2)
    text = continuing_recipe(found, train="t.list", valid="v.list", name="r.yaml")
    (tmp_path / "r.yaml").write_bytes(text.encode())
    recipe = read_recipe(tmp_path / "r.yaml")
    assert recipe.path("model") == folder
    assert recipe.start is not None
    assert recipe.path("start", "optimizer") == folder


def test_an_image_classifier_of_an_odd_name_too(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=6
    )
    folder = tmp_path / "my nets: #1"
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    assert run(["init", str(folder), "--train", "a #b", "--out", str(tmp_path / "r.yaml")]) == 0
    recipe = read_recipe(tmp_path / "r.yaml")
    assert recipe.path("model") == folder
    assert recipe.data.train == "a #b"
