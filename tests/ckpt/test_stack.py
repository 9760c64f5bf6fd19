"""Deltas over deltas: base + stage 2 + stage 3 + stage 4, made by conversion, by runs, and by both."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tests.train.runs import checkpoints, run
from tests.train.toy import Net, write_recipe
from torch import Tensor

from thawline.ckpt.convert import convert
from thawline.ckpt.delta import BaseRef, apply, read_delta, stack
from thawline.ckpt.source import open_source
from thawline.ckpt.tensors import SourceTensors
from thawline.errors import BaseMismatch, CheckpointError
from thawline.freeze.plan import FreezePlan
from thawline.train.law import Law
from thawline.train.rundir import RunDirectory


def stage(number: int) -> dict[str, Tensor]:
    """A model in which every stage changed another tensor, and the last one added one too."""
    torch.manual_seed(0)
    tensors = {name: torch.randn(3, 2) for name in "abcd"} | {"steps": torch.tensor(5)}
    for changed in "abc"[:number]:
        tensors[changed] = tensors[changed] + 1
    return tensors | ({"new": torch.ones(2)} if number == 3 else {})


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """full0.pt to full3.pt, and d1 to d3, each over the one before."""
    for number in range(4):
        torch.save(stage(number), tmp_path / f"full{number}.pt")
    for number, base in ((1, "full0.pt"), (2, "d1.safetensors"), (3, "d2.safetensors")):
        convert(tmp_path / f"full{number}.pt", tmp_path / f"d{number}.safetensors", to="delta", base=tmp_path / base)
    return tmp_path


def tensors_of(path: Path) -> dict[str, Tensor]:
    with open_source(path) as source:
        return dict(SourceTensors(source))


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_three_deltas_made_by_conversion_give_the_last_model_and_record_their_order(made: Path) -> None:
    convert(made / "d3.safetensors", made / "whole.pt", to="torch", base=made / "d2.safetensors")
    assert same(torch.load(made / "whole.pt", weights_only=True), stage(3))
    deltas = [(f"d{n}", read_delta(made / f"d{n}.safetensors")) for n in (1, 2, 3)]
    prints = [BaseRef.of(stage(number)).fingerprint for number in range(4)]
    assert [delta.base.below for _, delta in deltas] == [(), (prints[0],), (prints[0], prints[1])]
    assert deltas[2][1].base.below == deltas[1][1].result.below  # as it is where no file is written
    assert same(dict(apply(stage(0), stack(deltas))), stage(3))


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("full0.pt", "2 deltas, each made over the one before, have to be applied first; the last of them is {d2}"),
        ("d1.safetensors", "a delta made over it has to be applied first; the last of them is {d2}"),
    ],
)
def test_a_delta_left_out_is_asked_for_by_name(base: str, said: str, made: Path) -> None:
    with pytest.raises(BaseMismatch) as caught:
        convert(made / "d3.safetensors", made / "x.pt", to="torch", base=made / base)
    assert f"the given one lies below: {said.format(d2=made / 'd2.safetensors')}" in str(caught.value)
    assert not (made / "x.pt").exists()


def test_a_wrong_order_is_refused_by_name(made: Path) -> None:
    with pytest.raises(BaseMismatch, match="belongs to another base") as caught:
        convert(made / "d2.safetensors", made / "x.pt", to="torch", base=made / "d3.safetensors")
    assert "tensors differ, first: 'b'" in str(caught.value)
    deltas = [(name, read_delta(made / f"{name}.safetensors")) for name in ("d1", "d3", "d2")]
    with pytest.raises(BaseMismatch, match="made in another order: d1 -> d2 -> d3"):
        stack(deltas)


def test_a_delta_in_the_middle_whose_own_base_is_gone_says_how_to_go_on(made: Path) -> None:
    (made / "full0.pt").rename(made / "moved.pt")
    with pytest.raises(CheckpointError, match=r"over a base that is not given; it was .*full0\.pt") as caught:
        convert(made / "d3.safetensors", made / "x.pt", to="torch", base=made / "d2.safetensors")
    assert f"thawline convert {made / 'd1.safetensors'} FULL --to safetensors --base BASE" in caught.value.fix
    convert(made / "d1.safetensors", made / "f1.safetensors", to="safetensors", base=made / "moved.pt")
    convert(made / "d2.safetensors", made / "f2.safetensors", to="safetensors", base=made / "f1.safetensors")
    convert(made / "d3.safetensors", made / "f3.safetensors", to="safetensors", base=made / "f2.safetensors")
    assert same(tensors_of(made / "f3.safetensors"), stage(3))


def test_a_stack_becomes_one_delta_over_the_lowest_base(made: Path) -> None:
    report = convert(made / "d3.safetensors", made / "all.safetensors", to="delta", base=made / "full0.pt")
    assert set(report.digests) == {"a", "b", "c", "new"}
    assert same(dict(apply(stage(0), read_delta(made / "all.safetensors"))), stage(3))


def test_a_delta_without_its_base_is_not_taken_for_a_model_to_subtract_from(made: Path) -> None:
    (made / "d2.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is itself a delta, and what it was made over is not there") as caught:
        convert(made / "d3.safetensors", made / "all.safetensors", to="delta", base=made / "full0.pt")
    assert "make it whole first" in caught.value.fix
    assert not (made / "all.safetensors").exists()


def test_a_recorded_base_is_found_from_another_working_directory(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    convert("full1.pt", "near.safetensors", to="delta", base="full0.pt")
    (made / "elsewhere").mkdir()
    monkeypatch.chdir(made / "elsewhere")
    assert same(tensors_of(made / "near.safetensors"), stage(1))
    assert os.path.isabs(read_delta(made / "near.safetensors").base.path)


def test_runs_over_runs_record_their_order(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    options = ["run.epochs=1", "run.checkpoint.best=null"]
    results = [tmp_path / "base"]
    for name in ("one", "two", "three"):
        results.append(run(tmp_path, name, [*options, f"model={results[-1]}"]).dir / "model")
    prints = [BaseRef.of(tensors_of(place)).fingerprint for place in results]
    last = checkpoints(tmp_path / "three")[-1]
    assert read_delta(last / "delta.safetensors").base.below == tuple(prints[:2])
    assert BaseRef.read(tmp_path / "three" / "base.json").below == tuple(prints[:2])
    convert(last / "delta.safetensors", tmp_path / "x.pt", to="torch", base=results[2])
    assert same(torch.load(tmp_path / "x.pt", weights_only=True), tensors_of(results[3]))
    with pytest.raises(BaseMismatch, match="the given one lies below: 2 deltas, each made over the one before"):
        convert(last, tmp_path / "y.pt", to="torch", base=results[0])
    # A resumed run keeps what it recorded when it began.
    run(tmp_path, "three", [*options, f"model={results[2]}", "run.epochs=2"], allow=["run.epochs"])
    assert BaseRef.read(tmp_path / "three" / "base.json").below == tuple(prints[:2])


def test_conversions_and_runs_stack_on_each_other(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    first = run(tmp_path, "one", ["run.epochs=1", "run.checkpoint.best=null"]).dir
    second = {name: tensor + 1 for name, tensor in tensors_of(first / "model").items()}
    torch.save(second, tmp_path / "second.pt")
    convert(tmp_path / "second.pt", tmp_path / "d2.safetensors", to="delta", base=first)
    base = BaseRef.read(first / "base.json").fingerprint
    assert read_delta(tmp_path / "d2.safetensors").base.below == (base,)
    model = Net()
    model.load_state_dict(second)
    files = RunDirectory(tmp_path / "three")
    law = Law.open(FreezePlan(train=["head"]), model, files, seed=0, source=tmp_path / "d2.safetensors")
    assert law.base.below == (base, BaseRef.of(tensors_of(first / "model")).fingerprint)
    assert law.base.made == ()


TIED = torch.arange(6.0).reshape(3, 2)


@pytest.mark.parametrize("to", ["torch", "safetensors", "hf"])
@pytest.mark.parametrize(
    ("embed", "head"),
    [(TIED + 1, TIED), (TIED, TIED + 1), (TIED + 1, TIED + 2)],
    ids=["one of them changed", "the other one changed", "both changed apart"],
)
def test_what_was_tied_in_the_base_and_is_no_more_keeps_its_own_values(
    embed: Tensor, head: Tensor, to: str, tmp_path: Path
) -> None:
    torch.save({"embed": TIED, "head": TIED}, tmp_path / "base.pt")
    full = {"embed": embed.clone(), "head": head.clone()}
    torch.save(full, tmp_path / "full.pt")
    convert(tmp_path / "full.pt", tmp_path / "d.safetensors", to="delta", base=tmp_path / "base.pt")
    report = convert(tmp_path / "d.safetensors", tmp_path / "made", to=to, base=tmp_path / "base.pt")
    assert not report.tied
    assert same(tensors_of(tmp_path / "made"), full)


@pytest.mark.parametrize("to", ["torch", "safetensors"])
def test_what_the_base_ties_follows_the_tensor_that_a_part_of_a_model_gives(to: str, tmp_path: Path) -> None:
    torch.save({"embed": TIED, "head": TIED, "rest": torch.ones(1)}, tmp_path / "base.pt")
    torch.save({"embed": TIED + 1}, tmp_path / "part.pt")
    report = convert(tmp_path / "part.pt", tmp_path / "made", to=to, base=tmp_path / "base.pt")
    made = tensors_of(tmp_path / "made")
    assert torch.equal(made["embed"], TIED + 1)
    assert torch.equal(made["head"], TIED + 1)
    assert "tied in the base, and so as in the checkpoint: 'head'" in report.notes
