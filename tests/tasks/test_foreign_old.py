"""WeNet before 2024: epochs are `0.pt`, `1.pt` ..., their settings in train.yaml alone, `step` counted from -1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from tests.cli.speech_fixture import write_all

import thawline as tl
from thawline.cli.app import run
from thawline.errors import CheckpointError
from thawline.tasks import runs
from thawline.tasks.foreign import WenetRun
from thawline.train.recipe import read_recipe

TRAINING = {
    "optim": "adam", "optim_conf": {"lr": 0.002}, "scheduler": "warmuplr", "scheduler_conf": {"warmup_steps": 25},
    "grad_clip": 5, "accum_grad": 1, "max_epoch": 5,
}  # fmt: skip


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """A folder as train.py of that time left it: eleven epochs of three updates, the tenth the best."""
    write_all(tmp_path)
    folder = tmp_path / "base"
    config = yaml.safe_load((folder / "train.yaml").read_text())
    (folder / "train.yaml").write_text(yaml.safe_dump({**config, **TRAINING}))
    weights = torch.load(folder / "final.pt")
    (folder / "final.pt").unlink()
    torch.save(weights, folder / "init.pt")
    for epoch in range(11):
        weights["ctc.ctc_lo.bias"] = torch.full_like(weights["ctc.ctc_lo.bias"], float(epoch))
        torch.save(weights, folder / f"{epoch}.pt")
        infos = {"cv_loss": abs(9.0 - epoch), "epoch": epoch, "lr": 0.0005, "step": 3 * (epoch + 1) - 1}
        (folder / f"{epoch}.yaml").write_text(yaml.safe_dump(infos))
    return folder


def bias(path: Path) -> float:
    return float(tl.load(path).state_dict()["ctc.ctc_lo.bias"][0])


def test_the_folder_loads_at_its_last_epoch_by_number_and_each_file_by_itself(experiment: Path) -> None:
    assert bias(experiment) == 10.0  # and not 9, which sorts last
    assert bias(experiment / "3.pt") == 3.0


def test_epochs_are_averaged_by_number_and_by_loss(experiment: Path, tmp_path: Path) -> None:
    for option, mean in ((["--last", "2"], 9.5), (["--best", "3"], 9.0), (["--step", "0", "--step", "10"], 5.0)):
        target = tmp_path / f"{option[0]}.pt"
        assert run(["average", str(experiment), str(target), *option]) == 0
        assert float(torch.load(target)["ctc.ctc_lo.bias"][0]) == mean


def test_a_training_goes_on_where_its_newest_epoch_stood(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "goes_on.yaml"
    argv = ["init", str(experiment), "--continue", "--train", "train.list", "--valid", "dev.list", "-o", str(recipe)]
    assert run(argv) == 0
    said = capsys.readouterr().out
    assert "goes on from 10: CONTINUES" in said
    assert "updates done: 33" in said
    assert "the next learning rate is 0.00174078 by its settings (WeNet before 2024 records the rate that" in said
    start = read_recipe(recipe).start
    assert start is not None
    assert (start.step, start.epoch) == (33, 11)
    done = runs.train(recipe, ["run.workers=0", "run.steps=34", "data.batch.size=4"], run=tmp_path / "run")
    assert done.step == 34
    assert '"lr": 0.00174' in (done.dir / "metrics.jsonl").read_text()


def test_a_tag_may_be_named_and_the_others_are_listed(experiment: Path) -> None:
    found = WenetRun.open(experiment, "4")
    assert (found.weights.name, found.step, found.epoch) == ("4.pt", 15, 5)
    assert found.settings["optim_conf"] == {"lr": 0.002}
    with pytest.raises(CheckpointError, match="has no checkpoint '11'") as refused:
        WenetRun.open(experiment, "11")
    assert "there are 0, 1, 10, 2" in refused.value.fix


def test_a_numbered_yaml_that_is_no_sidecar_is_passed_over(experiment: Path) -> None:
    (experiment / "12.yaml").write_text("- a list")
    torch.save({}, experiment / "12.pt")
    assert WenetRun.open(experiment).tag == "10"
    (experiment / "train.yaml").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint of a WeNet training is here") as refused:
        WenetRun.open(experiment)
    assert "(before 2024) N.yaml with a train.yaml" in refused.value.fix
