"""A whole small model of each family with random weights: losses, adapters, answers. No file is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.videochat_case import (
    BASE,
    CASES,
    STAGE2,
    STAGE3,
    Letters,
    VideoChatCase,
    furthest,
    tiny_config,
    tiny_llm,
    tiny_model,
)
from torch import Tensor

from thawline.errors import CheckpointError, DataError, RecipeError
from thawline.models.videochat.build import build, for_stage, read_config
from thawline.models.videochat.chat import Answer, Sampling, chat, look
from thawline.models.videochat.config import (
    FAMILIES,
    LORA_TARGETS,
    Family,
    LoraConfig,
    VideoChatConfig,
    from_upstream,
)
from thawline.models.videochat.llm import ChatTokenizer, InstructionTokenizer, family_of
from thawline.models.videochat.loading import load_parts_
from thawline.models.videochat.lora import is_wrapped, merged, unwrapped, with_lora
from thawline.models.videochat.model import IGNORE, Prompt, VideoChat


def prompts() -> list[Prompt]:
    return [
        Prompt(pieces=([5, 6], [7, 8, 9, 10]), labels=([IGNORE] * 2, [IGNORE, IGNORE, 9, 10])),
        Prompt(pieces=([5], [7, 11]), labels=([IGNORE], [IGNORE, 11])),
    ]


def words() -> tuple[Tensor, Tensor]:
    return torch.tensor([[0, 5, 6], [7, 8, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]])


def clips() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(4, 3, 32, 32, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_language_models_own(family: Family) -> None:
    model = tiny_model(tiny_config(family))
    loss = model(clips(), prompts(), *words())
    inputs = model.assemble(prompts(), model.encode(clips(), *words()))
    theirs = model.llm(inputs_embeds=inputs.embeds, attention_mask=inputs.mask, labels=inputs.labels).loss
    assert int(loss.tokens) == 3
    assert float((loss.sum / loss.tokens).detach()) == pytest.approx(float(theirs.detach()), abs=1e-5)
    loss.sum.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad and "text" not in n)


@torch.no_grad()
def test_a_sum_over_micro_batches_is_the_sum_of_the_batch() -> None:
    model = tiny_model()
    ids, mask = words()
    whole = model(clips(), prompts(), ids, mask)
    parts = [model(clips()[i : i + 1], prompts()[i : i + 1], ids[i : i + 1], mask[i : i + 1]) for i in range(2)]
    assert float(whole.sum) == pytest.approx(float(sum(p.sum for p in parts)), abs=1e-4)
    assert int(whole.tokens) == sum(int(p.tokens) for p in parts)


@torch.no_grad()
def test_bos_is_an_embedding_unless_upstreams_number_is_asked_for() -> None:
    model = tiny_model()
    visual = model.encode(clips(), *words())
    table = model.causal_lm.get_input_embeddings().weight
    assert torch.equal(model.assemble(prompts(), visual).embeds[0, 0], table[1])
    assert torch.equal(model.assemble(prompts(), visual, bos="id").embeds[0, 0], torch.ones(32))
    assert dataclasses.replace(model.config).as_upstream().bos == "id"


@torch.no_grad()
def test_several_images_stand_where_the_text_leaves_room() -> None:
    model = tiny_model()
    ids, mask = torch.tensor([[5, 6]]), torch.ones(1, 2, dtype=torch.long)
    images = [torch.randn(1, 3, 32, 32), torch.randn(1, 3, 32, 32)]
    visual = model.encode(images, ids, mask, owners=[0, 0])
    pieces = ([5], [6, 7], [8])
    inputs = model.assemble([Prompt(pieces=pieces, labels=([IGNORE], [IGNORE] * 2, [8]))], visual)
    n = model.config.qformer.all_queries
    assert inputs.embeds.shape == (1, 1 + 4 + 2 * n, 32)
    assert furthest(inputs.embeds[0, 2 : 2 + n], visual[0]) == 0
    assert furthest(inputs.embeds[0, 4 + n : 4 + 2 * n], visual[1]) == 0
    assert inputs.labels[0].tolist() == [IGNORE] * (4 + 2 * n) + [8]
    with pytest.raises(DataError, match="leave places for 1 clips, and 2 are given"):
        model.assemble([Prompt(pieces=([5], [6]), labels=([IGNORE], [6]))], visual)


@torch.no_grad()
def test_text_alone_needs_no_clip() -> None:
    model = tiny_model()
    loss = model([], [Prompt(pieces=([5, 6, 7],), labels=([IGNORE, 6, 7],))])
    assert int(loss.tokens) == 2


def test_default_lora_targets_exist_in_every_family() -> None:
    for family in FAMILIES:
        names = {
            n.split(".lora_A")[0].rpartition(".")[2]
            for n, _ in with_lora(tiny_llm(family), LoraConfig(r=2), family=family).named_parameters()
            if "lora_A" in n
        }
        assert names == set(LORA_TARGETS[family])


def test_mistrals_list_on_phi_is_refused_and_upstream_adapts_three_layers_of_it() -> None:
    config = LoraConfig(r=2, targets=LORA_TARGETS["mistral"])
    with pytest.raises(RecipeError) as caught:
        with_lora(tiny_llm("phi"), config, family="phi")
    assert str(caught.value).startswith(
        "LoRA targets 'q_proj', 'k_proj', 'v_proj', 'gate_proj', 'up_proj' name no layer of this language model\n"
        "  fix: its linear layers: down_proj, gate_up_proj, lm_head, o_proj, qkv_proj; closest: "
    )
    upstream = tiny_config("phi").as_upstream().lora
    assert upstream is not None
    wrapped = with_lora(tiny_llm("phi"), upstream, family="phi")
    layers = {n.split(".lora_A")[0].rpartition(".")[2] for n, _ in wrapped.named_parameters() if "lora_A" in n}
    assert layers == {"o_proj", "down_proj", "lm_head"}


def test_adapters_merge_into_a_plain_language_model_with_equal_logits() -> None:
    model = tiny_model()
    inputs = model.assemble(prompts(), model.encode(clips(), *words()))
    with torch.no_grad():
        before = model.logits(inputs)
        plain = merged(model.llm)
        after = plain(inputs_embeds=inputs.embeds, attention_mask=inputs.mask).logits
    assert not is_wrapped(plain)
    assert unwrapped(plain) is plain
    assert not any("lora" in n or "base_layer" in n for n in plain.state_dict())
    real = inputs.mask.bool()
    assert furthest(before[real], after[real]) <= 1e-5  # W x + B (A x) and (W + B A) x are rounded differently
    with pytest.raises(RecipeError, match="no adapters to merge"):
        merged(plain)


def ask(model: VideoChat, **options: Any) -> Answer:
    return chat(
        model,
        clips()[:1],
        ("[INST] <Video>", "</Video> [/INST] what ?"),
        tokenizer=Letters(),
        instruction="Look.",
        instruction_tokenizer=Letters(),
        **options,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_random_weights_answers_end_to_end(family: Family) -> None:
    model = tiny_model(tiny_config(family))
    answer = ask(model, sampling=Sampling(max_new_tokens=12))
    assert 0 < len(answer.tokens) <= 12
    assert answer == ask(model, sampling=Sampling(max_new_tokens=12))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_transformers_generate(family: Family) -> None:
    model = tiny_model(tiny_config(family))
    letters = Letters()
    ids = torch.tensor([letters.encode("Look.")])
    pieces = [letters.encode(t) for t in ("[INST] <Video>", "</Video> [/INST] what ?")]
    with torch.no_grad():
        visual = model.encode(clips()[:1], ids, torch.ones_like(ids))
        inputs = model.assemble([Prompt(pieces=pieces, labels=[[IGNORE] * len(p) for p in pieces])], visual)
        theirs = model.llm.generate(
            inputs_embeds=inputs.embeds, attention_mask=inputs.mask, max_new_tokens=10, do_sample=False
        )
    ours = ask(model, sampling=Sampling(max_new_tokens=10))
    golden = theirs[0].tolist()
    assert list(ours.tokens) == (golden[: golden.index(2)] if 2 in golden else golden)


def test_drawn_answers_follow_from_their_seed_and_move_no_global_generator() -> None:
    model = tiny_model()
    state = torch.random.get_rng_state()
    one = ask(model, sampling=Sampling(max_new_tokens=12, temperature=1.5, seed=1))
    assert one == ask(model, sampling=Sampling(max_new_tokens=12, temperature=1.5, seed=1))
    assert one.tokens != ask(model, sampling=Sampling(max_new_tokens=12, temperature=1.5, seed=2)).tokens
    assert torch.equal(state, torch.random.get_rng_state())
    greedy = ask(model, sampling=Sampling(max_new_tokens=12))
    assert ask(model, sampling=Sampling(max_new_tokens=12, temperature=1.0, top_p=1e-6)).tokens == greedy.tokens


def test_an_answer_ends_before_a_stop_sign_and_comes_in_stretches() -> None:
    model = tiny_model()
    whole = ask(model, sampling=Sampling(max_new_tokens=12, temperature=2.0, seed=4))
    spoken = Letters().decode(whole.tokens)
    sign = spoken[5:7]
    heard: list[str] = []
    cut = ask(model, sampling=Sampling(max_new_tokens=12, temperature=2.0, seed=4), stop=(sign,), on_text=heard.append)
    assert cut.ended == "stop"
    assert "".join(heard) == spoken[: spoken.index(sign)]
    assert cut.text == spoken[: spoken.index(sign)].strip()
    assert len(heard) > 1


def test_a_second_question_needs_no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    visual = look(model, clips()[:1], instruction="Look.", instruction_tokenizer=Letters())
    fresh = ask(model, sampling=Sampling(max_new_tokens=6))
    monkeypatch.setattr(model.vision_encoder, "forward", None)
    assert ask(model, sampling=Sampling(max_new_tokens=6), visual=visual) == fresh


def test_modes_are_what_they_were_after_an_answer() -> None:
    model = tiny_model().train()
    model.vision_encoder.eval()
    before = {n: m.training for n, m in model.named_modules()}
    ask(model, sampling=Sampling(max_new_tokens=2))
    assert {n: m.training for n, m in model.named_modules()} == before


def test_a_prompt_without_room_for_its_clips_is_refused() -> None:
    with pytest.raises(DataError, match="a prompt of 1 pieces leaves 0 places for 1 clips"):
        chat(tiny_model(), clips()[:1], ("what ?",), tokenizer=Letters(), instruction_tokenizer=Letters())
    with pytest.raises(RecipeError, match="reads an instruction"):
        chat(tiny_model(), clips()[:1], ("a", "b"), tokenizer=Letters())
    with pytest.raises(RecipeError, match="top_p 0"):
        Sampling(top_p=0.0)


@pytest.mark.parametrize("name", CASES)
def test_the_golden_models_answer_in_words(shared: Path, name: str) -> None:
    case = VideoChatCase(shared / "parity" / "videochat2" / name)
    model = case.model(BASE, STAGE2, STAGE3)
    answer = chat(
        model,
        [case.io["stage3/video"][0]],
        ("[INST] <Video>", "</Video> [/INST] [INST] what is the man doing . [/INST]"),
        tokenizer=case.chat_tokenizer(),
        instruction="describe the video",
        instruction_tokenizer=case.instruction_tokenizer(),
        stop=("</s>", "###"),
        sampling=Sampling(max_new_tokens=8),
    )
    assert len(answer.tokens) <= 8
    assert isinstance(answer.text, str)


@pytest.mark.parametrize("name", CASES)
def test_the_instruction_tokenizer_gives_the_numbers_of_the_original(shared: Path, name: str) -> None:
    case = VideoChatCase(shared / "parity" / "videochat2" / name)
    tokenizer = case.instruction_tokenizer()
    ids, mask = case.instruction()
    assert len(tokenizer) == case.config().qformer.vocab_size
    for text, row, seen in zip(case.settings["instructions"], ids, mask.bool(), strict=True):
        assert tokenizer.encode(text) == row[seen].tolist()
    long = InstructionTokenizer.load(case.folder / "bert", max_tokens=6).encode(case.settings["instructions"][0])
    assert len(long) == 6
    assert long[-3:] == tokenizer.encode(case.settings["instructions"][0])[-3:]  # the beginning is lost


def test_directories_without_what_is_needed_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json here"):
        family_of(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="'gpt2' is no language model that VideoChat2 is built on"):
        family_of(tmp_path)
    with pytest.raises(CheckpointError, match="no BERT vocabulary here"):
        InstructionTokenizer.load(tmp_path)
    with pytest.raises(CheckpointError, match="no tokenizer here"):
        ChatTokenizer.load(tmp_path)


UPSTREAM: dict[str, Any] = {
    "model_cls": "VideoChat2_it_mistral",
    "freeze_vit": False,
    "max_txt_len": 512,
    "vision_encoder": {
        "name": "vit_l14", "img_size": 224, "patch_size": 16, "d_model": 1024, "encoder_embed_dim": 1024,
        "encoder_depth": 24, "encoder_num_heads": 16, "drop_path_rate": 0.0, "num_frames": 8, "tubelet_size": 1,
        "use_checkpoint": True, "checkpoint_num": 18, "pretrained": "", "return_index": -2, "vit_add_ln": True,
        "ckpt_num_frame": 4,
    },
    "num_query_token": 32, "qformer_drop_path_rate": 0.2, "extra_num_query_token": 64, "qformer_text_input": True,
    "use_lora": True, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.1,
}  # fmt: skip


def test_upstreams_released_configuration_is_understood() -> None:
    config = from_upstream(UPSTREAM, family="mistral")
    assert config.vision.blocks_run == 23
    assert config.vision.checkpoint_blocks == 18
    assert config.qformer.all_queries == 96
    assert config.qformer.vocab_size == 30523
    assert config.lora == LoraConfig(r=16, alpha=32, dropout=0.1, targets=LORA_TARGETS["mistral"])
    assert config.tiles is None
    hd = from_upstream(
        {**UPSTREAM, "model_cls": "VideoChat2_it_hd_mistral", "dynamic_config": {"local_size": 224, "hd_num": 12}},
        family="mistral",
    )
    assert hd.tiles is not None
    assert (hd.tiles.max_tiles, hd.tiles.global_view) == (12, True)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_query_tokens": 32}, "unknown key 'num_query_tokens'"),
        ({"vision_encoder": {"encoder_deph": 3}}, "unknown key 'encoder_deph'"),
        ({"vision_encoder": {"ckpt_num_frame": 8}}, "has no effect upstream"),
    ],
)
def test_a_setting_that_would_be_passed_over_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        from_upstream({**UPSTREAM, **change}, family="mistral")


def names_of(items: Sequence[str]) -> set[str]:
    return {i.partition(".")[0] for i in items}


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_called_what_upstream_calls_them(family: Family) -> None:
    stem = {"mistral": "mistral", "vicuna": "llama", "phi": "phi"}[family]
    model = tiny_model(tiny_config(family))
    assert names_of(list(model.state_dict())) == {
        "query_tokens", "extra_query_tokens", "vision_encoder", "vision_layernorm", "qformer", f"{stem}_model",
        f"{stem}_proj",
    }  # fmt: skip
    assert isinstance(VideoChatConfig(family=family).llm_name, str)


@pytest.mark.parametrize("name", CASES)
def test_directories_and_upstreams_configuration_make_a_model_with_its_tokenizers(shared: Path, name: str) -> None:
    folder = shared / "parity" / "videochat2" / name
    case = VideoChatCase(folder)
    config = read_config(folder / "llm", folder / "bert", case.settings)
    opened = build(config, folder / "llm", folder / "bert")
    assert config.family == case.family
    assert opened.instruction_tokenizer is not None
    load_parts_(opened.model, case.parts(BASE, STAGE2, STAGE3))
    captions = build(for_stage(config, 2), folder / "llm", random_weights=True)
    assert captions.instruction_tokenizer is None
    load_parts_(captions.model, case.parts(BASE, STAGE2))
    with pytest.raises(RecipeError, match="no vocabulary for it is given"):
        build(config, folder / "llm")
    with pytest.raises(RecipeError, match="is for phi and the language model is"):
        build(dataclasses.replace(config, family="phi"), folder / "llm", folder / "bert")
    wrong = dataclasses.replace(config, qformer=dataclasses.replace(config.qformer, vocab_size=9))
    with pytest.raises(CheckpointError, match="words with"):
        build(wrong, folder / "llm", folder / "bert")
    with pytest.raises(RecipeError, match="stage 1 is not built here"):
        for_stage(config, 1)


@torch.no_grad()
def test_half_precision_weights_take_frames_as_they_are() -> None:
    model = tiny_model().to(torch.bfloat16)
    loss = model(clips(), prompts(), *words())
    assert torch.isfinite(loss.sum)
    assert loss.sum.dtype == torch.float32
