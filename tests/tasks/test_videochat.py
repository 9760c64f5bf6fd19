"""The video-chat task on the loop: what trains, what stays, what is left behind, and what comes back from it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tasks.videochat_corpus import RECIPE, SECTION, write_parts, write_recipe, write_video

import thawline as tl
from thawline.core.extras import need
from thawline.errors import BaseMismatch, CheckpointError, LawBroken, RecipeError, ThawlineError
from thawline.models.videochat.chat import Sampling
from thawline.models.videochat.names import part_of
from thawline.tasks.auditing import audit_run
from thawline.tasks.planning import preview
from thawline.tasks.runs import open_recipe, train
from thawline.tasks.videochat_asking import ChatModel
from thawline.tasks.videochat_loading import open_chat
from thawline.tasks.videochat_recognition import home_at
from thawline.train.loop import Run
from thawline.train.rundir import read_rows

REPOSITORY = Path(__file__).resolve().parents[2]

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("av")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model's parts, a corpus and a recipe; tests write their runs elsewhere."""
    folder = tmp_path_factory.mktemp("chat")
    write_recipe(folder)
    return folder


@pytest.fixture(scope="module")
def finished(home: Path) -> Run:
    """A run with adapters and projection open, at its end."""
    return train(home / "chat.yaml", run=home / "finished")


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(one: Any, other: Any) -> set[str]:
    assert set(one) == set(other)
    return {name for name in one if not torch.equal(one[name], other[name])}


def sums(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# --- what trains ---


def test_only_what_the_switches_leave_open_changes(home: Path, finished: Run) -> None:
    base, made = tensors_of(tl.load(home / "parts")), tensors_of(tl.load(finished.dir))
    moved = changed(base, made)
    assert {part_of(name) for name in moved} == {"lora", "projection"}
    assert moved == {name for name in base if part_of(name) in ("lora", "projection")}
    assert not audit_run(finished.dir).broken


def test_the_loss_falls_and_the_figures_of_held_back_dialogues_are_kept(finished: Run) -> None:
    rows = [r for r in read_rows(finished.dir / "metrics.jsonl") if "valid/loss" in r]
    assert rows[-1]["valid/loss"] < rows[0]["valid/loss"]
    assert {"valid/loss", "valid/accuracy", "valid/samples", "valid/tokens"} <= set(finished.metrics)
    steps = [r for r in read_rows(finished.dir / "metrics.jsonl") if "loss" in r]
    assert all("accuracy" in r for r in steps)


def test_the_plan_that_the_switches_mean_is_what_the_run_directory_keeps(home: Path, finished: Run) -> None:
    recipe, _ = open_recipe(finished.dir / "recipe.yaml")
    assert recipe.plan.to_dict()["train"] == ["mistral_proj", "mistral_model.@lora"]
    assert "freeze_vit" not in recipe.options


def test_the_plan_is_printed_by_name_and_what_surprises_is_said(home: Path) -> None:
    shown = preview(home / "chat.yaml", ["options.freeze_mhra=true"])
    names = shown.to_json()["phases"][0]["trainable_names"]
    assert {part_of(n) for n in names} == {"projection", "lora"}
    assert "extra_query_tokens are frozen with the Q-Former" in shown.text()
    assert "freeze_mhra has no effect" in shown.text()
    loud = preview(home / "chat.yaml", ["options.compat=upstream"])
    assert "extra_query_tokens" in loud.to_json()["phases"][0]["trainable_names"]


def test_an_open_q_former_and_vision_transformer_move_whole_and_the_audit_holds(home: Path, tmp_path: Path) -> None:
    overrides = ["options.freeze_vit=false", "options.freeze_qformer=false", "run.epochs=1"]
    made = train(home / "chat.yaml", overrides, run=tmp_path / "run")
    moved = changed(tensors_of(tl.load(home / "parts")), tensors_of(tl.load(made.dir)))
    still = {n for n in tl.load(made.dir).state_dict() if n not in moved and part_of(n) not in ("llm", "derived")}
    # Nothing reads what the last layer makes of the instruction's words.
    assert all(n.startswith("qformer.bert.encoder.layer.1.") and part_of(n) == "text_branch" for n in still)
    assert not audit_run(made.dir).broken


def test_as_upstream_has_it_a_gradient_of_zero_is_stated_and_ends_no_run(home: Path, tmp_path: Path) -> None:
    overrides = ["options.freeze_qformer=false", "options.compat=upstream", "run.epochs=1"]
    shown = preview(home / "chat.yaml", overrides)
    resting = shown.phases[0].resting
    assert set(resting) <= set(shown.phases[0].trainable_names)
    assert all(n.startswith("qformer.bert.encoder.layer.1.") and part_of(n) == "text_branch" for n in resting)
    assert "of the tensors that train may stay as they are" in shown.text()
    made = train(home / "chat.yaml", overrides, run=tmp_path / "run")
    report = audit_run(made.dir)
    assert not report.broken
    assert set(report.rested) <= set(resting)
    assert "qformer.bert.encoder.layer.1.output.dense.bias" in report.rested  # biases do not decay
    assert "as the plan lets them (may_rest)" in report.table()
    # Without that word the same run breaks the law, and is told which tensors were lost.
    with pytest.raises(LawBroken, match="trainables did not move: qformer"):
        train(home / "chat.yaml", [*overrides, *unspoken(overrides, home)], run=tmp_path / "unspoken")


def unspoken(overrides: list[str], home: Path) -> list[str]:
    """The switched plan written out, its `may_rest` left out."""
    plan = open_recipe(home / "chat.yaml", overrides)[0].plan.to_dict()
    del plan["may_rest"]
    return [f"plan={json.dumps(plan)}", "options={compat: upstream}"]


def test_switches_beside_a_plan_of_its_own_are_refused(home: Path) -> None:
    with pytest.raises(RecipeError, match="freeze_vit is set, and the plan says itself what trains") as caught:
        open_recipe(home / "chat.yaml", ["plan={train: [mistral_proj]}"])
    assert "preset: switches" in caught.value.fix


def test_decay_falls_as_in_upstreams_optimizer(home: Path) -> None:
    shown = preview(home / "chat.yaml", ["options.freeze_vit=false", "options.freeze_qformer=false"])
    for decision in shown.phases[0].decisions:
        if decision.trains and not decision.is_buffer:
            assert decision.decays == (len(decision.shape) > 1 and not decision.name.endswith(".bias")), decision.name


def test_a_thaw_opens_the_vision_transformer_later(home: Path, tmp_path: Path) -> None:
    thaw = 'plan={preset: switches, thaw: [{after: 1 epoch, train: ["vision_encoder.encoder.blocks[-1:]"], lr: 0.1}]}'
    made = train(home / "chat.yaml", [thaw, "run.epochs=2", "run.checkpoint.best=null"], run=tmp_path / "run")
    moved = changed(tensors_of(tl.load(home / "parts")), tensors_of(tl.load(made.dir)))
    seen = {n for n in moved if part_of(n) == "vision_encoder"}
    assert seen
    assert all(".blocks.2." in n for n in seen)
    assert [e["phase"] for e in read_rows(made.dir / "events.jsonl") if e["event"] == "phase"] == [1]


# --- what is left behind ---


def test_every_way_to_the_result_leads_to_the_same_tensors(home: Path, finished: Run) -> None:
    wanted = tensors_of(tl.load(finished.dir))
    newest = sorted((finished.dir / "checkpoints").glob("step-*"))[-1]
    delta = newest / "delta.safetensors"
    for path, base in (
        (finished.dir / "model", None),
        (newest, None),
        (delta, None),
        (delta, home / "parts"),
        (finished.dir / "model" / "upstream.pth", home / "parts"),
    ):
        assert not changed(wanted, tensors_of(tl.load(path, base=base))), path


def test_upstreams_file_holds_what_trained_and_the_buffers_under_upstreams_names(finished: Run) -> None:
    held = torch.load(finished.dir / "model" / "upstream.pth", weights_only=True)["model"]
    assert {part_of(n) for n in held} == {"projection", "lora", "derived"}
    assert not any(".base_layer." in n for n in held)


def test_the_merged_language_model_answers_as_the_adapted_one(finished: Run) -> None:
    transformers = need("transformers", extra="hf")
    merged = transformers.AutoModelForCausalLM.from_pretrained(finished.dir / "model" / "merged")
    adapted: Any = tl.load(finished.dir)
    ids = torch.tensor([[1, 7, 9, 11, 3]])
    with torch.no_grad():
        # Adding the update into the weights rounds once more than applying it beside them.
        assert torch.allclose(merged(input_ids=ids).logits, adapted.llm(input_ids=ids).logits, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished.dir / "model" / "merged")
    assert tokenizer("what is it").input_ids


def test_a_language_model_that_trained_is_written_whole(home: Path, tmp_path: Path) -> None:
    overrides = ["options.freeze_llm=false", "options.freeze_lora=true", "run.epochs=1", "options.export=[]"]
    made = train(home / "chat.yaml", overrides, run=tmp_path / "run")
    shutil.move(made.dir / "model", tmp_path / "elsewhere")
    opened, chat_home = open_chat(tmp_path / "elsewhere")
    assert chat_home.llm == tmp_path / "elsewhere" / "llm"
    moved = changed(tensors_of(tl.load(home / "parts")), tensors_of(opened.model))
    assert {part_of(n) for n in moved} == {"llm", "projection"}
    assert not (tmp_path / "elsewhere" / "upstream.pth").exists()


def test_adapters_of_a_plan_are_merged_into_the_exported_language_model(home: Path, tmp_path: Path) -> None:
    section = {**SECTION, "use_lora": False}
    parts = tmp_path / "parts"
    write_parts(parts)
    (parts / "stage3_delta.pth").unlink()
    (parts / "config.json").write_text(json.dumps({"model": section}))
    plan = 'plan={train: ["mistral_proj", "@lora"], lora: {target: "mistral_model.**.{q,v}_proj", r: 2, alpha: 4}}'
    overrides = [f"model={parts}", plan, "options={stage: 3}", "run.epochs=1"]
    made = train(home / "chat.yaml", overrides, run=tmp_path / "run")
    exported = tl.load(made.dir)
    assert not any("lora" in n for n in exported.state_dict())
    llm = load_file(made.dir / "model" / "llm" / "model.safetensors")
    before = load_file(parts / "llm" / "model.safetensors")
    assert {n for n in before if not torch.equal(before[n], llm[n])} == {
        f"model.layers.{i}.self_attn.{k}_proj.weight" for i in (0, 1) for k in "qv"
    }


def test_the_delta_of_a_projection_only_run_is_small_and_gives_equal_logits(home: Path, tmp_path: Path) -> None:
    overrides = ["options.freeze_lora=true", "run.epochs=1"]
    made = train(home / "chat.yaml", overrides, run=tmp_path / "run")
    delta = sorted((made.dir / "checkpoints").glob("step-*"))[-1] / "delta.safetensors"
    held = load_file(delta)
    assert set(held) == {"mistral_proj.weight", "mistral_proj.bias"}
    whole, loaded = ChatModel.open(made.dir), ChatModel.open(delta, base=home / "parts")
    samples = whole.samples(home / "corpus" / "it.json")
    batch = samples.collate([samples.read(n, 0) for n in range(2)])

    def logits(model: Any) -> torch.Tensor:
        visual = model.encode(batch.clips, batch.text_ids, batch.text_mask)
        return model.logits(model.assemble(batch.prompts, visual))

    with torch.no_grad():
        assert torch.equal(logits(whole.opened.model), logits(loaded.opened.model))


def test_a_result_over_another_language_model_is_refused(home: Path, finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.dir / "model", tmp_path / "model")
    shutil.copytree(home / "parts" / "llm", tmp_path / "llm")
    described = json.loads((tmp_path / "model" / "videochat.json").read_text())
    described["llm"]["path"] = str(tmp_path / "llm")
    (tmp_path / "model" / "videochat.json").write_text(json.dumps(described))
    tl.load(tmp_path / "model")
    weights = tmp_path / "llm" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(BaseMismatch, match="another language model lies here"):
        tl.load(tmp_path / "model")
    shutil.rmtree(tmp_path / "llm")
    with pytest.raises(CheckpointError, match="the language model is not there"):
        tl.load(tmp_path / "model")


def test_a_delta_over_another_base_is_refused_by_name(home: Path, finished: Run, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    shutil.copytree(home / "parts", parts)
    other = torch.load(parts / "stage3_delta.pth", weights_only=True)
    other["model"]["query_tokens"] += 1
    torch.save(other, parts / "stage3_delta.pth")
    newest = sorted((finished.dir / "checkpoints").glob("step-*"))[-1]
    with pytest.raises(BaseMismatch, match="query_tokens"):
        tl.load(newest / "delta.safetensors", base=parts)


# --- how a run begins ---


def test_parts_are_named_in_the_options_and_found_from_the_run_directory_too(home: Path, tmp_path: Path) -> None:
    recipe = home / "by_parts.yaml"
    recipe.write_text(
        RECIPE.replace("model: parts", "model: parts/llm").replace(
            "options: {",
            "options: {bert: parts/bert, config: parts/config.json,\n  parts: [parts/base_vit_qformer.pth, "
            "parts/stage2_delta.pth, parts/stage3_delta.pth], ",
        )
    )
    made = train(recipe, ["run.epochs=1"], run=tmp_path / "run")
    whole = train(home / "chat.yaml", ["run.epochs=1"], run=tmp_path / "whole")
    assert sums(made.dir / "model") == sums(whole.dir / "model")
    assert not changed(tensors_of(tl.load(made.dir)), tensors_of(tl.load(made.dir / "checkpoints" / "step-00000004")))
    assert not audit_run(made.dir).broken


def test_upstreams_own_script_says_what_the_model_is(home: Path, tmp_path: Path) -> None:
    script = tmp_path / "config_7b_stage3.py"
    section = repr({**SECTION, "max_txt_len": "${max_txt_l}", "freeze_vit": True, "freeze_qformer": False})
    script.write_text(f"from configs.data import *\nmax_txt_l = 80\nmodel = {section}\n")
    p = home / "parts"
    files = json.dumps([str(p / n) for n in ("base_vit_qformer.pth", "stage2_delta.pth", "stage3_delta.pth")])
    overrides = [f"model={p / 'llm'}", f"options={{config: {script}, bert: {p / 'bert'}, parts: {files}}}"]
    recipe, task = open_recipe(home / "chat.yaml", overrides)
    model: Any = task.build(recipe)
    assert model.config.max_text_tokens == 80
    # Its own switches hold where the recipe writes none.
    assert recipe.plan.to_dict()["train"][:2] == ["qformer", "query_tokens"]


def test_stage_2_begins_over_the_base_with_what_is_new_named(home: Path, tmp_path: Path) -> None:
    rows = [{"video": f"{shade}.mkv", "caption": f"a {shade} video"} for shade in ("dark", "light")] * 2
    (home / "corpus" / "captions.json").write_text(json.dumps(rows))
    parts = tmp_path / "parts"
    shutil.copytree(home / "parts", parts)
    (parts / "stage2_delta.pth").unlink()
    (parts / "stage3_delta.pth").unlink()
    begin = [f"model={parts}", "data.train=captions.json", "data.valid=captions.json", "run.epochs=1"]
    begin = [b.replace("captions.json", str(home / "corpus" / "captions.json")) for b in begin]
    with pytest.raises(CheckpointError, match="extra_queries come from no file"):
        train(home / "chat.yaml", [*begin, "options.stage=2"], run=tmp_path / "refused")
    new = ["options.stage=2", "options.new=[extra_queries, projection]", "options.freeze_qformer=false"]
    made = train(home / "chat.yaml", [*begin, *new], run=tmp_path / "run")
    model: Any = tl.load(made.dir)
    assert model.config.lora is None
    assert not model.config.qformer.text_input
    # What a stage leaves is a part of the next one's chain.
    chain = [str(parts / "base_vit_qformer.pth"), str(made.dir / "model" / "upstream.pth")]
    overrides = [f"model={parts / 'llm'}", "run.epochs=1", f"options.parts={json.dumps(chain)}", "options.new=[lora]"]
    overrides += [f"options.bert={parts / 'bert'}", f"options.config={parts / 'config.json'}", "options.stage=3"]
    third = train(home / "chat.yaml", overrides, run=tmp_path / "third")
    assert any(part_of(n) == "lora" for n in tl.load(third.dir).state_dict())
    again = train(home / "chat.yaml", overrides, run=tmp_path / "again")
    assert sums(third.dir / "model") == sums(again.dir / "model")


def test_the_hd_variant_trains_on_tiles(home: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    shutil.copytree(home / "parts", parts)
    section = {**SECTION, "dynamic_config": {"local_size": 32, "hd_num": 2, "padding": False, "add_global": True}}
    (parts / "config.json").write_text(json.dumps({"model": section}))
    overrides = [f"model={parts}", "options.stage=hd", "run.epochs=1"]
    made = train(home / "chat.yaml", overrides, run=tmp_path / "run")
    chat_home = open_chat(made.dir)[1]
    assert (chat_home.clips.size, chat_home.clips.max_tiles) == (32, 2)


def test_a_random_start_needs_no_weights_of_the_language_model(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "parts" / "llm", tmp_path / "llm", ignore=shutil.ignore_patterns("*.safetensors"))
    overrides = [f"model={tmp_path / 'llm'}", "init=random", "run.steps=1"]
    overrides += [f"options.bert={home / 'parts' / 'bert'}", f"options.config={home / 'parts' / 'config.json'}"]
    made = train(home / "chat.yaml", overrides, run=tmp_path / "run")
    model = ChatModel.open(made.dir)
    assert model.talk(model.see(home / "corpus" / "dark.mkv"), sampling=Sampling(max_new_tokens=2)).ask("what").ended


def test_a_random_start_becomes_a_base_like_any_other(home: Path, tmp_path: Path) -> None:
    overrides = [f"model={home / 'parts' / 'llm'}", "init=random", "run.epochs=1"]
    overrides += [f"options.bert={home / 'parts' / 'bert'}", f"options.config={home / 'parts' / 'config.json'}"]
    made = train(home / "chat.yaml", overrides, run=tmp_path / "run")
    assert (made.dir / "base" / "llm" / "model.safetensors").is_file()
    newest = sorted((made.dir / "checkpoints").glob("step-*"))[-1]
    assert not changed(tensors_of(tl.load(made.dir)), tensors_of(tl.load(newest)))
    again = train(home / "chat.yaml", overrides, run=tmp_path / "again")
    assert sums(made.dir / "model") == sums(again.dir / "model")


def test_a_wrong_order_of_parts_is_refused_with_the_right_one(home: Path, tmp_path: Path) -> None:
    p = home / "parts"
    names = json.dumps([str(p / n) for n in ("base_vit_qformer.pth", "stage3_delta.pth", "stage2_delta.pth")])
    overrides = [f"model={p / 'llm'}", f"options.parts={names}", f"options.bert={p / 'bert'}"]
    with pytest.raises(CheckpointError) as caught:
        train(home / "chat.yaml", [*overrides, f"options.config={p / 'config.json'}"], run=tmp_path / "run")
    assert "stage2_delta.pth is stage 2" in str(caught.value)
    assert caught.value.fix.endswith("parts: [base_vit_qformer.pth, stage2_delta.pth, stage3_delta.pth]")


def test_two_files_of_one_kind_in_a_directory_are_not_guessed_about(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "parts", tmp_path / "parts")
    shutil.copyfile(tmp_path / "parts" / "stage3_delta.pth", tmp_path / "parts" / "stage4_delta.pth")
    with pytest.raises(CheckpointError, match="two files of the same kind"):
        tl.load(tmp_path / "parts")


def test_one_bad_video_costs_one_sample_and_is_named(home: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_video(corpus / "dark.mkv", 10)
    (corpus / "torn.mkv").write_bytes((corpus / "dark.mkv").read_bytes()[:200])
    rows = [{"video": f"{name}.mkv", "QA": [{"q": "what is it", "a": "dark"}]} for name in ("dark", "torn", "dark")]
    (corpus / "it.json").write_text(json.dumps(rows))
    made = train(home / "chat.yaml", [f"data.train={corpus / 'it.json'}", "run.epochs=1"], run=tmp_path / "run")
    bad = [e for e in read_rows(made.dir / "events.jsonl") if e["event"] == "bad sample"]
    assert [e["key"] for e in bad] == ["it.json#1"]
    assert "torn.mkv" in bad[0]["reason"]


# --- the recipes that users start from ---


def on_tiny_data(home: Path, recipe: str, parts: list[str], data: Path) -> list[str]:
    """Overrides that put the tiny model and corpus in the place of the paths and sizes that a user fills in."""
    section = {**SECTION, "dynamic_config": {"local_size": 32, "hd_num": 2}} if recipe == "hd" else SECTION
    p = home / "parts"
    made = [f"model={p / 'llm'}", f"options.parts={json.dumps([str(p / n) for n in parts])}"]
    made += [f"options.config={json.dumps(section)}", f"options.bert={p / 'bert'}", "options.dtype=float32"]
    return [*made, f"data.train={data}", f"data.valid={data}", "run.workers=0", "run.steps=2"]


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        ("stage2", ["base_vit_qformer.pth"]),
        ("stage3", ["base_vit_qformer.pth", "stage2_delta.pth"]),
        ("hd", ["base_vit_qformer.pth", "stage2_delta.pth", "stage3_delta.pth"]),
    ],
)
def test_the_shipped_recipes_run_on_tiny_data(home: Path, tmp_path: Path, recipe: str, parts: list[str]) -> None:
    data = home / "corpus" / "it.json"
    if recipe == "stage2":
        data = home / "corpus" / "shipped_captions.json"
        data.write_text(json.dumps([{"video": "dark.mkv", "caption": "a dark video"}] * 4))
    overrides = on_tiny_data(home, recipe, parts, data)
    made = train(REPOSITORY / "recipes" / f"videochat_{recipe}.yaml", overrides, run=tmp_path / "run")
    assert made.step >= 1
    assert not audit_run(made.dir).broken


# --- what cannot be meant ---


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.conf={frames: 0}", "data.conf.frames: input should be greater than or equal to 1, got 0"),
        ("data.conf={size: -5}", "data.conf.size: input should be greater than or equal to 1, got -5"),
        ("data.conf={media_root: nowhere}", "the folder of the clips is not there"),
        ("data.conf={media_root: chat.yaml}", "the folder of the clips is not there"),
        ("data.train=corpus/itt.json", "did you mean"),
        ("options={config: {model: 5}}", "no model section of upstream's is in it"),
        ("options={config: {model: [1]}}", "no model section of upstream's is in it"),
        ("options={config: {vision_encoder: 5}}", "no model section of upstream's is in it"),
        ("options={parts: [nothing.pth]}", "check the path of this part"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused_where_it_is_written(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, sentence: str
) -> None:
    monkeypatch.chdir(home)
    model = "parts/llm" if "config" in override else "parts"
    with pytest.raises(ThawlineError) as caught:
        train(home / "chat.yaml", [f"model={model}", override], run=tmp_path / "run")
    assert sentence in str(caught.value)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"clips": {"frames": 0}}, "0 frames a video cannot be meant"),
        ({"clips": {"size": "large"}}, "'large' pixels a side cannot be meant"),
        ({"clips": {"max_tiles": -1}}, "-1 tiles cannot be meant"),
        ({"clips": {"sampling": "often"}}, "'often' is no way to choose frames"),
        ({"clips": {"normalisation": {"mean": [1], "std": [1]}}}, "pixels cannot be brought to mean (1,)"),
        ({"clips": {"normalisation": "mine"}}, "'mine'"),
        ({"llm": {"dtype": "float7"}}, "the language model's dtype is 'float7'"),
        ({"llm": None}, "cannot be read"),
        ({"parts": 5}, "'int' object is not iterable"),
        ({"format": "thawline-videochat/9"}, "this version reads"),
    ],
)
def test_a_description_that_was_written_over_is_refused_by_name(
    finished: Run, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    told = json.loads((finished.dir / "model" / "videochat.json").read_text())
    for name, value in changes.items():
        told[name] = told[name] | value if isinstance(value, dict) else value
    file = tmp_path / "videochat.json"
    file.write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match="the description of the model cannot be read") as caught:
        home_at(tmp_path)
    assert caught.value.where == str(file)
    assert sentence in caught.value.what


# --- what a crash leaves ---


def spawn(home: Path, run: Path) -> subprocess.Popen[bytes]:
    program = (
        "import sys; from thawline.tasks.runs import train; from thawline.train.monitor import PlainMonitor;"
        "train(sys.argv[1], ['run.epochs=5'], run=sys.argv[2], monitor=PlainMonitor(out=sys.stdout, interval_s=0))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(home / "chat.yaml"), str(run)],
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )


@pytest.mark.long
def test_a_run_killed_five_times_ends_as_if_it_had_not_been(home: Path, tmp_path: Path) -> None:
    whole = train(home / "chat.yaml", ["run.epochs=5"], run=tmp_path / "whole")
    draw = random.Random(11)
    for _ in range(5):
        child = spawn(home, tmp_path / "cut")
        assert child.stdout is not None
        steps = (line for line in child.stdout if line.startswith(b"step"))
        for _ in range(4):  # a checkpoint every second step; one is whole before the next begins
            next(steps, None)
        try:
            child.wait(draw.uniform(0, 0.1))
        except subprocess.TimeoutExpired:
            child.kill()
        child.communicate()
    last = spawn(home, tmp_path / "cut")
    last.communicate()
    assert last.returncode == 0
    assert sums(tmp_path / "cut" / "model") == sums(whole.dir / "model")
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (whole.dir / "metrics.jsonl").read_bytes()
    resumed = [e for e in read_rows(tmp_path / "cut" / "events.jsonl") if e["event"] == "resumed"]
    assert resumed
    assert all(e["grade"] == "EXACT" for e in resumed)
    assert not audit_run(tmp_path / "cut").broken


@pytest.mark.long
def test_the_number_of_loader_workers_is_not_in_the_mathematics(home: Path, finished: Run, tmp_path: Path) -> None:
    other = train(home / "chat.yaml", ["run.workers=2"], run=tmp_path / "run")
    assert sums(other.dir / "model") == sums(finished.dir / "model")
