"""Recomputed activations: the same gradients to the last bit, from less memory, also above what is frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import yaml
from tests.cli import speech_fixture
from tests.models import test_whisper, videochat_case
from torch import Tensor, nn
from torch.nn import functional

from thawline.errors import RecipeError
from thawline.freeze.doctor import SavedActivations
from thawline.models.recompute import recompute_
from thawline.models.videochat.model import Prompt
from thawline.models.vision import efficientnet_lite
from thawline.models.wenet.config import read_config
from thawline.models.wenet.model import build

transformers = pytest.importorskip("transformers")

Case = tuple[nn.Module, Callable[[Any], Tensor], str]
"""A model in training mode, the loss of a batch, and the path of what lies below everything that trains."""


def wenet() -> Case:
    values = yaml.safe_load(speech_fixture.TRAIN_YAML)
    values["encoder_conf"] |= {"use_dynamic_chunk": True, "attention_dropout_rate": 0.1}
    feats, lengths = torch.randn(3, 61, 80), torch.tensor([61, 50, 40])
    target, counts = torch.randint(3, 12, (3, 4)), torch.tensor([4, 3, 2])
    return build(read_config(values)), lambda model: model.loss(feats, lengths, target, counts).total, "encoder.embed"


def whisper() -> Case:
    model = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig.from_dict(test_whisper.CONFIG | {"dropout": 0.1, "encoder_layers": 3})
    )
    feats, read = torch.randn(2, 8, 50), torch.randint(0, 40, (2, 6))
    return (
        model,
        lambda model: model(feats, decoder_input_ids=read, labels=read, use_cache=False).loss,
        "model.encoder.conv1",
    )


def vit() -> Case:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    images = torch.randn(2, 3, 16, 16)
    return (
        transformers.ViTForImageClassification(config),
        lambda model: model(images).logits.square().sum(),
        "vit.embeddings",
    )


def efficientnet() -> Case:
    images = torch.randn(2, 3, 32, 32)
    model = efficientnet_lite.build("efficientnet-lite0", classes=4)
    return model, lambda model: functional.cross_entropy(model(images), torch.tensor([0, 2])), "_conv_stem"


def videochat() -> Case:
    model = videochat_case.tiny_model()
    clips = [torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)]
    prompts = [Prompt(pieces=([5, 6], [7, 8]), labels=([-100, -100], [7, 8]))] * 2
    ids = torch.tensor([[5, 6, 7], [8, 9, 3]])
    return (
        model,
        lambda model: model(clips, prompts, ids, torch.ones_like(ids)).sum,
        "vision_encoder.encoder.patch_embed",
    )


CASES = [wenet, whisper, vit, efficientnet, videochat]


def pass_over(make: Callable[[], Case], *, recompute: bool) -> tuple[dict[str, Tensor | None], dict[str, Tensor], int]:
    """Gradients, buffers, and the bytes kept in one pass with what is lowest frozen."""
    torch.manual_seed(0)
    model, loss, frozen = make()
    model.train()
    model.requires_grad_(True)
    model.get_submodule(frozen).requires_grad_(False)
    if recompute:
        recompute_(model)
    torch.manual_seed(1)
    with SavedActivations(model) as saved:
        total = loss(model)
    total.backward()
    return {n: p.grad for n, p in model.named_parameters()}, dict(model.named_buffers()), saved.bytes


@pytest.mark.parametrize("make", CASES)
def test_gradients_and_statistics_are_bitwise_the_same_from_less_memory(make: Callable[[], Case]) -> None:
    plain, statistics, whole = pass_over(make, recompute=False)
    again, after, less = pass_over(make, recompute=True)
    assert [n for n, g in again.items() if g is None] == [n for n, g in plain.items() if g is None]
    assert all(torch.equal(g, plain[n]) for n, g in again.items() if g is not None)
    assert all(torch.equal(b, statistics[n]) for n, b in after.items())
    assert less < 0.7 * whole


@pytest.mark.parametrize("make", [wenet, efficientnet, whisper])
def test_the_negative_control_masks_drawn_anew_are_noticed(
    make: Callable[[], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils import checkpoint as module

    @contextmanager
    def forgetful(*_: Any, **__: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(module, "set_device_states", lambda *_, **__: None)
    monkeypatch.setattr(module.torch, "set_rng_state", lambda state: None)
    plain, *_ = pass_over(make, recompute=False)
    again, *_ = pass_over(make, recompute=True)
    assert any(g is not None and not torch.equal(g, plain[n]) for n, g in again.items())


def test_a_model_without_known_blocks_is_refused() -> None:
    with pytest.raises(RecipeError, match="Sequential has no blocks that can recompute") as caught:
        recompute_(nn.Sequential(nn.Linear(2, 2)))
    assert "run.micro_batch takes less memory with any model" in str(caught.value)


def test_statistics_that_would_move_twice_are_refused() -> None:
    model, *_ = vit()
    model.vit.layernorm = nn.BatchNorm1d(16)  # type: ignore[union-attr]
    with pytest.raises(RecipeError, match="BatchNorm statistics of ViTForImageClassification would move twice"):
        recompute_(model)


def test_a_frozen_part_below_keeps_nothing_with_or_without() -> None:
    kept = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model, *_ = wenet()
        model.requires_grad_(False)
        model.ctc.requires_grad_(True)  # type: ignore[union-attr]
        if recompute:
            recompute_(model)
        torch.manual_seed(1)
        with SavedActivations(model.encoder) as saved, SavedActivations(model):  # type: ignore[arg-type]
            model.encoder(torch.randn(2, 40, 80), torch.tensor([40, 30]))  # type: ignore[operator]
        kept.append(saved.bytes)
    assert kept == [0, 0]
