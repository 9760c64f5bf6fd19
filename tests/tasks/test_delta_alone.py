"""A delta away from its run, whose run changed the base before it began: a new head, a replaced norm, other units."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cli.speech_fixture import RECIPE as SPEECH
from tests.cli.speech_fixture import UNITS, write_all
from tests.tasks.test_vision import write_hf
from tests.tasks.vision_cases import run_case, tiny, write_case

import thawline as tl
from thawline.ckpt.convert import convert
from thawline.ckpt.delta import BaseRef, delta_of, read_delta, write_delta
from thawline.ckpt.source import made_by_builder
from thawline.cli.app import run
from thawline.tasks.kinds import kind_of
from thawline.tasks.restoring import restore_
from thawline.tasks.runs import train
from thawline.tasks.vision_classifier import Classifier

PLAIN = "plan={train: [classifier]}"


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of four classes, and a Hugging Face classifier of another number of them."""
    folder = tmp_path_factory.mktemp("vision")
    write_case(folder)
    write_hf(folder / "vit", "vit")
    return folder


def alone(case: Path, name: str, *overrides: str, model: str = "vit") -> tuple[Path, Path]:
    """A run, and its newest delta taken out of it."""
    options = [f"model={case / model}", 'options.model_fn=""', "data.conf={}", "run.epochs=1", *overrides]
    if not (case / name).is_dir():
        run_case(case, name, [*options, "run.checkpoint.best=null"])
    newest = sorted((case / name / "checkpoints").glob("step-*"))[-1]
    return newest, Path(shutil.copyfile(newest / "delta.safetensors", case / f"{name}.safetensors"))


def test_a_delta_with_a_new_head_needs_nothing_but_its_base(case: Path, tmp_path: Path) -> None:
    newest, delta = alone(case, "plain", PLAIN)
    assert read_delta(delta).base.made == ("classifier.bias", "classifier.weight")
    report = convert(delta, tmp_path / "m.safetensors", to="safetensors", base=case / "vit")
    assert same(load_file(tmp_path / "m.safetensors"), load_file(case / "plain" / "model" / "model.safetensors"))
    assert any("'classifier.bias', 'classifier.weight'; what lies there beside" in note for note in report.notes)
    assert kind_of(delta) == "vision"
    assert same(dict(tl.load(delta, case / "vit").state_dict()), dict(tl.load(newest).state_dict()))
    image = case / "valid" / "red" / "00.png"
    mine, theirs = (Classifier.open(path).predict([image])[0].classes for path in (delta, newest))
    assert [chance for _, chance in mine] == [chance for _, chance in theirs]
    assert {name for name, _ in mine} == {f"LABEL_{i}" for i in range(4)}  # the names are in the run


def test_the_bases_description_does_not_travel_with_a_new_head(case: Path, tmp_path: Path) -> None:
    _, delta = alone(case, "plain", PLAIN)
    convert(delta, tmp_path / "hf", to="hf", base=case / "vit")
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["model.safetensors"]
    assert run(["export", str(delta), str(tmp_path / "exported"), "--base", str(case / "vit")]) == 0
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert list(config["id2label"].values()) == [f"LABEL_{i}" for i in range(4)]


def test_a_new_head_of_the_same_size_is_known_too(case: Path, tmp_path: Path) -> None:
    alone(case, "plain", PLAIN)
    _, delta = alone(case, "again", PLAIN, "options.classes=[red, blue, green, yellow]", model="plain/model")
    assert read_delta(delta).base.made  # rows of known classes in another order
    convert(delta, tmp_path / "m.safetensors", to="safetensors", base=case / "plain" / "model")
    assert same(load_file(tmp_path / "m.safetensors"), load_file(case / "again" / "model" / "model.safetensors"))


def test_adapters_on_a_new_head_are_merged_into_it(case: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    plan = 'plan={train: ["@lora"], lora: {target: ["classifier"], r: 2}}'
    newest, delta = alone(case, "adapted", plan)
    convert(delta, tmp_path / "m.safetensors", to="safetensors", base=case / "vit")
    assert same(load_file(tmp_path / "m.safetensors"), load_file(case / "adapted" / "model" / "model.safetensors"))
    assert same(dict(tl.load(delta, case / "vit").state_dict()), dict(tl.load(newest).state_dict()))


def test_a_head_that_never_trained_is_missed_by_name(case: Path, tmp_path: Path) -> None:
    _, delta = alone(case, "frozen", 'plan={train: ["**.layernorm*"]}')
    with pytest.raises(tl.CheckpointError) as caught:
        convert(delta, tmp_path / "m.safetensors", to="safetensors", base=case / "vit")
    assert "2 tensors are neither in it nor in the base" in caught.value.what
    assert "'classifier.bias', 'classifier.weight'" in caught.value.what
    assert "thawline export RUN" in caught.value.fix
    assert not (tmp_path / "m.safetensors").exists()


def test_a_wrong_base_is_refused_whatever_the_run_made(case: Path, tmp_path: Path) -> None:
    _, delta = alone(case, "plain", PLAIN)
    shutil.copytree(case / "vit", tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    changed = next(name for name in tensors if name.endswith(("query.weight", "q_proj.weight")))
    save_file({n: t + 1 if n == changed else t for n, t in tensors.items()}, tmp_path / "other" / "model.safetensors")
    for use in (lambda: convert(delta, tmp_path / "m", to="torch", base=tmp_path / "other"),
                lambda: tl.load(delta, tmp_path / "other")):  # fmt: skip
        with pytest.raises(tl.BaseMismatch, match="belongs to another base"):
            use()


def test_an_older_delta_over_the_very_base_is_not_told_to_give_that_base(case: Path, tmp_path: Path) -> None:
    """Before the record of what a run made, nothing told such a delta from one over other weights."""
    base = load_file(case / "base.safetensors")
    drawn = base | {"head.weight": torch.zeros_like(base["head.weight"])}
    ref = BaseRef.of(drawn, path=str(case / "base.safetensors"))
    write_delta(tmp_path / "d.safetensors", delta_of(ref, drawn | {"head.weight": drawn["head.weight"] + 1}))
    with pytest.raises(tl.BaseMismatch, match=r"1 of \d+ tensors differ, first: 'head\.weight'") as caught:
        convert(tmp_path / "d.safetensors", tmp_path / "m", to="torch", base=case / "base.safetensors")
    assert "the run changed these before it began" in caught.value.fix
    assert "give the base" not in caught.value.fix


def test_what_a_builder_made_is_told_by_bytes_and_not_by_names(tmp_path: Path) -> None:
    held = {"a": torch.randn(2), "half": torch.randn(2).half(), "old.name": torch.randn(3)}
    save_file(held, tmp_path / "m.safetensors")
    built = {"a": held["a"], "half": held["half"].float(), "new.name": held["old.name"], "head": torch.randn(4)}
    digests = BaseRef.of(built).digests
    assert made_by_builder(digests, tmp_path / "m.safetensors") == ("head",)
    assert made_by_builder(digests, tmp_path / "absent") == ()
    assert made_by_builder(BaseRef.of({"x": torch.zeros(9)}).digests, tmp_path / "m.safetensors") == ()


def test_replaced_norms_are_written_as_tensors_and_not_put_into_the_bases_layers(tmp_path: Path) -> None:
    write_case(tmp_path)
    run_case(tmp_path, "r", ["run.epochs=1", "plan={train: [head], norms: groupnorm}", "run.checkpoint.best=null"])
    newest = sorted((tmp_path / "r" / "checkpoints").glob("step-*"))[-1]
    delta = read_delta(newest / "delta.safetensors")
    assert any(name.endswith("running_mean") for name in delta.removed)
    convert(
        newest / "delta.safetensors", tmp_path / "m.safetensors", to="safetensors", base=tmp_path / "base.safetensors"
    )
    have = load_file(tmp_path / "m.safetensors")
    model = tiny(4)
    with pytest.raises(tl.CheckpointError, match="the run replaced their layers, and by what is not in a delta"):
        restore_(model, delta, delta.base, source="d")
    assert same(have, load_file(tmp_path / "r" / "model" / "model.safetensors"))


def test_other_units_are_written_as_tensors_and_not_taken_for_the_bases(tmp_path: Path) -> None:
    write_all(tmp_path)
    (tmp_path / "more.txt").write_text("".join(f"{unit} {i}\n" for i, unit in enumerate([*UNITS, "i", "j"])))
    (tmp_path / "r.yaml").write_text(SPEECH + "options: {units: more.txt}\n")
    overrides = ["run.epochs=1", "run.checkpoint.best=null", 'plan.train=[ctc, "decoder"]']
    done = train(tmp_path / "r.yaml", overrides, run=tmp_path / "run").dir
    newest = sorted((done / "checkpoints").glob("step-*"))[-1]
    delta = shutil.copyfile(newest / "delta.safetensors", tmp_path / "d.safetensors")
    report = convert(delta, tmp_path / "m.pt", to="torch", base=tmp_path / "base")
    made, want = (torch.load(path, weights_only=True) for path in (tmp_path / "m.pt", done / "model" / "final.pt"))
    assert same(made, want)
    convert(delta, tmp_path / "wenet", to="wenet", base=tmp_path / "base")
    assert [path.name for path in (tmp_path / "wenet").iterdir()] == ["final.pt"]  # the base's units.txt would be wrong
    assert any("units" in note for note in report.notes)
    with pytest.raises(tl.CheckpointError, match=r"what they mean \(its units or classes\) is not in") as caught:
        tl.load(delta, tmp_path / "base")
    assert "give the run's folder" in caught.value.fix


def test_a_delta_that_was_put_where_its_base_was_is_refused_by_every_reader(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "base.pt")
    torch.save({"a": torch.ones(3)}, tmp_path / "new.pt")
    convert(tmp_path / "new.pt", tmp_path / "d.safetensors", to="delta", base=tmp_path / "base.pt")
    (tmp_path / "d.safetensors").replace(tmp_path / "base.pt")
    with pytest.raises(tl.CheckpointError, match="a base that is not there any more"):
        tl.load(tmp_path / "base.pt")
    with pytest.raises(tl.CheckpointError, match="a base that is not there any more"):
        tl.export(tmp_path / "base.pt", tmp_path / "out")
