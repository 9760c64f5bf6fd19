"""Moving averages of what trains: what they are, what they are used for, and what they leave alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.train.runs import AtStep, bits, checkpoints, events, run
from tests.train.toy import Net, ToyTask, write_recipe
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from thawline.ckpt.load import read_checkpoint
from thawline.errors import LawBroken, RecipeError, Stopped
from thawline.train.ema import Ema
from thawline.train.recipe import EmaSettings

ON = ["run.ema={decay: 0.9}"]
LAST = [*ON, "run.checkpoint.best=null"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights.safetensors")


def test_the_averages_are_those_that_torch_computes() -> None:
    model = nn.Linear(5, 3)
    ours = Ema(EmaSettings(decay=0.8, warmup=False), model, {})
    trainables = dict(model.named_parameters())
    ours.follow_(trainables)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    theirs.update_parameters(model)  # its first call copies
    for step in range(20):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        ours.update_(trainables, step)
        theirs.update_parameters(model)
    for name, average in theirs.module.named_parameters():
        # lerp there, a difference here: the same formula in another order of roundings
        torch.testing.assert_close(ours.averages[name], average.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("step", "decay"), [(0, 0.1), (1, 2 / 11), (90, 0.91), (10_000, 0.999)])
def test_the_decay_rises_to_what_the_recipe_says(step: int, decay: float) -> None:
    assert EmaSettings(decay=0.999).at(step) == decay
    assert EmaSettings(decay=0.999, warmup=False).at(step) == 0.999


def test_an_average_that_equals_its_weight_stays_bit_for_bit() -> None:
    model = nn.Linear(1000, 3)
    with torch.no_grad():
        model.weight[0] = -0.0
    ours = Ema(EmaSettings(), model, {})
    trainables = dict(model.named_parameters())
    ours.follow_(trainables)
    for step in range(50):
        ours.update_(trainables, step)
    for name, p in trainables.items():
        assert ours.averages[name].numpy().tobytes() == p.detach().numpy().tobytes()


def test_averages_of_half_precision_are_kept_in_single() -> None:
    model = nn.Linear(2, 2).to(torch.bfloat16)
    ours = Ema(EmaSettings(decay=0.999, warmup=False), model, {})
    trainables = dict(model.named_parameters())
    ours.follow_(trainables)
    before = ours.averages["weight"].clone()
    with torch.no_grad():
        model.weight.add_(1)
    ours.update_(trainables, 0)
    assert ours.averages["weight"].dtype == torch.float32
    # a thousandth of the way: lost in bfloat16, which has 8 bits of mantissa
    torch.testing.assert_close(ours.averages["weight"] - before, torch.full((2, 2), 1e-3), rtol=0.1, atol=0)


def test_in_its_place_the_model_holds_the_averages_and_then_its_own_weights_again() -> None:
    model = nn.Linear(3, 3)
    ours = Ema(EmaSettings(), model, {"weight": torch.ones(3, 3)})
    own = model.weight.detach().clone()
    with ours.in_place():
        assert torch.equal(model.weight, torch.ones(3, 3))
    assert torch.equal(model.weight, own)


def test_the_export_is_the_average_and_the_checkpoint_holds_both(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    made = run(tmp_path, "run", LAST)
    newest = read_checkpoint(checkpoints(made.dir)[-1])
    exported = weights(made.dir / "model")
    assert set(newest.ema) == {"head.weight", "head.bias", "body.0.weight", "body.0.bias"}
    assert all(torch.equal(exported[name], average) for name, average in newest.ema.items())
    assert not torch.equal(exported["head.weight"], newest.delta["head.weight"])
    plain = run(tmp_path, "plain", ["run.checkpoint.best=null"])
    assert torch.equal(weights(plain.dir / "model")["head.weight"], newest.delta["head.weight"])


def test_evaluations_are_of_the_average(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    made = run(tmp_path, "run", LAST)
    model = Net()
    model.load_state_dict(weights(made.dir / "model"))
    task = ToyTask()
    samples = task.samples(_recipe(tmp_path), model, "valid")
    batch = samples.collate([samples.read(i, 0) for i in range(10)])
    with torch.no_grad():
        found = task.evaluate(model.eval(), samples, iter([batch])).metrics["loss"]
    assert made.metrics["valid/loss"] == pytest.approx(found, rel=1e-6)  # summed in other batches there


def test_the_best_checkpoint_is_exported_with_its_own_average(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    made = run(tmp_path, "run", [*ON, "optim.lr=0.3", "optim.schedule.name=constant", "run.epochs=6"])
    best = min((e for e in _evaluations(made.dir)), key=lambda row: row["valid/loss"])
    assert best["step"] < made.step
    kept = read_checkpoint(made.dir / "checkpoints" / f"step-{best['step']:08d}")
    exported = weights(made.dir / "model")
    assert all(torch.equal(exported[name], average) for name, average in kept.ema.items())


def test_what_is_frozen_is_the_base_in_the_average_too(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    made = run(tmp_path, "run", [*LAST, "plan.thaw=[]"])
    base, exported = weights(tmp_path / "base"), weights(made.dir / "model")
    assert {n for n in base if not torch.equal(base[n], exported[n])} == {"head.weight", "head.bias"}


def test_the_negative_control_averages_that_move_what_is_frozen_break_the_law(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(tmp_path)
    usual = Ema.follow_

    def follow_(self: Ema, trainables: Any) -> None:
        usual(self, trainables)
        self.averages["body.1.weight"] = torch.full((8,), 0.5)

    monkeypatch.setattr(Ema, "follow_", follow_)
    with pytest.raises(LawBroken, match=r"body\.1\.weight"):
        run(tmp_path, "run", LAST)
    assert not (tmp_path / "run" / "model").exists()


def test_what_thaws_later_enters_the_average_with_its_value_then(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    made = run(tmp_path, "run", [*LAST, "run.checkpoint.keep=100", "run.checkpoint.every=1 steps"])
    base = weights(tmp_path / "base")["body.0.weight"]
    before, entered, moved = (read_checkpoint(made.dir / "checkpoints" / f"step-{s:08d}").ema for s in (6, 7, 8))
    assert "body.0.weight" not in before
    assert torch.equal(entered["body.0.weight"], base)
    assert not torch.equal(moved["body.0.weight"], base)


def test_a_skipped_step_does_not_move_the_average(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    options = ["options={poison: [9]}", "run.checkpoint.keep=100", "run.checkpoint.every=1 steps"]
    made = run(tmp_path, "run", [*LAST, *options, "run.epochs=1"])
    (skipped,) = events(made.dir, "skipped step")
    before, after = (
        read_checkpoint(made.dir / "checkpoints" / f"step-{s:08d}").ema for s in (skipped["step"] - 1, skipped["step"])
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("stop_after", [3, 7, 8])
def test_a_run_with_averages_goes_on_bit_for_bit(tmp_path: Path, stop_after: int) -> None:
    write_recipe(tmp_path)
    whole = run(tmp_path, "whole", ON)
    with pytest.raises(Stopped):
        run(tmp_path, "cut", ON, monitor=AtStep(stop_after))
    assert bits(run(tmp_path, "cut", ON).dir) == bits(whole.dir)


def test_the_negative_control_averages_begun_anew_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(tmp_path)
    whole = run(tmp_path, "whole", ON)
    with pytest.raises(Stopped):
        run(tmp_path, "cut", ON, monitor=AtStep(6))
    monkeypatch.setattr("thawline.train.opening.Ema", lambda settings, model, kept: Ema(settings, model, {}))
    assert bits(run(tmp_path, "cut", ON).dir) != bits(whole.dir)


def test_averages_begin_in_a_run_that_had_none_only_where_that_is_allowed(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    with pytest.raises(Stopped):
        run(tmp_path, "run", monitor=AtStep(6))
    with pytest.raises(RecipeError, match=r"--allow run\.ema"):
        run(tmp_path, "run", ON)
    run(tmp_path, "run", ON, allow=["run.ema"])
    assert events(tmp_path / "run", "resumed")[-1]["grade"] == "CONTINUES"


class Tied(ToyTask):
    """The toy with a weight that has two names."""

    def build(self, recipe: Any) -> nn.Module:
        model = super().build(recipe)
        model.other = model.head
        return model

    def export(self, model: nn.Module, folder: Path) -> None:
        super().export(_untied(model), folder)


def _untied(model: nn.Module) -> nn.Module:
    plain = Net()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("other.")})
    return plain


def test_a_tied_weight_has_one_average_under_both_names(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    plan = "plan={train: [head, other]}"
    made = run(tmp_path, "run", [*LAST, plan], task=Tied())
    folder = checkpoints(made.dir)[-1]
    assert set(load_file(folder / "ema.safetensors")) == {"head.bias", "head.weight"}
    kept = read_checkpoint(folder).ema
    assert set(kept) == {"head.bias", "head.weight", "other.bias", "other.weight"}
    assert torch.equal(kept["other.weight"], weights(made.dir / "model")["head.weight"])
    with pytest.raises(Stopped):
        run(tmp_path, "cut", [*LAST, plan], task=Tied(), monitor=AtStep(4))
    assert bits(run(tmp_path, "cut", [*LAST, plan], task=Tied()).dir) == bits(made.dir)


def _evaluations(run_dir: Path) -> list[dict[str, Any]]:
    from thawline.train.rundir import read_rows

    return [row for row in read_rows(run_dir / "metrics.jsonl") if "valid/loss" in row]


def _recipe(folder: Path) -> Any:
    from thawline.train.recipe import read_recipe

    return read_recipe(folder / "toy.yaml")
