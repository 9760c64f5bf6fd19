"""Presets and the spellings of other tools, each as a plan."""

from __future__ import annotations

import pytest

from thawline.core.index import ModelIndex, ParamInfo
from thawline.errors import RecipeError, SelectorError
from thawline.freeze.plan import FreezePlan
from thawline.freeze.presets import from_ask_anything, from_ms_swift, from_wenet, main_stack, narrowed
from thawline.freeze.resolve import resolve, resolve_all


def index_with(*names: str) -> ModelIndex:
    def shape(name: str) -> tuple[int, ...]:
        return (4,) if "norm" in name or name.endswith("bias") else (4, 4)

    return ModelIndex.from_header(ParamInfo(name=n, shape=shape(n), dtype="F32") for n in names)


def layers(path: str, n: int) -> list[str]:
    return [f"{path}.{i}.{p}" for i in range(n) for p in ("w.weight", "w.bias", "norm1.weight", "norm1.bias")]


WENET = index_with(
    "encoder.embed.out.weight",
    *layers("encoder.encoders", 12),
    "encoder.after_norm.weight",
    "decoder.embed.0.weight",
    *layers("decoder.decoders", 3),
    "decoder.output_layer.weight",
    "ctc.ctc_lo.weight",
    "ctc.ctc_lo.bias",
)
CHAT = index_with(
    "vision_encoder.encoder.patch_embed.weight",
    "vision_encoder.encoder.blocks.0.lmhra1.conv.weight",
    "vision_encoder.encoder.blocks.0.attn.weight",
    "vision_layernorm.weight",
    "qformer.layer.0.weight",
    "query_tokens",
    "extra_query_tokens",
    "mistral_proj.weight",
    "mistral_model.layers.0.q_proj.weight",
    "mistral_model.layers.0.q_proj.lora_A.default.weight",
)


def trained(index: ModelIndex, settings: dict) -> set[str]:
    return set(resolve(FreezePlan(**settings), index).trainable_names)


def parts(names: set[str]) -> set[str]:
    return {n.partition(".")[0] for n in names}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("head-only", 3),
        ("decoder-only", 14),
        ("encoder-only", 50),
        ("last-2", 11),
        ("bitfit", 15 * 2 + 1 + 2),
        ("norm-only", 15 * 2 + 1 + 3),
        ("llrd", 66),
    ],
)
def test_a_preset_is_a_plan_for_this_model(name: str, count: int):
    plan = FreezePlan(preset=name)
    assert len(resolve(plan, WENET).trainable_names) == count
    assert "preset" not in plan.expanded(WENET).to_dict()


def test_llrd_falls_from_the_top_of_the_encoder_to_its_embedding():
    r = resolve(FreezePlan(preset="llrd"), WENET)
    assert r.lr_factor("encoder.encoders.11.w.weight") == 1
    assert r.lr_factor("encoder.encoders.0.w.weight") == pytest.approx(0.9**11)
    assert r.lr_factor("encoder.embed.out.weight") == pytest.approx(0.9**12)
    assert r.lr_factor("ctc.ctc_lo.weight") == 1
    assert not r["encoder.encoders.0.norm1.weight"].decays


def test_ulmfit_thaws_a_layer_an_epoch_with_falling_rates():
    resolutions = resolve_all(FreezePlan(preset="ulmfit"), WENET)
    assert len(resolutions) == 14
    assert parts(set(resolutions[0].trainable_names)) == {"ctc", "decoder"}
    assert resolutions[1].lr_factor("encoder.encoders.11.w.weight") == pytest.approx(1 / 2.6)
    assert resolutions[2].lr_factor("encoder.encoders.10.w.weight") == pytest.approx(1 / 2.6**2)
    assert len(resolutions[13].trainable_names) == 66


def test_a_head_that_is_tied_to_the_embedding_is_named_with_it():
    infos = [
        ParamInfo(name="embed.weight", shape=(4, 4), dtype="F32"),
        ParamInfo(name="layers.0.weight", shape=(4, 4), dtype="F32"),
        ParamInfo(name="lm_head.weight", shape=(4, 4), dtype="F32", tied_to="embed.weight"),
    ]
    r = resolve(FreezePlan(preset="head-only"), ModelIndex(infos))
    assert r.trainable_names == ("embed.weight",)


def test_the_main_stack_is_the_encoders():
    assert main_stack(WENET) == "encoder.encoders"


def test_an_unknown_preset_and_a_missing_part_are_refused():
    with pytest.raises(RecipeError, match="no preset 'heads'"):
        resolve(FreezePlan(preset="heads"), WENET)
    with pytest.raises(SelectorError, match="no decoder"):
        resolve(FreezePlan(preset="decoder-only"), index_with("a.weight"))


def test_a_preset_may_be_added_to():
    r = resolve(FreezePlan(preset="head-only", train=["encoder.after_norm"]), WENET)
    assert "encoder.after_norm.weight" in r.trainable_names


def test_wenets_freeze_modules_and_rates_by_module():
    settings = from_wenet(
        freeze_modules="encoder.embed,decoder",
        optim_conf={"modules": ["encoder", "ctc"], "lr": [1e-4, 1e-3, 1e-3]},
    )
    assert settings == {"train": ["**", "!encoder.embed", "!decoder"], "lr": {"encoder": 0.1, "ctc": 1.0}}
    r = resolve(FreezePlan(**settings), WENET)
    assert parts(set(r.trainable_names)) == {"encoder", "ctc"}
    assert r.lr_factor("encoder.after_norm.weight") == pytest.approx(0.1)


def test_wenets_rates_must_fit_its_modules():
    with pytest.raises(RecipeError, match="must list one rate more"):
        from_wenet(optim_conf={"modules": ["encoder"], "lr": [1e-4]})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"freeze_vit": True, "freeze_qformer": True},
            {"extra_query_tokens", "mistral_proj"},
        ),
        (
            {"freeze_vit": False, "freeze_qformer": False},
            {"vision_encoder", "vision_layernorm", "qformer", "query_tokens", "extra_query_tokens", "mistral_proj"},
        ),
        (
            {"freeze_vit": True, "freeze_mhra": False, "freeze_qformer": True},
            {"vision_encoder", "extra_query_tokens", "mistral_proj"},
        ),
        (
            {"freeze_vit": True, "freeze_qformer": True, "freeze_llm": False},
            {"extra_query_tokens", "mistral_proj", "mistral_model"},
        ),
    ],
)
def test_ask_anythings_switches_mean_what_its_code_does(config: dict, expected: set[str]):
    assert parts(trained(CHAT, narrowed(from_ask_anything(config), CHAT))) == expected


def test_ask_anythings_adapters_train_with_the_language_model_frozen():
    settings = narrowed(from_ask_anything({"use_lora": True}), CHAT)
    names = {n for n in trained(CHAT, settings) if n.startswith("mistral_model")}
    assert names == {"mistral_model.layers.0.q_proj.lora_A.default.weight"}
    frozen = narrowed(from_ask_anything({"use_lora": True, "freeze_lora": True}), CHAT)
    assert "mistral_model" not in parts(trained(CHAT, frozen))


def test_an_unknown_switch_is_refused():
    with pytest.raises(RecipeError, match="unknown switch 'freeze_vti'"):
        from_ask_anything({"freeze_vti": True})


TOWERS = {"vit": ["vision_encoder", "vision_layernorm"], "aligner": ["qformer"], "llm": ["mistral_model"]}


def test_ms_swift_and_llama_factory_switches():
    settings = from_ms_swift(
        {"freeze_vit": True, "freeze_llm": True, "aligner_lr": 1e-5, "learning_rate": 1e-4}, towers=TOWERS
    )
    r = resolve(FreezePlan(**settings), CHAT)
    assert parts(set(r.trainable_names)) == {"qformer", "query_tokens", "extra_query_tokens", "mistral_proj"}
    assert r.lr_factor("qformer.layer.0.weight") == pytest.approx(0.1)
    regex = from_ms_swift({"freeze_parameters_regex": "encoders\\.[0-9]\\.", "freeze_parameters": ["ctc"]}, towers={})
    assert {n.split(".")[2] for n in trained(WENET, regex) if n.startswith("encoder.encoders")} == {"10", "11"}
    last = from_ms_swift({"freeze_trainable_layers": 2, "layers": "encoder.encoders"}, towers={})
    assert last == {"train": ["encoder.encoders[-2:]"]}
    with pytest.raises(RecipeError, match="no module is known as 'llm'"):
        from_ms_swift({"freeze_llm": True}, towers={})
