"""From an instruction file to a falling loss: samples, batches, plan and model together, with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.data.test_video import write_video
from tests.models.videochat_case import Letters, tiny_config, tiny_llm, tiny_model

from thawline.core.select import select
from thawline.data.conversation import read_dialogues
from thawline.data.conversation_templates import TEMPLATES
from thawline.data.videochat import ChatBatch, ChatSamples, ClipSettings
from thawline.freeze.inspect import index_of
from thawline.models.videochat.config import FAMILIES, Family, VideoChatConfig, VisionConfig
from thawline.models.videochat.model import VideoChat
from thawline.models.videochat.switches import Switches, plan_of


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    write_video(tmp_path / "v.mkv", "ffv1", "bgr0")
    image.fromarray(np.full((40, 30, 3), 90, np.uint8)).save(tmp_path / "i.png")
    rows = [
        {"video": "v.mkv", "QA": [{"i": "Look.", "q": "what", "a": "light"}, {"q": "now", "a": "dark"}]},
        {"image": ["i.png", "i.png"], "QA": [{"q": "same", "a": "yes"}]},
        {"QA": [{"q": "hi", "a": "ho"}]},
    ]
    (tmp_path / "it.json").write_text(json.dumps(rows), encoding="utf-8")
    return tmp_path / "it.json"


def batch_of(corpus: Path, config: VideoChatConfig) -> ChatBatch:
    letters = Letters()
    reader = ChatSamples(
        read_dialogues(corpus),
        template=TEMPLATES[config.family],
        tokenizer=letters,
        instruction_tokenizer=letters,
        settings=ClipSettings(frames=4, size=32, say_times=False),
        training=True,
        seed=1,
        max_text_tokens=200,
    )
    return reader.collate([reader.read(n, 0) for n in range(len(reader))])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_falls_and_only_what_the_plan_names_moves(corpus: Path, family: Family) -> None:
    model = tiny_model(tiny_config(family))
    batch = batch_of(corpus, model.config)
    plan = plan_of(Switches(freeze_vit=True, freeze_qformer=True), model.config)
    trained = set(select(list(plan.train), index_of(model)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(40):
        loss = model(batch.clips, batch.prompts, batch.text_ids, batch.text_mask)
        assert int(loss.tokens) == batch.weights["tokens"]
        optimizer.zero_grad()
        (loss.sum / batch.weights["tokens"]).backward()
        optimizer.step()
        losses.append(float((loss.sum / loss.tokens).detach()))
    assert losses[-1] < 0.95 * losses[0]
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == trained


def test_the_released_model_has_the_sizes_of_its_files() -> None:
    # On the meta device: shapes only.
    with torch.device("meta"):
        model = VideoChat(VideoChatConfig(vision=VisionConfig(num_frames=8)), tiny_llm("mistral"), bos_id=1, pad_id=2)
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert shapes["vision_encoder.encoder.patch_embed.proj.weight"] == (1024, 3, 1, 16, 16)
    assert shapes["vision_encoder.encoder.blocks.22.attn.qkv.weight"] == (3072, 1024)
    assert "vision_encoder.encoder.blocks.23.attn.qkv.weight" not in shapes
    assert shapes["qformer.bert.embeddings.word_embeddings.weight"] == (30523, 768)
    assert shapes["qformer.bert.encoder.layer.10.crossattention.self.key.weight"] == (768, 1024)
    assert "qformer.bert.encoder.layer.11.crossattention.self.key.weight" not in shapes
    assert shapes["extra_query_tokens"] == (1, 64, 768)
    assert not any("pos_embed" in n for n in shapes)
