"""A chain of VideoChat2 files is whole, or it is refused: every wrong chain that upstream loads without a word."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.models.videochat_case import BASE, CASES, STAGE2, STAGE3, STAGE3F, VideoChatCase
from torch import nn

from thawline.core.extras import need
from thawline.errors import CheckpointError, RecipeError
from thawline.models.videochat.config import LORA_TARGETS, LoraConfig, VideoChatConfig
from thawline.models.videochat.loading import account, kind_of, load_parts_, lora_of, upstream_delta
from thawline.models.videochat.lora import merged, with_lora
from thawline.models.videochat.model import VideoChat
from thawline.models.videochat.names import canonical, is_rotary, part_of, wrappings


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, shared: Path) -> VideoChatCase:
    return VideoChatCase(shared / "parity" / "videochat2" / request.param)


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def without_lora(config: VideoChatConfig) -> VideoChatConfig:
    return dataclasses.replace(config, lora=None)


def test_the_right_chain_names_the_supplier_of_every_tensor(case: VideoChatCase) -> None:
    model = case.empty()
    report = load_parts_(model, case.parts(BASE, STAGE2, STAGE3, STAGE3F))
    assert report.refusals == ()
    assert report.missing == ()
    assert [p.kind for p in report.parts] == ["stage1", "stage2", "stage3", "partial"]
    assert report.supplier["extra_query_tokens"] == STAGE3F
    assert report.supplier["query_tokens"] == STAGE3
    assert set(report.supplier) == {n for n in model.state_dict() if not is_rotary(n)}
    assert "does not hold LoRA's alpha" in " ".join(report.undecidable)
    assert "stage1" in report.table()
    assert report.to_json()["missing"] == []


def test_stage_1_heads_are_dropped_by_name_and_not_silently(case: VideoChatCase) -> None:
    report = load_parts_(case.empty(), case.parts(BASE, STAGE2, STAGE3))
    golden = case.json("load_report_stage3_model.json")[BASE]["unexpected"]
    dropped = set(report.parts[0].dropped)
    swallowed = {n for n in case.read(BASE) if n.startswith("qformer.cls.")}
    # torch reports the heads and drops the keys of a submodule that is None without a word; here both are listed.
    assert dropped == set(golden) | swallowed
    assert swallowed


def test_what_each_file_lacks_is_what_upstream_reported_as_missing(case: VideoChatCase) -> None:
    model = shapes_of(case.empty())
    for name, golden in case.json("load_report_stage3_model.json").items():
        shapes = {n: tuple(t.shape) for n, t in case.read(name).items()}
        report = account(model, [(name, shapes)])
        assert {n for n in report.missing if part_of(n) != "lora"} == set(golden["missing_not_llm"])
        assert not report.parts[0].unexpected


@pytest.mark.parametrize(
    ("files", "sentence", "order"),
    [
        (
            (BASE, STAGE2, STAGE3F),
            "tensors of lora come from no file",
            (BASE, STAGE2, "<stage-3 file>", STAGE3F),
        ),
        ((BASE, STAGE3F), "tensors of lora come from no file", (BASE, "<stage-3 file>", STAGE3F)),
        (
            (STAGE3F,),
            "tensors of vision_encoder come from no file (vision_encoder.encoder.patch_embed.proj.weight, ",
            ("<stage-1 file>", "<stage-3 file>", STAGE3F),
        ),
        (
            (BASE, STAGE3, STAGE3F, STAGE2),
            "stage2_delta.pth is stage 2 (captions, no text in the Q-Former) and comes after stage3_delta.pth",
            (BASE, STAGE2, STAGE3, STAGE3F),
        ),
        (
            (BASE, STAGE2, STAGE3F, STAGE3),
            "stage3f_delta.pth is a small delta and comes before",
            (BASE, STAGE2, STAGE3, STAGE3F),
        ),
        ((STAGE2, STAGE3, BASE), "base_vit_qformer.pth is stage 1", (BASE, STAGE2, STAGE3)),
    ],
    ids=["no_stage3", "only_base_and_last", "only_last", "stage2_after_stage3", "delta_before_stage3", "base_last"],
)
def test_a_wrong_chain_is_refused_with_the_right_one_and_changes_nothing(
    case: VideoChatCase, files: tuple[str, ...], sentence: str, order: tuple[str, ...]
) -> None:
    model = case.empty()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_parts_(model, case.parts(*files), command=lambda right: "thawline chat " + " ".join(right))
    assert sentence in str(caught.value)
    assert caught.value.fix == "thawline chat " + " ".join(order)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_missing_parent_that_leaves_no_gap_cannot_be_seen_and_that_is_said(case: VideoChatCase) -> None:
    model = case.empty(without_lora(case.config()))
    report = load_parts_(model, case.parts(BASE, STAGE3F))
    assert report.refusals == ()
    assert report.undecidable == (
        "stage3f_delta.pth holds only extra_queries, projection, and not beside which weights they trained",
    )


def test_the_wrong_chains_of_the_fixtures_would_have_been_far_off(case: VideoChatCase) -> None:
    chains = case.settings["load_chains"]
    assert all(c["max_abs_logit_diff"] > 1 for name, c in chains.items() if name != "right")


def test_leaving_stage_2_out_is_harmless_where_stage_3_covers_it_whole(case: VideoChatCase) -> None:
    with_it = case.model(BASE, STAGE2, STAGE3)
    without = case.model(BASE, STAGE3)
    assert all(torch.equal(t, without.state_dict()[n]) for n, t in with_it.state_dict().items())


def test_adapters_in_a_file_and_none_in_the_model_are_refused_with_their_rank(case: VideoChatCase) -> None:
    model = case.empty(without_lora(case.config()))
    with pytest.raises(CheckpointError, match=r"this model has no adapters; configure LoRA with r 4 on q_proj"):
        load_parts_(model, case.parts(BASE, STAGE2, STAGE3))


def test_adapters_around_adapters_are_refused_while_building(case: VideoChatCase) -> None:
    config = case.config()
    wrapped = with_lora(case.llm(), LoraConfig(r=4), family=case.family)
    with pytest.raises(RecipeError, match="carries adapters already"):
        VideoChat(config, wrapped, bos_id=1, pad_id=2)


def test_a_model_that_somebody_wrapped_twice_is_refused(case: VideoChatCase) -> None:
    model = shapes_of(case.empty())
    twice = {n.replace("base_model.model.", "base_model.model.base_model.model.", 1): s for n, s in model.items()}
    assert wrappings(twice) == 2
    shapes = {n: tuple(t.shape) for n, t in case.read(STAGE3).items()}
    report = account(twice, [(STAGE3, shapes)])
    assert "wrapped in adapters 2 times" in report.refusals[0]


def test_another_lora_rank_is_refused_by_both_shapes(case: VideoChatCase) -> None:
    config = case.config()
    assert config.lora is not None
    model = case.empty(dataclasses.replace(config, lora=dataclasses.replace(config.lora, r=8)))
    with pytest.raises(CheckpointError, match=r"lora_A.default.weight has shape \(4, .* and \(8, .*another LoRA rank"):
        load_parts_(model, case.parts(BASE, STAGE2, STAGE3))


def test_a_stage_3_file_does_not_fit_a_model_without_text_input(case: VideoChatCase) -> None:
    model = case.empty(case.config(stage=2))
    with pytest.raises(CheckpointError, match="which this model was built without"):
        load_parts_(model, case.parts(BASE, STAGE3))


def test_a_stage_2_model_drops_the_text_branch_of_the_base_by_name(case: VideoChatCase) -> None:
    report = load_parts_(case.empty(case.config(stage=2)), case.parts(BASE, STAGE2))
    assert "qformer.bert.embeddings.word_embeddings.weight" in report.parts[0].dropped


def test_a_foreign_tensor_is_refused_by_name(case: VideoChatCase) -> None:
    parts = [*case.parts(BASE, STAGE2), (STAGE3, {**case.read(STAGE3), "audio_proj.weight": torch.zeros(1)})]
    with pytest.raises(CheckpointError, match=r"1 tensors that this model has no place for: audio_proj\.weight"):
        load_parts_(case.empty(), parts)


def test_what_starts_anew_must_be_named(case: VideoChatCase) -> None:
    with pytest.raises(CheckpointError, match="1 tensors of extra_queries come from no file"):
        load_parts_(case.empty(case.config(stage=2)), case.parts(BASE))
    report = load_parts_(case.empty(case.config(stage=2)), case.parts(BASE), new=("extra_queries", "projection"))
    assert report.supplier["extra_query_tokens"] == "new"


@pytest.mark.parametrize("stage", ["stage2", "stage3", "stage3f"])
def test_upstreams_delta_is_written_with_upstreams_names(case: VideoChatCase, stage: str) -> None:
    flags = {
        "stage2": "stage2__freeze_vit=0__freeze_qformer=0__lora=0",
        "stage3": "stage3__freeze_vit=0__freeze_qformer=0__lora=1",
        "stage3f": "stage3f__freeze_vit=1__freeze_qformer=1__lora=1__freeze_lora=1",
    }[stage]
    golden = case.json(f"trainable/{flags}.json")
    model = case.empty(case.config(stage=2 if stage == "stage2" else 3))
    trainable = [n for n, _ in model.named_parameters() if golden["requires_grad"][n.replace(".base_layer.", ".")]]
    written = upstream_delta(model, trainable)
    # transformers 5 keeps rotary tables out of state dicts; they are derived, and ignored when read.
    assert list(written) == [n for n in golden["delta_keys"] if not is_rotary(n)]


def test_a_delta_written_here_loads_back_bit_for_bit(case: VideoChatCase) -> None:
    model = case.model(BASE, STAGE2, STAGE3, STAGE3F)
    projection = [f"{model.config.projection_name}.{kind}" for kind in ("weight", "bias")]
    delta = upstream_delta(model, ["extra_query_tokens", *projection])
    again = case.empty()
    load_parts_(again, [*case.parts(BASE, STAGE2, STAGE3), ("mine.pth", delta)])
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())


def test_adapters_that_a_plan_put_in_load_and_are_written_under_upstreams_names(case: VideoChatCase) -> None:
    peft = need("peft", extra="hf")
    config = case.config()
    assert config.lora is not None
    targets = LORA_TARGETS[case.family]
    settings = peft.LoraConfig(r=config.lora.r, lora_alpha=config.lora.alpha, target_modules=list(targets))
    model = case.empty(without_lora(config))
    peft.inject_adapter_in_model(settings, model.llm)
    load_parts_(model.eval(), case.parts(BASE, STAGE2, STAGE3))
    ids, mask = case.instruction()
    with torch.no_grad():
        loss = model(list(case.io["stage3/video"]), case.prompts(), ids, mask)
    assert abs(float(loss.sum / loss.tokens) - float(case.io["stage3/loss"])) <= 1e-5
    written = upstream_delta(model, [n for n, _ in model.named_parameters() if ".lora_" in n])
    assert {n for n in written if ".lora_" in n} == {n for n in case.read(STAGE3) if ".lora_" in n}
    with pytest.raises(RecipeError, match="put in by a plan"):
        merged(model.llm)


def test_the_kind_of_a_file_follows_from_its_tensors(case: VideoChatCase) -> None:
    assert [kind_of(case.read(n)) for n in (BASE, STAGE2, STAGE3, STAGE3F)] == ["stage1", "stage2", "stage3", "partial"]


def test_rank_and_targets_are_read_off_the_adapters(case: VideoChatCase) -> None:
    found = lora_of({n: tuple(t.shape) for n, t in case.read(STAGE3).items()})
    assert found is not None
    assert found.r == case.settings["lora"]["r"]
    golden = case.settings["lora"]["target_modules"] or ["q_proj", "v_proj"]
    assert set(found.targets) == set(golden)
    assert lora_of({"query_tokens": (1, 8, 40)}) is None


def test_full_dumps_of_either_peft_meet_under_one_name() -> None:
    old = "llama_model.base_model.model.model.layers.0.self_attn.q_proj.weight"
    new = "llama_model.base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    assert canonical(old) == canonical(new) == "llama_model.model.layers.0.self_attn.q_proj.weight"
