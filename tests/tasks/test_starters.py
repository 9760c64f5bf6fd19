"""`thawline init` on image classifiers and on VideoChat2: a recipe that plans and trains as it is written."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tasks.videochat_corpus import write_corpus, write_parts
from tests.tasks.vision_cases import write_folder

from thawline.cli.app import run as cli
from thawline.models.vision import efficientnet_lite
from thawline.tasks.runs import train
from thawline.train.recipe import read_recipe


def commented(text: str) -> bool:
    """Whether every key that people change has its comment on the line."""
    bare = {"name", "seed", "epochs", "valid", "schedule", "checkpoint", "weight_decay", "label_smoothing"}
    settings = [line for line in text.splitlines() if ":" in line and not line.lstrip().startswith(("#", "-"))]
    keys = {line.split(":")[0].strip() for line in settings if "#" not in line and line.split(":")[1].strip()}
    return keys <= bare | {"task"}


def test_a_weights_file_with_a_known_network_gives_a_recipe_for_its_head(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "lite").mkdir()
    save_file(efficientnet_lite.build("efficientnet-lite0").state_dict(), tmp_path / "lite" / "model.safetensors")
    write_folder(tmp_path / "images", each=3)
    out = tmp_path / "made.yaml"
    images = str(tmp_path / "images")
    assert cli(["init", str(tmp_path / "lite"), "--train", images, "--valid", images, "--out", str(out)]) == 0
    recipe = read_recipe(out)
    assert recipe.plan.to_dict()["train"] == ["_fc"]
    assert '_blocks[-1]", "!@norm"' in out.read_text()
    assert commented(out.read_text())
    made = train(out, ["run.steps=1", "run.workers=0", "data.conf.size=32"], run=tmp_path / "run")
    assert (made.dir / "model" / "vision.json").is_file()


def test_a_classifier_of_transformers_gives_a_recipe_too(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=6
    )
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "resnet")
    assert cli(["init", str(tmp_path / "resnet"), "--out", str(tmp_path / "r.yaml")]) == 0
    assert read_recipe(tmp_path / "r.yaml").plan.to_dict()["train"] == ["classifier.1"]
    assert '"resnet.encoder.stages[-1]"' in (tmp_path / "r.yaml").read_text()


def test_the_parts_of_videochat2_give_a_recipe_that_trains(tmp_path: Path) -> None:
    for name in ("transformers", "peft", "av"):
        pytest.importorskip(name)
    write_parts(tmp_path / "parts")
    corpus = str(write_corpus(tmp_path / "corpus", samples=4))
    out = tmp_path / "chat.yaml"
    assert cli(["init", str(tmp_path / "parts"), "--train", corpus, "--valid", corpus, "--out", str(out)]) == 0
    assert commented(out.read_text())
    made = train(out, ["run.steps=1", "run.workers=0", "run.accumulate=1"], run=tmp_path / "run")
    assert read_recipe(made.dir / "recipe.yaml").plan.to_dict()["train"] == ["mistral_proj", "mistral_model.@lora"]


def test_a_bare_language_model_gives_a_recipe_whose_parts_are_left_to_fill_in(tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.json").write_text('{"model_type": "mistral"}')
    assert cli(["init", str(tmp_path / "llm"), "--out", str(tmp_path / "c.yaml")]) == 0
    recipe = read_recipe(tmp_path / "c.yaml")
    assert recipe.task == "videochat"
    assert recipe.options["new"] == ["lora"]
    assert commented((tmp_path / "c.yaml").read_text())
