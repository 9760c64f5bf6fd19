"""A run that changes the units: kept rows bit for bit, new ones named, and everything after works as for any base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cli.speech_fixture import RECIPE, UNITS, write_all

import thawline as tl
from thawline.data.text import read_units
from thawline.tasks.asr import SpeechTask
from thawline.tasks.recognition import Recognizer
from thawline.tasks.runs import open_recipe, resume, train
from thawline.tasks.speech_weights import notes_of

# e moves, g and h go, x and y come; sos/eos moves to the end
NEW = ["<blank>", "<unk>", "▁", "e", "a", "b", "c", "d", "f", "x", "y", "z", "<sos/eos>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("units")
    write_all(place)
    (place / "new_units.txt").write_text("".join(f"{unit} {i}\n" for i, unit in enumerate(NEW)))
    text = RECIPE.replace("plan:", "options: {units: new_units.txt}\nplan:")
    (place / "recipe.yaml").write_text(text)
    train(place / "recipe.yaml", {"run.steps": 3}, run=place / "run")
    return place


def built(folder: Path) -> tuple[SpeechTask, Any]:
    recipe, task = open_recipe(folder / "recipe.yaml")
    assert isinstance(task, SpeechTask)
    return task, task.build(recipe)


def test_rows_of_shared_units_are_the_bases_and_new_ones_are_named(folder: Path) -> None:
    base = tl.load(folder / "base").state_dict()
    task, model = built(folder)
    state = model.state_dict()
    assert state["ctc.ctc_lo.weight"].shape == (13, 16)
    for name in ("ctc.ctc_lo.weight", "ctc.ctc_lo.bias", "decoder.embed.0.weight", "decoder.output_layer.weight"):
        for unit in set(UNITS) & set(NEW):
            assert torch.equal(state[name][NEW.index(unit)], base[name][UNITS.index(unit)]), (name, unit)
    others = [n for n in base if base[n].shape == state[n].shape]
    assert all(torch.equal(base[n], state[n]) for n in others)
    assert task.notes == (
        "13 units: 10 keep their rows, 3 (x y z) new (drawn around the mean of the kept rows), 2 (g h) dropped",
    )
    assert model.config.eos == 12


def test_building_again_gives_the_same_rows_and_another_seed_gives_others(folder: Path) -> None:
    _, one = built(folder)
    torch.manual_seed(123)
    _, two = built(folder)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    recipe, task = open_recipe(folder / "recipe.yaml", {"run.seed": 8})
    other = task.build(recipe).state_dict()["ctc.ctc_lo.weight"]
    assert not torch.equal(other[NEW.index("x")], one.state_dict()["ctc.ctc_lo.weight"][NEW.index("x")])
    assert torch.equal(other[NEW.index("a")], one.state_dict()["ctc.ctc_lo.weight"][NEW.index("a")])


def test_the_result_spells_with_the_new_units_and_wenet_can_read_it(folder: Path) -> None:
    model = folder / "run" / "model"
    assert list(read_units(model / "units.txt")) == NEW
    changed = json.loads((model / "vocabulary.json").read_text())
    assert (changed["new"], changed["dropped"], changed["kept"]) == (["x", "y", "z"], ["g", "h"], 10)
    import yaml

    values = yaml.safe_load((model / "train.yaml").read_text())
    assert (values["output_dim"], values["vocab_size"]) == (13, 13)
    assert values["tokenizer_conf"]["special_tokens"] == {"<blank>": 0, "<unk>": 1, "<sos>": 12, "<eos>": 12}
    assert values["tokenizer_conf"]["symbol_table_path"] == "units.txt"
    assert list(Recognizer.open(model).tokenizer.vocabulary) == NEW


def test_run_checkpoint_and_result_load_alike_and_the_audit_holds(folder: Path) -> None:
    from thawline.tasks.auditing import audit_run

    checkpoint = sorted((folder / "run" / "checkpoints").glob("step-*"))[-1]
    finished = tl.load(folder / "run").state_dict()
    for other in (tl.load(checkpoint), tl.load(checkpoint, base=folder / "base"), tl.load(folder / "run" / "model")):
        assert all(torch.equal(finished[name], tensor) for name, tensor in other.state_dict().items())
    assert not audit_run(folder / "run").broken
    recognizer = Recognizer.open(checkpoint)
    assert list(recognizer.tokenizer.vocabulary) == NEW
    assert recognizer.evaluate(folder / "dev.list").metrics["utterances"] == 4


def test_a_stopped_run_goes_on_and_ends_in_the_same_bits(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000003")
    resume(tmp_path / "run")
    one, two = (tl.load(place / "run").state_dict() for place in (folder, tmp_path))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_same_units_change_nothing_and_are_not_mentioned(folder: Path, tmp_path: Path) -> None:
    recipe, task = open_recipe(folder / "recipe.yaml", {"options.units": str(folder / "base" / "units.txt")})
    model = task.build(recipe)
    base = tl.load(folder / "base").state_dict()
    assert all(torch.equal(base[name], tensor) for name, tensor in model.state_dict().items())
    assert notes_of(model) == ()


@pytest.mark.parametrize(
    ("units", "message"),
    [
        (["<blank>", "<unk>", "a"], "the new units have no sos"),
        (["<unk>", "a", "<sos/eos>"], "the new units have no blank"),
    ],
)
def test_units_without_blank_or_end_are_refused(folder: Path, tmp_path: Path, units: list[str], message: str) -> None:
    (tmp_path / "u.txt").write_text("".join(f"{unit} {i}\n" for i, unit in enumerate(units)))
    recipe, task = open_recipe(folder / "recipe.yaml", {"options.units": str(tmp_path / "u.txt")})
    with pytest.raises(tl.RecipeError, match=message):
        task.build(recipe)


def test_ids_with_gaps_and_a_missing_file_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "u.txt").write_text("<blank> 0\n<unk> 1\n<sos/eos> 5\n")
    recipe, task = open_recipe(folder / "recipe.yaml", {"options.units": str(tmp_path / "u.txt")})
    with pytest.raises(tl.RecipeError, match=r"ids must be 0, 1, 2, \.\.\. without gaps"):
        task.build(recipe)
    recipe, task = open_recipe(folder / "recipe.yaml", {"options.units": str(tmp_path / "absent.txt")})
    with pytest.raises(tl.DataError, match=r"there is no such units\.txt"):
        task.build(recipe)
