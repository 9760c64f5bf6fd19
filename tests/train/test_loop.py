"""The loop on a toy task: everything that a run promises and that does not need speech."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.train.runs import AtStep, checkpoint_sums, run, sums
from tests.train.toy import RECIPE, ToyTask, write_recipe

from thawline.errors import DataError, LawBroken, RecipeError, Stopped, ThawlineError
from thawline.freeze.lora import merged_copy
from thawline.train.loop import Run, train
from thawline.train.recipe import read_recipe
from thawline.train.rundir import read_rows
from thawline.train.task import PlainSums, SumTerm

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_run_leaves_what_the_design_names(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    result = run(tmp_path, "run")
    names = {p.name for p in result.dir.iterdir()}
    assert {"recipe.yaml", "base.json", "events.jsonl", "metrics.jsonl", "checkpoints", "model", "audit.json"} <= names
    assert result.metrics["valid/loss"] < 3.0
    rows = read_rows(result.dir / "metrics.jsonl")
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 22))
    assert len([r for r in rows if "valid/loss" in r]) == 3


def test_what_the_plan_does_not_name_is_bitwise_the_base(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    result = run(tmp_path, "run", ["plan.thaw=[]"])
    base = load_file(tmp_path / "base" / "weights.safetensors")
    made = load_file(result.dir / "model" / "weights.safetensors")
    changed = {name for name in base if not torch.equal(base[name], made[name])}
    assert changed == {"head.weight", "head.bias"}


def test_a_thaw_begins_in_its_epoch_and_reaches_the_weights(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    result = run(tmp_path, "run", ["run.checkpoint.best=null"])
    phases = [e for e in read_rows(result.dir / "events.jsonl") if e["event"] == "phase"]
    assert [(e["step"], e["phase"]) for e in phases] == [(7, 1)]
    base = load_file(tmp_path / "base" / "weights.safetensors")
    made = load_file(result.dir / "model" / "weights.safetensors")
    assert not torch.equal(base["body.0.weight"], made["body.0.weight"])
    assert torch.equal(base["body.1.running_mean"], made["body.1.running_mean"])


def test_the_same_recipe_gives_the_same_bytes(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    one, other = run(tmp_path, "one"), run(tmp_path, "other", ["run.workers=2"])
    assert sums(one.dir / "model") == sums(other.dir / "model")
    assert checkpoint_sums(one.dir) == checkpoint_sums(other.dir)
    assert (one.dir / "metrics.jsonl").read_bytes() == (other.dir / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("stop_after", [1, 3, 6, 7, 8, 14, 20])
def test_a_run_stopped_at_any_step_goes_on_bit_for_bit(tmp_path: Path, stop_after: int) -> None:
    write_recipe(tmp_path)
    whole = run(tmp_path, "whole")
    with pytest.raises(Stopped):
        run(tmp_path, "cut", monitor=AtStep(stop_after))
    going_on = run(tmp_path, "cut")
    assert sums(going_on.dir / "model") == sums(whole.dir / "model")
    assert checkpoint_sums(going_on.dir) == checkpoint_sums(whole.dir)
    assert (going_on.dir / "metrics.jsonl").read_bytes() == (whole.dir / "metrics.jsonl").read_bytes()
    resumed = [e for e in read_rows(going_on.dir / "events.jsonl") if e["event"] == "resumed"]
    assert [e["grade"] for e in resumed] == ["EXACT"]


@pytest.mark.long
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    write_recipe(tmp_path, RECIPE.replace("epochs: 3", "epochs: 12"))
    whole = run(tmp_path, "whole")
    for delay_ms in (0, 30, 60, 90, 130, 170, 230):
        child = spawn(tmp_path, "cut")
        child.stdout.readline()  # type: ignore[union-attr]  # training has begun
        try:
            child.wait(delay_ms / 1000)
        except subprocess.TimeoutExpired:
            child.kill()
        child.communicate()
    finished = spawn(tmp_path, "cut")
    finished.communicate()
    assert finished.returncode == 0
    assert sums(tmp_path / "cut" / "model") == sums(whole.dir / "model")
    assert checkpoint_sums(tmp_path / "cut") == checkpoint_sums(whole.dir)
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (whole.dir / "metrics.jsonl").read_bytes()


def spawn(folder: Path, name: str) -> subprocess.Popen[bytes]:
    program = (
        "import sys; from pathlib import Path; from tests.train import toy; from thawline.train.loop import train;"
        "from thawline.train.recipe import read_recipe; from thawline.train.monitor import PlainMonitor;"
        "folder = Path(sys.argv[1]);"
        "train(read_recipe(folder / 'toy.yaml'), toy.ToyTask(), folder / sys.argv[2],"
        " monitor=PlainMonitor(out=sys.stdout, interval_s=0))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder), name],
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )


def test_the_negative_control_an_unkeyed_generator_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(tmp_path)
    monkeypatch.setattr("thawline.train.step.seed_all", lambda key: None)
    whole = run(tmp_path, "whole")
    with pytest.raises(Stopped):
        run(tmp_path, "cut", monitor=AtStep(6))
    torch.manual_seed(12345)
    going_on = run(tmp_path, "cut")
    assert sums(going_on.dir / "model") != sums(whole.dir / "model")


def test_a_changed_recipe_is_refused_key_by_key_and_allowed_by_name(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    with pytest.raises(Stopped):
        run(tmp_path, "run", monitor=AtStep(4))
    with pytest.raises(RecipeError) as caught:
        run(tmp_path, "run", ["optim.lr=0.5", "run.workers=1"])
    assert "optim.lr: 0.01 -> 0.5" in str(caught.value)
    assert "--allow optim.lr" in str(caught.value)
    assert "run.workers" not in str(caught.value)
    result = run(tmp_path, "run", ["optim.lr=0.5"], allow=["optim.lr"])
    resumed = [e for e in read_rows(result.dir / "events.jsonl") if e["event"] == "resumed"]
    assert resumed[-1]["grade"] == "CONTINUES"


def test_one_bad_sample_costs_one_sample(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    result = run(tmp_path, "run", ["options={bad: [17]}", "run.epochs=1", "run.checkpoint.best=null"])
    listed = [e for e in read_rows(result.dir / "events.jsonl") if e["event"] == "bad sample"]
    assert [e["key"] for e in listed] == ["p17"]
    assert "cannot be read" in listed[0]["reason"]


def test_too_many_bad_samples_stop_the_run_with_exit_code_3_and_a_checkpoint(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    with pytest.raises(DataError, match=r"could not be read, more than the stated share of 5.0%") as caught:
        run(tmp_path, "run", ["options={bad: [1, 2, 3, 4, 5]}", "data.max_bad=0.05"])
    assert caught.value.exit_code == 3
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_loss_that_is_not_finite_skips_the_update_and_is_recorded(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    result = run(tmp_path, "run", ["options={poison: [9]}", "run.epochs=1", "run.checkpoint.best=null"])
    skipped = [e for e in read_rows(result.dir / "events.jsonl") if e["event"] == "skipped step"]
    assert len(skipped) == 1
    assert "p9" in skipped[0]["keys"]
    assert all(torch.isfinite(t).all() for t in load_file(result.dir / "model" / "weights.safetensors").values())
    rows = [r for r in read_rows(result.dir / "metrics.jsonl") if r.get("loss") == "nan"]
    assert len(rows) == 1


def test_many_skipped_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    with pytest.raises(ThawlineError, match="3 steps in a row"):
        run(tmp_path, "run", [f"options={{poison: {list(range(50))}}}", "run.nonfinite.limit=3"])


def test_a_second_trainer_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    recipe = read_recipe(tmp_path / "toy.yaml")
    seen: list[str] = []

    class Intruder(AtStep):
        def begin(self, **_: Any) -> None:
            with pytest.raises(RecipeError, match="another process is training"):
                train(recipe, ToyTask(), tmp_path / "run")
            seen.append("refused")

    train(recipe, ToyTask(), tmp_path / "run", monitor=Intruder(0))
    assert seen == ["refused"]


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    first = run(tmp_path, "run")
    before = sums(first.dir / "model")
    again = run(tmp_path, "run")
    assert again.step == first.step
    assert sums(again.dir / "model") == before


def test_going_back_to_an_earlier_checkpoint_gives_the_same_end(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    first = run(tmp_path, "run", ["run.checkpoint.keep=100"])
    before = sums(first.dir / "model")
    again = run(tmp_path, "run", ["run.checkpoint.keep=100"], from_step=6)
    assert sums(again.dir / "model") == before


def test_the_best_checkpoint_is_what_is_exported(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    result = run(tmp_path, "run", ["optim.lr=0.2", "optim.schedule.name=constant"])
    history = [r for r in read_rows(result.dir / "metrics.jsonl") if "valid/loss" in r]
    best = min(history, key=lambda r: r["valid/loss"])
    kept = result.dir / "checkpoints" / f"step-{best['step']:08d}" / "delta.safetensors"
    assert kept.exists()
    exported = load_file(result.dir / "model" / "weights.safetensors")
    saved = load_file(kept)
    assert all(torch.equal(exported[name], saved[name]) for name in saved)


def test_an_unknown_best_metric_is_refused_with_those_there_are(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    with pytest.raises(RecipeError, match="gives no 'valid/wer'"):
        run(tmp_path, "run", ["run.checkpoint.best=valid/wer"])


def test_a_random_start_becomes_a_base_like_any_other(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    result = run(tmp_path, "run", ["init=random", 'plan={train: ["**"]}'])
    assert (result.dir / "base" / "weights.safetensors").exists()
    assert json.loads((result.dir / "base.json").read_text())["path"] == str(result.dir / "base")
    again = run(tmp_path, "other", ["init=random", 'plan={train: ["**"]}'])
    assert sums(again.dir / "model") == sums(result.dir / "model")


def test_what_trains_is_in_training_mode_and_what_is_frozen_is_not(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    made = run(tmp_path, "run", ["run.checkpoint.best=null", 'plan={train: ["body.1", head]}', "run.epochs=1"])
    base = load_file(tmp_path / "base" / "weights.safetensors")
    weights = load_file(made.dir / "model" / "weights.safetensors")
    assert not torch.equal(base["body.1.running_mean"], weights["body.1.running_mean"])
    assert int(weights["body.1.num_batches_tracked"]) == 13  # every micro-batch of the epoch


def test_a_part_that_gets_no_gradient_ends_the_run_at_its_first_step_with_the_reason(tmp_path: Path) -> None:
    write_recipe(tmp_path)

    class Detached(ToyTask):
        def loss(self, model: Any, batch: Any) -> Any:
            error = (model.head(model.body(batch.x).detach()).squeeze(-1) - batch.y).square().sum()
            return PlainSums({"square": SumTerm(error, "points")}, {})

    with pytest.raises(LawBroken, match=r"got no gradient.*body\.0\.weight") as caught:
        train(read_recipe(tmp_path / "toy.yaml", ['plan={train: ["**"]}']), Detached(), tmp_path / "run")
    assert caught.value.exit_code == 5
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_adapters_train_resume_and_are_merged_into_the_export(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    write_recipe(tmp_path)

    class Merging(ToyTask):
        def export(self, model: Any, folder: Path) -> None:
            super().export(merged_copy(model), folder)

    plan = ['plan={train: [head], lora: {target: "body.0", r: 2, alpha: 4}}', "run.checkpoint.best=null"]

    def go(name: str, **options: Any) -> Run:
        return train(read_recipe(tmp_path / "toy.yaml", plan), Merging(), tmp_path / name, **options)

    whole = go("whole")
    with pytest.raises(Stopped):
        go("cut", monitor=AtStep(9))
    assert sums(go("cut").dir / "model") == sums(whole.dir / "model")
    base = load_file(tmp_path / "base" / "weights.safetensors")
    made = load_file(whole.dir / "model" / "weights.safetensors")
    assert made.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], made[name])}
    assert changed == {"body.0.weight", "head.weight", "head.bias"}


def test_a_skipped_step_leaves_the_statistics_as_they_were(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    everything = ["options={poison: [9]}", 'plan={train: ["**"]}', "run.epochs=1", "run.checkpoint.best=null"]
    made = run(tmp_path, "run", everything)
    counted = load_file(made.dir / "model" / "weights.safetensors")["body.1.num_batches_tracked"]
    assert int(counted) == 11  # 13 micro-batches, two of them in the step that was skipped


def test_a_run_takes_more_epochs_when_the_recipe_is_allowed_to_change(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    first = run(tmp_path, "run", ["run.epochs=1", "run.checkpoint.best=null"])
    before = sums(first.dir / "model")
    longer = run(tmp_path, "run", ["run.checkpoint.best=null"], allow=["run.epochs"])
    assert longer.step == 21
    assert sums(longer.dir / "model") != before


def test_going_back_gives_up_what_came_after(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    run(tmp_path, "run", ["run.checkpoint.keep=100"])
    with pytest.raises(Stopped):
        run(tmp_path, "run", ["run.checkpoint.keep=100"], from_step=6, monitor=AtStep(7))
    kept = sorted(int(p.name[5:]) for p in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert kept == [3, 6, 7]


class Cramped(ToyTask):
    """Runs out of memory on more than `most` points, at the `at`-th such batch and after: before the pass, or after
    the forward pass has moved the statistics."""

    def __init__(self, most: int, *, late: bool, at: int = 0) -> None:
        self.most, self.late, self.at, self.calls = most, late, at, 0

    def loss(self, model: Any, batch: Any) -> Any:
        self.calls += 1
        full = len(batch.keys) > self.most and self.calls > self.at
        if full and not self.late:
            raise torch.OutOfMemoryError("no room")
        sums = super().loss(model, batch)
        if full:
            raise torch.OutOfMemoryError("no room")
        return sums


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("at", [0, 1])
def test_what_does_not_fit_is_halved_and_gives_what_a_run_started_so_would(tmp_path: Path, late: bool, at: int) -> None:
    write_recipe(tmp_path)
    overrides = ['plan={train: ["**"]}', "run.epochs=1", "run.checkpoint.best=null", "options={n: 48}"]
    recipe = read_recipe(tmp_path / "toy.yaml", overrides)
    cramped = train(recipe, Cramped(2, late=late, at=at), tmp_path / "cramped")
    splits = [e for e in read_rows(cramped.dir / "events.jsonl") if e["event"] == "out of memory"]
    assert [(e["step"], e["split"]) for e in splits] == [(0, 2)]
    begun_so = run(tmp_path, "begun", [*overrides, "run.micro_batch=2"])
    assert sums(cramped.dir / "model") == sums(begun_so.dir / "model")


def test_what_never_fits_ends_the_run_with_advice(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    with pytest.raises(ThawlineError, match="even one sample at a time"):
        train(read_recipe(tmp_path / "toy.yaml"), Cramped(0, late=False), tmp_path / "run")
