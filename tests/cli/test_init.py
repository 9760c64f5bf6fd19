"""`thawline init`: WeNet's and Hugging Face's settings become a recipe that plans and trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.cli.speech_fixture import write_all

from thawline.cli.app import run
from thawline.tasks.asr import SpeechTask
from thawline.tasks.kinds import kind_of
from thawline.tasks.runs import open_recipe
from thawline.train.recipe import Recipe, read_recipe

WENET_TRAINING: dict[str, Any] = {
    "optim": "adam",
    "optim_conf": {"lr": 0.002},
    "scheduler": "warmuplr",
    "scheduler_conf": {"warmup_steps": 25},
    "grad_clip": 5,
    "accum_grad": 2,
    "max_epoch": 240,
    "log_interval": 100,
    "save_states": "model_only",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_all(tmp_path)
    return tmp_path


def written(folder: Path, **changes: Any) -> Recipe:
    values = yaml.safe_load((folder / "base" / "train.yaml").read_text())
    values.update({**WENET_TRAINING, **changes})
    values["dataset_conf"] |= {
        "batch_conf": {"batch_type": "dynamic", "max_frames_in_batch": 300},
        "speaker_conf": {"speaker_table_path": "speakers.txt"},
        "list_shuffle": True,
        "sort_conf": {"sort_size": 500},
        "shuffle_conf": {"shuffle_size": 1500},
    }
    (folder / "base" / "train.yaml").write_text(yaml.safe_dump(values))
    out = folder / "made.yaml"
    assert run(["init", str(folder / "base"), "--train", "train.list", "--valid", "dev.list", "--out", str(out)]) == 0
    return read_recipe(out)


def test_a_wenet_directory_gives_its_optimizer_schedule_batch_and_data_settings(folder: Path) -> None:
    recipe = written(folder)
    assert (recipe.optim.name, recipe.optim.lr, recipe.optim.weight_decay, recipe.optim.clip) == ("adam", 0.002, 0.0, 5)
    assert (recipe.optim.schedule.name, str(recipe.optim.schedule.warmup)) == ("warmuplr", "25 steps")
    assert recipe.run.accumulate == 2
    assert recipe.data.batch.frames == 300
    assert recipe.data.conf["fbank_conf"]["num_mel_bins"] == 80
    assert "speaker_conf" not in recipe.data.conf
    assert run(["plan", str(folder / "made.yaml")]) == 0


def test_rates_per_module_become_multiples_in_the_plan(folder: Path) -> None:
    recipe = written(folder, optim_conf={"lr": [0.001, 0.004, 0.002], "modules": ["decoder", "ctc"]})
    assert recipe.optim.lr == 0.002
    assert recipe.plan.to_dict()["lr"] == {"decoder.**": 0.5, "ctc.**": 2.0}


def test_noam_hold_annealing_becomes_the_nearest_schedule_and_says_so(folder: Path) -> None:
    recipe = written(folder, scheduler="NoamHoldAnnealing", scheduler_conf={"warmup_steps": 10, "max_steps": 100})
    assert recipe.optim.schedule.name == "wsd"
    assert "nearest to WeNet's NoamHoldAnnealing" in (folder / "made.yaml").read_text()


def test_the_recipe_trains(folder: Path) -> None:
    written(folder)
    assert run(["train", str(folder / "made.yaml"), "run.steps=2", "run.workers=0", "--run", str(folder / "run")]) == 0
    assert (folder / "run" / "model" / "final.pt").is_file()


def test_a_hugging_face_whisper_gives_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "config.json").write_text(json.dumps({"model_type": "whisper"}))
    assert run(["init", str(tmp_path / "w"), "--out", str(tmp_path / "r.yaml")]) == 0
    recipe = read_recipe(tmp_path / "r.yaml")
    assert recipe.options == {"language": "en"}
    assert recipe.path("model") == tmp_path / "w"


def test_an_existing_recipe_is_not_overwritten_and_a_strange_folder_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["init", str(folder / "base"), "--out", str(folder / "recipe.yaml")]) == 2
    assert "exists already" in capsys.readouterr().err
    (tmp_path / "nothing").mkdir()
    assert run(["init", str(tmp_path / "nothing"), "--out", str(tmp_path / "n.yaml")]) == 2
    assert "neither train.yaml (WeNet) nor config.json (Hugging Face)" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["u2_conformer", "u2pp_conformer", "transformer", "exp_dir_epoch_mode", "whisper"])
def test_every_golden_train_yaml_becomes_a_recipe_that_builds_its_model(
    shared: Path, tmp_path: Path, case: str
) -> None:
    out = tmp_path / "r.yaml"
    assert run(["init", str(shared / "parity" / "wenet" / case), "--out", str(out)]) == 0
    recipe, task = open_recipe(out)
    assert isinstance(task, SpeechTask)
    assert recipe.optim.name == "adam"
    model = task.build(recipe)
    assert sum(p.numel() for p in model.parameters()) > 0
    assert task.home is not None
    task.home.frontend(recipe.data.conf)


def test_a_recipe_written_into_the_models_own_folder_does_not_make_it_a_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder / "base")
    assert run(["init", ".", "--train", "../train.list", "--valid", "../dev.list"]) == 0
    assert run(["plan", "recipe.yaml"]) == 0
    assert run(["transcribe", ".", "../dev0.wav"]) == 0
    assert run(["transcribe", ".", "../dev00.wav"]) == 3
    assert "no such audio file" in capsys.readouterr().err


def test_a_recipe_beside_a_folder_of_models_says_nothing_about_them(folder: Path) -> None:
    (folder / "recipe.yaml").write_text("task: vision\n")
    (folder / "checkpoints").mkdir()
    (folder / "base").rename(folder / "checkpoints" / "mine")
    assert kind_of(folder / "checkpoints" / "mine") == "speech"
