"""The plan as a value: forms, refusals, canonical text."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from thawline.core.index import ModelIndex, ParamInfo
from thawline.errors import RecipeError
from thawline.freeze.plan import FreezePlan, Plateau


def stack(n: int) -> ModelIndex:
    names = [f"encoder.layers.{i}.{part}" for i in range(n) for part in ("weight", "bias")]
    return ModelIndex.from_header(
        ParamInfo(name=x, shape=(4, 4) if x.endswith("weight") else (4,), dtype="F32") for x in (*names, "head.weight")
    )


def test_a_plan_written_out_and_read_again_is_the_same_plan(tmp_path: Path):
    plan = FreezePlan(
        train=["ctc", {"select": "encoder.encoders[-2:]", "expect": 2}],
        norms={"encoder.**": "tracking"},
        lr=[{"encoder.**": 0.1}, {"decay": 0.9, "over": "encoder.encoders"}],
        no_decay=["@bias"],
        thaw=[
            {"after": "2 epochs", "train": "x", "lr": 0.1},
            {"over": "encoder.encoders", "from": "bottom", "every": "1 epoch"},
        ],
        lora={"target": "decoder.**.{q,v}_proj", "r": 4},
    )
    assert FreezePlan(**plan.to_dict()) == plan
    assert FreezePlan(**plan.to_dict()).digest == plan.digest


def test_one_selector_and_a_list_of_it_are_the_same_plan():
    assert FreezePlan(train="ctc").digest == FreezePlan(train=["ctc"]).digest
    assert FreezePlan(train="ctc").digest != FreezePlan(train="ctc", lr=0.5).digest


def test_a_file_may_be_the_plan_or_hold_it(tmp_path: Path):
    inner, outer = tmp_path / "plan.yaml", tmp_path / "recipe.yaml"
    inner.write_text("train:\n  - ctc\n  - encoder.encoders[-2:]\n", encoding="utf-8")
    outer.write_text("task: speech\nplan:\n  train:\n    - ctc\n    - encoder.encoders[-2:]\n", encoding="utf-8")
    assert FreezePlan.from_yaml(inner).to_dict() == FreezePlan.from_yaml(outer).to_dict()


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("train: [ctc]\nnroms: pinned\n", "2:1", "unknown key 'nroms'"),
        ("train: [ctc, encoder.encoders[-2:]]\n", "1:30", "needs quotes"),
        ("train:\n  - ctc\n  - {q: }\n", "3:5", 'needs quotes in YAML: "{q}..."'),
        ("train: [ctc]\nlr: {ctc: 0}\n", "2:1", "a rate of 0 is no freeze"),
        ("train: [ctc]\nthaw:\n  - {after: 2 lightyears, train: [x]}\n", "3:6", "not a stretch of training"),
        ("train: [ctc]\nthaw:\n  - {when: plateau(x, patience=0), train: [x]}\n", "3:", "is not"),
    ],
)
def test_a_fault_is_named_with_its_place(tmp_path: Path, text: str, place: str, message: str):
    path = tmp_path / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        FreezePlan.from_yaml(path)
    assert message in str(caught.value)
    assert caught.value.where.startswith(f"{path}:{place}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing is said to train"),
        ({"train": ["a"], "norms": "frozen"}, "norms"),
        ({"train": ["a"], "norms": {}}, "the mapping is empty"),
        ({"train": ["a"], "lr": 0}, "a rate of 0 is no freeze"),
        ({"train": ["a"], "lr": -1}, "positive number"),
        ({"train": ["a"], "lr": math.inf}, "positive number"),
        ({"train": ["a"], "lr": "fast"}, "lr takes a multiplier"),
        ({"train": [["a"]]}, "a list inside the list"),
        ({"train": ["a"], "thaw": [{"train": ["b"]}]}, "a phase needs after"),
        ({"train": ["a"], "thaw": [{"after": "1 epoch"}]}, "changes nothing"),
        ({"train": ["a"], "thaw": [{"after": "3 minutes", "train": ["b"]}]}, "not the clock"),
        ({"train": ["a"], "thaw": [{"over": "b"}]}, "needs every"),
        ({"train": ["a"], "thaw": [{"after": "1 epoch", "every": "1 epoch", "train": ["b"]}]}, "belong to over"),
        ({"train": ["a"], "thaw": [{"by": "1 epoch", "after": "1 epoch", "train": ["b"]}]}, "by: limits"),
        (
            {"train": ["a"], "thaw": [{"after": "3 epochs", "train": ["b"]}, {"after": "2 epochs", "train": ["c"]}]},
            "in order of time",
        ),
        ({"train": ["a"], "thaw": [{"when": "loss < 2", "train": ["b"]}]}, "not a condition"),
        ({"train": ["a"], "lora": {"r": 4}}, "'lora.target' is missing"),
    ],
)
def test_what_cannot_be_meant_is_a_recipe_error_in_python_too(settings: dict, message: str):
    with pytest.raises(RecipeError, match="(?s)" + message):
        FreezePlan(**settings)


def test_a_plateau_reads_its_settings_and_knows_which_way_is_better():
    assert Plateau.parse("plateau(valid/loss, patience=2)") == Plateau(metric="valid/loss", patience=2)
    assert Plateau.parse("plateau(valid/accuracy)").higher_is_better
    assert not Plateau.parse("plateau(valid/wer, min_delta=0.01)").higher_is_better
    assert Plateau.parse("plateau(x, mode=max)").higher_is_better
    with pytest.raises(RecipeError, match="unknown 'patients'"):
        Plateau.parse("plateau(x, patients=2)")


def test_thawing_over_a_list_becomes_a_phase_a_layer_from_the_top():
    plan = FreezePlan(train="head", thaw=[{"over": "encoder.layers", "from": "top", "every": "1 epoch"}])
    expanded = plan.expanded(stack(3))
    assert [(p.after, p.train) for p in expanded.thaw] == [
        ("1 epochs", ("encoder.layers.2",)),
        ("2 epochs", ("encoder.layers.1",)),
        ("3 epochs", ("encoder.layers.0",)),
    ]
    assert expanded.expanded(stack(3)) is expanded


def test_thawing_two_layers_at_a_time_from_the_bottom_begins_where_it_is_told():
    plan = FreezePlan(
        train="head",
        thaw=[
            {
                "over": "encoder.layers",
                "from": "bottom",
                "every": "100 steps",
                "after": "50 steps",
                "layers": 2,
                "lr": 0.1,
            }
        ],
    )
    phases = plan.expanded(stack(3)).thaw
    assert [(p.after, p.train) for p in phases] == [
        ("50 steps", ("encoder.layers.0", "encoder.layers.1")),
        ("150 steps", ("encoder.layers.2",)),
    ]
    assert phases[1].lr == (0.1,)


def test_layers_that_would_thaw_after_the_end_are_refused():
    plan = FreezePlan(train="head", thaw=[{"over": "encoder.layers", "every": "40%"}])
    with pytest.raises(RecipeError, match="would thaw after the end of the run"):
        plan.expanded(stack(3))
