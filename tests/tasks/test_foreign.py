"""Going on with a WeNet training: its counters, its next learning rate, and a plain word on what it did not keep."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.cli.speech_fixture import write_all, write_wav
from tests.contracts.storm import bits
from tests.train.runs import AtStep

from thawline.ckpt.formats import zero
from thawline.ckpt.load import read_newest
from thawline.ckpt.tensors import tensor_of
from thawline.cli.app import run as cli
from thawline.data.sampler import Batching, BatchPlan
from thawline.errors import CheckpointError, RecipeError, Stopped
from thawline.tasks import runs
from thawline.tasks.foreign import WenetRun
from thawline.train.recipe import StartSettings, read_recipe
from thawline.train.rundir import read_rows
from thawline.train.start import first_moments, first_state

# --- what WeNet itself wrote


def write_data(folder: Path, symbols: list[str]) -> None:
    """Sixteen utterances, as many as the golden training had, and two held back."""
    for name, count in (("train", 16), ("dev", 2)):
        rows = []
        for i in range(count):
            write_wav(folder / f"{name}{i}.wav", 0.7, 200 + 20 * i, rate_hz=16000)
            rows.append({"key": f"{name}{i}", "wav": f"{name}{i}.wav", "txt": "".join(symbols[i : i + 2])})
        (folder / f"{name}.list").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def golden(shared: Path, tmp_path: Path) -> Path:
    """A recipe that goes on from epoch_0 of the golden training, in a folder with data."""
    symbols = [
        line.split()[0] for line in (shared / "parity/wenet/exp_dir_epoch_mode/units.txt").read_text().split("\n")[3:-1]
    ]
    write_data(tmp_path, symbols)
    experiment = shared / "parity" / "wenet" / "exp_dir_epoch_mode"
    assert cli(["init", str(experiment), "--continue", "epoch_0", "-o", str(tmp_path / "recipe.yaml")]) == 0
    return tmp_path


QUICK = ("run.workers=0", "run.checkpoint.best=null", "run.checkpoint.every=2 steps")


def test_the_second_epoch_has_the_steps_and_rates_of_a_wenet_training_that_was_not_interrupted(
    golden: Path, shared: Path
) -> None:
    result = runs.train(golden / "recipe.yaml", QUICK, run=golden / "run")
    ours = [(row["step"] - 1, row["lr"]) for row in read_rows(result.dir / "metrics.jsonl") if "lr" in row]
    trace = (shared / "parity/wenet/exp_dir_epoch_mode/trace.jsonl").read_text().splitlines()
    theirs = [(row["step"], row["lr"]) for row in map(json.loads, trace) if row.get("e") == 1]
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    # The same products in another order: the last bit may differ.
    assert [rate for _, rate in ours] == pytest.approx([rate for _, rate in theirs], rel=1e-15, abs=0)
    began = next(row for row in read_rows(result.dir / "events.jsonl") if row["event"] == "continued")
    assert (began["step"], began["grade"]) == (8, "CONTINUES")


def test_once_begun_it_is_a_run_like_any_other_and_goes_on_bit_for_bit(golden: Path) -> None:
    whole = runs.train(golden / "recipe.yaml", QUICK, run=golden / "whole")
    with pytest.raises(Stopped):
        runs.train(golden / "recipe.yaml", QUICK, run=golden / "cut", monitor=AtStep(11))
    cut = runs.train(golden / "recipe.yaml", QUICK, run=golden / "cut")
    assert bits(cut.dir) == bits(whole.dir)


def test_the_newest_checkpoint_is_taken_and_what_is_not_in_it_is_said(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = shared / "parity" / "wenet" / "exp_dir_epoch_mode"
    assert cli(["init", str(experiment), "--continue", "-o", str(tmp_path / "r.yaml"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["tag"], answer["grade"]) == ("epoch_1", "CONTINUES")
    assert answer["terms"] == [
        "updates done: 16",
        "epochs done: 2; the next begins at its beginning (max_epoch 2 is reached; run.epochs is one more)",
        "the next learning rate is 0.00158114, as WeNet recorded it",
        "the optimizer's moments are not in it (WeNet saves the weights alone): they begin at zero",
        "random state is not in it: order, augmentation and dropout are from run.seed from here on",
        "the number of devices is not in it: with W of them, run.accumulate is W x accum_grad",
    ]
    recipe = read_recipe(tmp_path / "r.yaml")
    assert recipe.start is not None
    assert (recipe.start.step, recipe.start.epoch, recipe.run.epochs) == (16, 2, 3)
    assert all(f"# {term}\n" in (tmp_path / "r.yaml").read_text() for term in answer["terms"])


# --- what WeNet would have written


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """A model directory with data beside it; checkpoints are for the tests to add."""
    write_all(tmp_path)
    return tmp_path / "base"


def leave(experiment: Path, tag: str, **infos: Any) -> Path:
    """A checkpoint TAG as WeNet leaves it; the path of its weights."""
    settings = yaml.safe_load((experiment / "train.yaml").read_text())
    settings |= {"optim": "adam", "optim_conf": {"lr": 0.002}, "scheduler": "warmuplr", "accum_grad": 1, "max_epoch": 9}
    settings |= {"scheduler_conf": {"warmup_steps": 10}, "tag": tag, **infos}
    (experiment / f"{tag}.yaml").write_text(yaml.safe_dump(settings))
    shutil.copyfile(experiment / "final.pt", experiment / f"{tag}.pt")
    return experiment / f"{tag}.pt"


def test_a_step_file_is_written_before_its_update_is_counted(experiment: Path) -> None:
    leave(experiment, "step_7", step=7, epoch=0, lrs=[0.0016])
    run = WenetRun.open(experiment)
    assert (run.step, run.epoch) == (8, None)
    assert "the next learning rate is 0.0016, as WeNet recorded it" in run.terms()
    out = experiment.parent / "made.yaml"
    assert cli(["init", str(experiment), "--continue", "-o", str(out)]) == 0
    result = runs.train(out, ["run.epochs=3", "run.steps=10", "data.batch={size: 3}", *QUICK], run=out.parent / "run")
    rows = [row for row in read_rows(result.dir / "metrics.jsonl") if "lr" in row]
    # 12 utterances in threes: 8 steps are two epochs.
    assert [(row["step"], row["epoch"]) for row in rows] == [(9, 2.25), (10, 2.5)]
    assert rows[0]["lr"] == pytest.approx(0.0016)


@pytest.mark.parametrize(
    ("step", "accumulate", "epoch", "index"), [(0, 1, 0, 0), (4, 1, 0, 4), (5, 1, 1, 0), (8, 2, 2, 4), (9, 2, 3, 0)]
)
def test_without_an_epoch_the_position_is_that_after_so_many_steps(
    step: int, accumulate: int, epoch: int, index: int
) -> None:
    plan = BatchPlan(10, seed=1, batching=Batching(size=2), length=None)  # five batches an epoch
    state = first_state(StartSettings(step=step), plan, accumulate=accumulate)
    assert (state.step, state.cursor, state.index) == (step, plan.cursor_at(epoch, index), index)


def test_of_several_checkpoints_the_one_with_the_most_updates_is_the_newest(experiment: Path) -> None:
    leave(experiment, "epoch_0", step=12, epoch=0, lrs=[0.1])
    leave(experiment, "step_19", step=19, epoch=0, lrs=[0.1])
    leave(experiment, "epoch_1", step=20, epoch=1, lrs=[0.1])
    assert WenetRun.open(experiment).tag == "epoch_1"
    (experiment / "epoch_1.pt").unlink()
    assert WenetRun.open(experiment).tag == "step_19"


@pytest.mark.parametrize(
    ("infos", "words"),
    [
        ({"lrs": [0.001]}, "the next learning rate is 0.0016 by its settings, though WeNet recorded 0.001"),
        (
            {"lrs": [0.001], "scheduler": "NoamHoldAnnealing"},
            "WeNet's next learning rate is 0.001, by NoamHoldAnnealing; the schedule here is the nearest there is",
        ),
        (
            {"lrs": [0.0008, 0.0016], "optim_conf": {"lr": [0.001, 0.002], "modules": ["encoder"]}},
            "the next learning rate is 0.0016, as WeNet recorded it",
        ),
        (
            {"lrs": [0.0016], "use_amp": True},
            "it was trained with half precision and a gradient scaler, which is not in it; here in fp32",
        ),
        (
            {"lrs": [0.0016], "lora_conf": {"lora_rank": 4}},
            "its LoRA factors become part of the weights, and every weight trains; plan.lora is for adapters",
        ),
    ],
)
def test_what_cannot_be_taken_up_is_said(experiment: Path, infos: dict[str, Any], words: str) -> None:
    leave(experiment, "epoch_0", step=8, epoch=0, **infos)
    assert words in WenetRun.open(experiment).terms()


def test_the_optimizers_settings_are_wenets(experiment: Path) -> None:
    conf = {"lr": 0.002, "betas": [0.9, 0.98], "eps": 1.0e-9, "weight_decay": 1.0e-6}
    leave(experiment, "epoch_3", step=8, epoch=3, lrs=[0.0016], optim_conf=conf, accum_grad=4, dtype="bf16")
    out = experiment.parent / "made.yaml"
    assert cli(["init", str(experiment), "--continue", "-o", str(out)]) == 0
    recipe = read_recipe(out)
    assert (recipe.optim.betas, recipe.optim.eps, recipe.optim.weight_decay) == ((0.9, 0.98), 1e-9, 1e-6)
    assert (recipe.optim.clip, recipe.run.accumulate, recipe.run.precision, recipe.run.epochs) == (50.0, 4, "bf16", 9)


# --- DeepSpeed


def leave_shards(experiment: Path, tag: str, updates: int) -> dict[str, torch.Tensor]:
    """TAG/ as DeepSpeed's stage 2 leaves it with one rank; the moments by name."""
    weights = torch.load(leave(experiment, tag, step=updates, epoch=0, lrs=[0.002]), weights_only=True)
    (experiment / f"{tag}.pt").unlink()
    buffers = [name for name in weights if "running" in name or "num_batches" in name or name.endswith(".pe")]
    trained = {name: tensor for name, tensor in weights.items() if name not in buffers}
    moments = {
        f"{name}/{key}": torch.full_like(tensor, float(place + 1) * scale)
        for key, scale in (("exp_avg", 1e-3), ("exp_avg_sq", 1e-6))
        for place, (name, tensor) in enumerate(trained.items())
    }
    flat = {
        key: torch.cat([moments[f"{name}/{key}"].flatten() for name in trained]) for key in ("exp_avg", "exp_avg_sq")
    }
    folder = experiment / tag
    folder.mkdir()
    common = {"dp_world_size": 1, "mp_world_size": 1, "ds_version": "0.19.8"}
    shapes = [{name: tuple(tensor.shape) for name, tensor in trained.items()}]
    model = {"module": weights, "buffer_names": buffers, "param_shapes": shapes, **common}
    torch.save(model, folder / "mp_rank_00_model_states.pt")
    optimizer = {
        "zero_stage": 2,
        "partition_count": [1],
        "single_partition_of_fp32_groups": [torch.cat([tensor.flatten() for tensor in trained.values()])],
        "base_optimizer_state": {"state": {0: {"step": torch.tensor(float(updates)), **flat}}, "param_groups": []},
    }
    torch.save({"optimizer_state_dict": optimizer, **common}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return moments


def test_the_moments_of_a_deepspeed_folder_are_brought_along_by_name(experiment: Path) -> None:
    moments = leave_shards(experiment, "epoch_0", 10)
    out = experiment.parent / "made.yaml"
    assert cli(["init", str(experiment), "--continue", "-o", str(out)]) == 0
    recipe = read_recipe(out)
    found = first_moments(recipe)
    assert all(torch.equal(found[key], moment) for key, moment in moments.items())
    # With gradients clipped to nothing an update only lets the moments decay.
    options = ["run.steps=11", "data.batch={size: 3}", "optim.clip=1e-30", *QUICK]
    result = runs.train(out, options, run=out.parent / "run")
    saved = read_newest(result.dir / "checkpoints", report=print).optimizer
    assert saved.keys() == found.keys()
    assert {float(value) for key, value in saved.items() if key.endswith("/step")} == {11.0}
    decay = {"exp_avg": 0.9, "exp_avg_sq": 0.999}
    for key, moment in moments.items():
        assert torch.allclose(saved[key], decay[key.rpartition("/")[2]] * moment, rtol=1e-6, atol=0)


def test_moments_of_two_zero_stages_of_one_training_agree(shared: Path) -> None:
    """Stage 1 cuts groups across ranks, stage 3 every parameter: other places, the same training."""
    one, three = (
        {
            key: tensor_of(moment)
            for key, moment in zero.moments(shared / "parity/sharded" / name / "checkpoint")[0].items()
        }
        for name in ("ds_z1_ws2_bf16", "ds_z3_ws2_bf16")
    )
    assert one.keys() == three.keys()
    # Gradients are summed over the ranks in another order.
    assert all(torch.allclose(one[key], three[key], rtol=1e-5, atol=1e-6 * float(one[key].abs().max())) for key in one)


def test_a_checkpoint_of_stage_0_has_no_moments_that_names_can_be_given_to(shared: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no moments cut as its master weights are"):
        zero.moments(shared / "parity" / "sharded" / "ds_z0_ws2_bf16" / "checkpoint")


# --- refusals


def test_a_folder_without_checkpoints_and_an_unknown_tag_are_refused_with_what_is_there(experiment: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint of a WeNet training is here"):
        WenetRun.open(experiment)
    leave(experiment, "epoch_2", step=8, epoch=2, lrs=[0.1])
    with pytest.raises(CheckpointError, match="has no checkpoint 'epoch_3'") as refused:
        WenetRun.open(experiment, "epoch_3")
    assert refused.value.fix == "did you mean epoch_2? there are epoch_2"


def test_resuming_such_a_folder_says_what_to_type(experiment: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        runs.resume(experiment)
    assert f"thawline init {experiment} --continue" in refused.value.fix


def test_a_start_after_the_last_epoch_is_refused(experiment: Path) -> None:
    with pytest.raises(RecipeError, match=r"start.epoch 2 of run.epochs 2: nothing is left"):
        read_recipe(experiment.parent / "recipe.yaml", ["start={step: 9, epoch: 2}"])
