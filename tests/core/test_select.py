"""Selectors: what each form names, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from thawline.core.index import ModelIndex, ParamInfo
from thawline.core.select import Item, items_of, layers_of, match, select, yaml_hint
from thawline.errors import SelectorError


def build_index(*names: str, modules: dict[str, tuple[str, ...]] | None = None) -> ModelIndex:
    infos = [ParamInfo(name=n, shape=(4,) if n.endswith("bias") or "norm" in n else (4, 4), dtype="F32") for n in names]
    if modules is None:
        return ModelIndex.from_header(infos)
    return ModelIndex(infos, (), modules)


LAYERS = [
    f"encoder.encoders.{i}.{part}"
    for i in range(12)
    for part in ("attn.q_proj.weight", "attn.q_proj.bias", "attn.v_proj.weight", "norm1.weight", "norm1.bias")
]
INDEX = build_index(
    "encoder.embed.out.weight", *LAYERS, "decoder.embed.0.weight", "decoder.out.weight", "ctc.lo.weight", "ctc.lo.bias"
)


@pytest.mark.parametrize(
    ("selector", "count", "first"),
    [
        ("ctc", 2, "ctc.lo.weight"),
        ("ctc.lo.bias", 1, "ctc.lo.bias"),
        ("encoder.encoders.1", 5, "encoder.encoders.1.attn.q_proj.weight"),
        ("encoder.encoders.*.attn", 36, "encoder.encoders.0.attn.q_proj.weight"),
        ("**.bias", 25, "encoder.encoders.0.attn.q_proj.bias"),
        ("**.norm*", 24, "encoder.encoders.0.norm1.weight"),
        ("**", 65, "encoder.embed.out.weight"),
        ("encoder.**.{q,v}_proj", 36, "encoder.encoders.0.attn.q_proj.weight"),
        ("encoder.encoders[0]", 5, "encoder.encoders.0.attn.q_proj.weight"),
        ("encoder.encoders[-2:]", 10, "encoder.encoders.10.attn.q_proj.weight"),
        ("encoder.encoders[1,3,-1]", 15, "encoder.encoders.1.attn.q_proj.weight"),
        ("encoder.encoders[0,-2:].norm1.bias", 3, "encoder.encoders.0.norm1.bias"),
        ("encoder.encoders[::4]", 15, "encoder.encoders.0.attn.q_proj.weight"),
        ("**.encoders[2].norm1", 2, "encoder.encoders.2.norm1.weight"),
        ("@bias", 25, "encoder.encoders.0.attn.q_proj.bias"),
        ("@norm", 24, "encoder.encoders.0.norm1.weight"),
        ("encoder.encoders[3].@norm", 2, "encoder.encoders.3.norm1.weight"),
        ("@norm.bias", 12, "encoder.encoders.0.norm1.bias"),
        ("@embedding", 1, "decoder.embed.0.weight"),
        (r"re:encoder\.encoders\.1\d\.attn\..*", 6, "encoder.encoders.10.attn.q_proj.weight"),
        (r"re:encoder\.encoders\.(0|3)", 10, "encoder.encoders.0.attn.q_proj.weight"),
        (["encoder", "!**.norm*", "ctc"], 39, "encoder.embed.out.weight"),
        (["encoder", "!encoder.encoders", "encoder.encoders[-1]"], 6, "encoder.embed.out.weight"),
        ({"select": "encoder.encoders[-2:]", "expect": 2}, 10, "encoder.encoders.10.attn.q_proj.weight"),
        ({"select": "ctc", "tensors": 2}, 2, "ctc.lo.weight"),
    ],
)
def test_a_selector_names_exactly_these_tensors(selector: object, count: int, first: str):
    names = select(selector, INDEX)
    assert (len(names), names[0]) == (count, first)


def test_a_path_ends_at_a_segment_so_layer_1_is_not_layer_10():
    assert {n.split(".")[2] for n in select("encoder.encoders.1", INDEX)} == {"1"}


def test_a_misspelt_segment_stops_and_names_the_likely_one():
    with pytest.raises(SelectorError) as caught:
        select("encodr.encoders[-2:]", INDEX, where="recipe.yaml:7:10")
    assert str(caught.value) == (
        "recipe.yaml:7:10: 'encodr.encoders[-2:]' matches none of the 65 tensors\n"
        "  fix: closest: encoder.encoders[-2:]; or delete the rule if the layer is gone"
    )


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("encoder.encoders[12]", r"\[12\] is out of range, there are 12 layers of encoder.encoders"),
        ("encoder.encoders[-13:]", r"\[-13:\] is out of range"),
        ("encoder.encoders[5:2]", r"\[5:2\] names none of the 12 layers"),
        ("encoder.encoders[last]", r"\[last\] is neither numbers nor slices"),
        ("ctc[0]", "ctc is not a layer list"),
        ("enc**.weight", "must be one of its own"),
        ("encoder..norm", "empty segment"),
        ("encoder.encoders[-2:", "bracket is not closed"),
        ("**.{q,x}_proj", r"'\*\*.x_proj' \(in '\*\*.{q,x}_proj'\) matches none"),
        ("**.{q,_proj", "a brace is not closed"),
        ("re:bias", "matches none of the 65 tensors"),
        ("re:(", "not a regular expression"),
        ("@nrom", "classes cannot be told"),
        ("", "empty selector"),
        ("!", "empty selector"),
        ([], "list of selectors is empty"),
        (3, "not a selector"),
        ({"q": None, "v": None}, 'needs quotes in YAML: "{q,v}..."'),
        ({"select": "encoder.encoders[-2:]", "expect": 3}, "expected to name 3, it names 2"),
        ({"select": "ctc", "tensors": 5}, "expected to hold 5 tensors, it holds 2"),
        ({"select": ["ctc", "encoder"], "expect": 2}, "'expect' counts one selector"),
        (["ctc", "!encoder.x"], "'encoder.x' matches none"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_place_and_fix(selector: object, message: str):
    with pytest.raises(SelectorError, match=message) as caught:
        select(selector, INDEX, where="plan.yaml:3:1")
    assert caught.value.where == "plan.yaml:3:1"
    assert caught.value.fix


def test_a_class_name_selects_by_any_class_the_module_derives_from():
    index = build_index(
        "a.weight", "b.weight", modules={"": ("Net",), "a": ("MyLinear", "Linear"), "b": ("Conv1d", "_ConvNd")}
    )
    assert select("@MyLinear", index) == ("a.weight",)
    assert select("@linear", index) == ("a.weight",)
    with pytest.raises(SelectorError, match="closest: @Conv1d"):
        select("@Conv2d", index)


def test_a_container_around_a_norm_is_not_a_norm():
    index = build_index(
        "block.norm.weight",
        "block.fn.weight",
        modules={"": ("Net",), "block": ("PreNorm",), "block.norm": ("LayerNorm",), "block.fn": ("Linear",)},
    )
    assert select("@norm", index) == ("block.norm.weight",)


def test_lora_wrapped_tensors_answer_to_their_original_name():
    names = ("dec.q.base_layer.weight", "dec.q.lora_A.default.weight", "dec.q.lora_B.default.weight", "dec.k.weight")
    index = build_index(*(f"base_model.model.{n}" for n in names))
    assert select("dec.q.weight", index) == ("base_model.model.dec.q.base_layer.weight",)
    assert select("base_model.model.dec.q.base_layer.weight", index) == ("base_model.model.dec.q.base_layer.weight",)
    assert len(select("dec.q", index)) == 3
    assert select("@lora", index) == tuple(f"base_model.model.{n}" for n in names[1:3])


def test_of_a_part_that_peft_trains_in_full_the_trained_copy_is_meant():
    index = build_index("head.original_module.weight", "head.modules_to_save.default.weight", "body.weight")
    assert select("head", index) == ("head.modules_to_save.default.weight",)
    assert select("head.original_module.weight", index) == ("head.original_module.weight",)


def test_names_inside_ddp_and_compiled_models_are_the_original_ones():
    index = build_index("module._orig_mod.enc.0.weight", "module._orig_mod.enc.1.weight")
    assert select("enc[-1]", index) == ("module._orig_mod.enc.1.weight",)


@pytest.mark.parametrize(
    ("selector", "rows"),
    [
        ("decoder.embed.0.weight[rows 2:]", ((2, 4),)),
        ("decoder.embed.0[rows -1]", ((3, 4),)),
        ("decoder.embed.0.weight[rows 0,2:4]", ((0, 1), (2, 4))),
    ],
)
def test_rows_of_one_matrix_can_be_named(selector: str, rows: object):
    found = match(items_of(selector)[0], INDEX)
    assert list(found.rows.values()) == [rows]


def test_rows_out_of_range_or_of_several_tensors_are_refused():
    with pytest.raises(SelectorError, match=r"out of range, there are 4 rows of decoder.embed.0.weight"):
        select("decoder.embed.0.weight[rows 5000:]", INDEX)
    with pytest.raises(SelectorError, match="rows belong to one parameter"):
        select("ctc[rows 1:]", INDEX)


def test_a_header_that_cannot_decide_a_kind_says_so():
    index = ModelIndex.from_header(
        [
            ParamInfo(name="body.1.weight", shape=(8,), dtype="F32"),
            ParamInfo(name="body.1.bias", shape=(8,), dtype="F32"),
            ParamInfo(name="body.norm.weight", shape=(8,), dtype="F32"),
        ]
    )
    found = match(Item(text="@norm"), index)
    assert found.anchors == ("body.norm",)
    assert found.notes == (
        "'@norm': whether body.1 is meant cannot be told from a header; it was left out (a built model decides)",
    )


def test_layers_of_a_list_come_in_order_of_their_numbers():
    assert layers_of("encoder.encoders", INDEX)[9:11] == ("encoder.encoders.9", "encoder.encoders.10")
    with pytest.raises(SelectorError, match="not a layer list") as caught:
        layers_of("ctc", INDEX)
    assert "encoder.encoders" in caught.value.fix


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("train: [ctc, encoder.encoders[-2:]]", 'a slice inside a [...] list needs quotes: "encoder.encoders[-2:]"'),
        ("- @norm", 'a selector that begins with @ needs quotes in YAML: "@norm"'),
        ("- **.bias", 'a selector that begins with * needs quotes in YAML: "**.bias"'),
        ("- !**.norm*", 'a selector that begins with ! needs quotes in YAML: "!**.norm*"'),
        ('- "!**.norm*"', ""),
        ("- encoder.encoders[-2:]", ""),
    ],
)
def test_a_line_that_yaml_reads_otherwise_gets_a_hint(line: str, hint: str):
    assert yaml_hint(line) == hint


def test_selecting_and_resolving_never_import_torch():
    code = (
        "import sys, thawline.core.index, thawline.core.select, thawline.freeze.plan, thawline.freeze.resolve, "
        "thawline.freeze.schedule, thawline.freeze.presets, thawline.freeze.memory; print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
