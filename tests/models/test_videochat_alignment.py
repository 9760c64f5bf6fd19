"""Stage 1 gives the losses of the original code, and each of its three ways through the Q-Former means what it says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.videochat_case import BASE, CASES, VideoChatCase
from torch import Tensor

from thawline.ckpt.load import load_strict_
from thawline.core.extras import need
from thawline.errors import CheckpointError, DataError, RecipeError
from thawline.models.videochat.alignment import VideoAlignment
from thawline.models.videochat.alignment_config import AlignmentConfig, alignment_from_json, alignment_from_upstream
from thawline.models.videochat.alignment_loading import begin_anew, supply_of
from thawline.models.videochat.config import QFormerConfig, VisionConfig

pytest.importorskip("transformers")

GOLDEN = json.loads((Path(__file__).parent / "videochat_stage1.json").read_text())
"""Losses and gradient norms of `VideoChat2_qformer` (Ask-Anything 4dd8210b, transformers 4.40.1, eval mode, float32)
with the weights of the golden cases, their video, and the captions whose numbers stand below."""
IDS = torch.tensor([[2, 19, 50, 46, 43, 19, 27, 3, 0, 0], [2, 19, 79, 46, 36, 81, 53, 66, 51, 3]])
CRITERION = {"loss_weight": {"vtc": 1.0, "mlm": 0.0, "vtm": 1.0, "cap": 1.0}, "vtm_cat_text_cls": True}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, shared: Path) -> VideoChatCase:
    return VideoChatCase(shared / "parity" / "videochat2" / request.param)


def golden_model(case: VideoChatCase) -> VideoAlignment:
    vision = {k: v for k, v in case.settings["model"]["vision_encoder"].items() if k != "vit_add_ln"}
    base = case.read(BASE)
    section = {
        "vision_encoder": vision,
        "embed_dim": len(base["vision_proj.weight"]),
        "qformer_num_query_tokens": base["query_tokens"].shape[1],
        "drop_path_rate": 0.2,
        "temp": 0.07,
    }
    config = alignment_from_upstream(section, CRITERION, bert=case.json("bert/config.json"))
    model = VideoAlignment(config, dec_id=len(base["qformer.cls.predictions.bias"]) - 1, pad_id=0)
    load_strict_(model, base, source=BASE)
    return model.eval()


def tiny(**changes: Any) -> VideoAlignment:
    """A model with random weights: 32-pixel frames, two blocks, two layers."""
    config = AlignmentConfig(
        vision=VisionConfig(img_size=32, width=24, depth=3, heads=2, num_frames=3),
        qformer=QFormerConfig(
            hidden_size=16, layers=2, heads=2, intermediate_size=24, vocab_size=40, max_positions=16, queries=4,
            extra_queries=0, padding="right",
        ),
        embed_dim=8,
        max_words=16,
    )  # fmt: skip
    torch.manual_seed(0)
    return VideoAlignment(dataclasses.replace(config, **changes), dec_id=39, pad_id=0).eval()


def batch(count: int, frames: int = 3) -> tuple[list[Tensor], Tensor, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(4, 30, (count, 6))
    ids[:, 0] = 2
    ids[0, 4:] = 0
    return list(torch.randn(count, frames, 3, 32, 32)), ids, (ids != 0).long()


def test_names_and_their_order_are_those_of_the_original(case: VideoChatCase) -> None:
    model = golden_model(case)
    assert list(model.state_dict()) == list(case.read(BASE))
    assert [n for n, _ in model.named_parameters()] == list(case.json("trainable/stage1.json")["requires_grad"])


def test_the_three_losses_and_every_gradient_are_those_of_the_original(case: VideoChatCase) -> None:
    model = golden_model(case)
    golden = GOLDEN[case.folder.name]
    found = model(list(case.io["stage3/video"]), IDS, (IDS != 0).long(), torch.tensor([0, 1]))
    assert found.matching is not None
    assert found.captioning is not None
    losses = {
        "vtc": found.contrastive / found.captions,
        "vtm": found.matching / found.pairs,
        "cap": found.captioning / found.words,
    }
    # The limits of the golden cases' README.
    assert {n: float(v.detach()) for n, v in losses.items()} == pytest.approx(golden["losses"], abs=1e-5)
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in model.named_parameters():
        wanted = golden["grad_norms"][name]
        if wanted is not None:  # the vision transformer was frozen
            assert parameter.grad is not None
            assert float(parameter.grad.double().norm()) == pytest.approx(wanted, rel=1e-3, abs=1e-6), name


def test_words_that_see_queries_and_clips_are_transformers_q_former_under_other_masks(case: VideoChatCase) -> None:
    """InstructBlipVideoQFormerModel runs queries and words in one pass; what sees what is only a mask there."""
    transformers = need("transformers", extra="hf")
    model = golden_model(case)
    c = model.config.qformer
    theirs = transformers.InstructBlipVideoQFormerModel(
        transformers.InstructBlipVideoQFormerConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.layers,
            num_attention_heads=c.heads, intermediate_size=c.intermediate_size, max_position_embeddings=c.max_positions,
            encoder_hidden_size=model.config.vision.width, cross_attention_frequency=2,
        )
    ).eval()  # fmt: skip
    renamed = {
        n.replace("attention.self.", "attention.attention.").replace("embeddings.LayerNorm", "embeddings.layernorm"): t
        for n, t in model.qformer.bert.state_dict().items()
        if not n.endswith("position_ids")
    }
    theirs.load_state_dict(renamed)
    mask = (IDS != 0).long()
    with torch.no_grad():
        vision = model.see(list(case.io["stage3/video"]))
        queries = model.query_tokens.expand(2, -1, -1)
        out, states = model.qformer.look(model.query_tokens.expand(2, -1, -1), vision)
        written = model.qformer.write(IDS, mask, states)
        together = model.qformer(queries, vision, IDS, mask)
    q, n = queries.shape[1], queries.shape[1] + IDS.shape[1]
    causal = torch.zeros(2, n, n, dtype=torch.bool)
    causal[:, :q, :q] = True  # queries see queries
    causal[:, q:, :q] = True  # words see queries, and the words before them
    causal[:, q:, q:] = torch.ones(n - q, n - q, dtype=torch.bool).tril() & mask.bool()[:, None, :]
    both = torch.cat((torch.ones(2, q, dtype=torch.bool), mask.bool()), dim=1)
    with torch.no_grad():
        one = theirs(input_ids=IDS, query_embeds=queries, attention_mask=causal[:, None], encoder_hidden_states=vision)[
            0
        ]
        two = theirs(input_ids=IDS, query_embeds=queries, attention_mask=both, encoder_hidden_states=vision)[0]
    real = mask.bool()
    # 1e-6 was measured between the two implementations; 1e-5 is the limit of the golden cases.
    assert float((one[:, :q] - out).abs().max()) <= 1e-5
    assert float((one[:, q:][real] - written[real]).abs().max()) <= 1e-5
    assert float((two[both] - together[both]).abs().max()) <= 1e-5


def test_words_alone_are_transformers_bert(case: VideoChatCase) -> None:
    transformers = need("transformers", extra="hf")
    model = golden_model(case)
    bert = transformers.BertModel(
        transformers.BertConfig(**{**case.json("bert/config.json"), "vocab_size": model.config.qformer.vocab_size}),
        add_pooling_layer=False,
    ).eval()
    own = {n: t for n, t in model.qformer.bert.state_dict().items() if "_query" not in n and "crossattention" not in n}
    own["embeddings.token_type_embeddings.weight"] = torch.zeros(2, model.config.qformer.hidden_size)
    held = bert.state_dict()
    bert.load_state_dict({n: own[n] for n in held if n in own} | {n: t for n, t in held.items() if n not in own})
    mask = (IDS != 0).long()
    with torch.no_grad():
        theirs = bert(input_ids=IDS, attention_mask=mask).last_hidden_state
        ours = model.qformer.read(IDS, mask)
    assert float((theirs - ours)[mask.bool()].abs().max()) <= 1e-5


def test_the_next_word_does_not_see_itself() -> None:
    model = tiny()
    _, ids, mask = batch(2)
    other = ids.clone()
    other[:, -1] = 5
    with torch.no_grad():
        _, states = model.qformer.look(model.query_tokens.expand(2, -1, -1), model.see(batch(2)[0]))
        one, two = model.qformer.write(ids, mask, states), model.qformer.write(other, mask, states)
    assert torch.equal(one[:, :-1], two[:, :-1])
    assert not torch.equal(one[1, -1], two[1, -1])


def test_a_still_image_is_shown_once_for_each_frame_and_any_other_number_is_refused() -> None:
    model = tiny()
    with torch.no_grad():
        assert model.see(batch(2, 1)[0]).shape == model.see(batch(2)[0]).shape == (2, 12, 24)
        mixed = model.see([batch(1, 1)[0][0], batch(1)[0][0]])
        assert torch.equal(mixed[1], model.see(batch(1)[0])[0])
    with pytest.raises(DataError, match="a clip of 2 frames, and the temporal embedding has 3"):
        model.see(batch(1, 2)[0])


def test_captions_of_one_clip_are_true_partners_and_never_drawn_as_false_ones() -> None:
    model = tiny()
    clips, ids, mask = batch(4)
    clips[1] = clips[0]
    owners = torch.tensor([0, 0, 2, 3])
    same = owners[:, None] == owners[None, :]
    model.train()
    for seed in range(20):
        torch.manual_seed(seed)
        drawn = model._false(torch.randn(4, 4), same)
        assert not same[torch.arange(4), drawn].any()
    model.eval()
    found = model(clips, ids, mask, owners)
    with torch.no_grad():
        vectors = model.embed(model.see(clips), ids, mask)
        alike = model.similarity(vectors[0], vectors[1])
    by_hand = 0.0
    for table in (alike, alike.T):
        for row, partners in zip(table, same, strict=True):
            by_hand -= float((row.softmax(0).log() * partners).sum() / partners.sum()) / 2
    # Two ways of summing sixteen float32 logarithms.
    assert float(found.contrastive.detach()) == pytest.approx(by_hand, rel=1e-5)


def test_a_micro_batch_without_false_partners_learns_from_true_pairs_alone() -> None:
    clips, ids, mask = batch(1)
    model = tiny().train()
    found = model(clips, ids, mask, torch.tensor([0]))
    assert (found.captions, found.pairs) == (1, 1)
    assert found.matching is not None
    assert torch.isfinite(found.matching)


def test_a_loss_of_weight_zero_is_not_computed() -> None:
    clips, ids, mask = batch(3)
    found = tiny(matching=0.0, captioning=0.0)(clips, ids, mask, torch.arange(3))
    assert found.matching is None
    assert found.captioning is None


def test_the_temperature_is_held_between_its_limits_in_training_and_never_where_it_is_frozen() -> None:
    clips, ids, mask = batch(2)
    model = tiny(temperature=0.9)
    model(clips, ids, mask, torch.arange(2))
    assert float(model.temp.detach()) == pytest.approx(0.9)
    model.train()(clips, ids, mask, torch.arange(2))
    assert float(model.temp.detach()) == 0.5
    frozen = tiny(temperature=0.9).train()
    frozen.temp.requires_grad = False
    frozen(clips, ids, mask, torch.arange(2))
    assert float(frozen.temp) == pytest.approx(0.9)


def test_the_configuration_survives_json_and_upstreams_odd_keys_are_refused() -> None:
    config = tiny().config
    assert alignment_from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(RecipeError, match="the criterion section has an unknown key 'vtm_hard_negg'"):
        alignment_from_upstream({}, {"vtm_hard_negg": True}, bert={})
    with pytest.raises(RecipeError, match=r"loss_weight\.mlm has no effect upstream"):
        alignment_from_upstream({}, {"loss_weight": {"mlm": 1.0}}, bert={})
    with pytest.raises(RecipeError, match="agg_method 'sum' is not known"):
        alignment_from_upstream({"agg_method": "sum"}, {}, bert={})


# --- what files supply ---


def bert_file() -> dict[str, Tensor]:
    """What bert-base-uncased's file holds, in the old spelling of its norms, at the tiny size."""
    own = tiny().state_dict()
    kept = {n.removeprefix("qformer."): t for n, t in own.items() if n.startswith("qformer.")}
    named = {n: t for n, t in kept.items() if "_query" not in n and "crossattention" not in n and "decoder" not in n}
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
           for n, t in named.items()}  # fmt: skip
    old["bert.embeddings.word_embeddings.weight"] = old["bert.embeddings.word_embeddings.weight"][:-1]
    old["cls.predictions.bias"] = old["cls.predictions.bias"][:-1]
    old["bert.embeddings.token_type_embeddings.weight"] = torch.zeros(2, 16)
    old["bert.pooler.dense.weight"] = torch.zeros(16, 16)
    return old


def shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {n: tuple(t.shape) for n, t in tensors.items()}


def test_bert_and_umt_supply_the_model_and_the_rest_begins_anew_on_purpose() -> None:
    model = shapes(tiny().state_dict())
    umt = {n.removeprefix("vision_encoder."): s for n, s in model.items() if n.startswith("vision_encoder.")}
    umt |= {"encoder.blocks.9.attn.q_bias": (24,), "clip_decoder.0.norm.weight": (24,)}
    supplies = [supply_of("bert", shapes(bert_file()), model), supply_of("umt", umt, model)]
    assert supplies[1].left_out == ("encoder.blocks.9.attn.q_bias", "clip_decoder.0.norm.weight")
    assert "bert.pooler.dense.weight" in supplies[0].left_out
    layer = "qformer.bert.encoder.layer.0."
    assert (
        supplies[0].tensors[layer + "intermediate_query.dense.weight"]
        == "bert.encoder.layer.0.intermediate.dense.weight"
    )
    assert supplies[0].tensors[layer + "output_query.LayerNorm.bias"] == "bert.encoder.layer.0.output.LayerNorm.beta"
    anew = begin_anew(model, supplies, ["queries", "crossattention", "heads", "vision_layernorm"])
    heads = {"vision_temp_embed", "temp", "vision_proj", "text_proj", "itm_head"}
    assert {n.split(".")[0] for n in anew} == {"query_tokens", "vision_layernorm", "qformer"} | heads
    assert all("crossattention" in n for n in anew if n.startswith("qformer"))
    with pytest.raises(CheckpointError, match="come from no file: query_tokens") as caught:
        begin_anew(model, supplies, ["crossattention", "heads", "vision_layernorm"])
    assert caught.value.fix == "options.new: [queries] begins them here"
    with pytest.raises(CheckpointError) as caught:
        begin_anew(model, supplies[:1], ["queries", "crossattention", "heads", "vision_layernorm"])
    assert "a file with vision_encoder.encoder.patch_embed.proj.weight is needed" in caught.value.fix


def test_a_file_of_another_size_or_kind_is_refused_by_name() -> None:
    model = shapes(tiny().state_dict())
    held = shapes(bert_file())
    held["bert.embeddings.position_embeddings.weight"] = (512, 16)
    with pytest.raises(CheckpointError, match=r"position_embeddings\.weight has shape \(512, 16\), and \(16, 16\)"):
        supply_of("bert", held, model)
    with pytest.raises(CheckpointError, match="of no vision transformer, no BERT and no stage-1 model"):
        supply_of("x.pth", {"conv1.weight": (3,)}, model)
    with pytest.raises(CheckpointError, match=r"1 tensors have no place in a stage-1 model: mistral_proj\.bias"):
        supply_of("x.pth", {"query_tokens": (1, 4, 16), "mistral_proj.bias": (3,)}, model)
