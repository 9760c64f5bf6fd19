"""The vision transformer: frames of any number and size, tiles, and gradients that arrive where they must."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
from tests.models.videochat_case import (
    BASE,
    CASES,
    STAGE2,
    STAGE3,
    VideoChatCase,
    furthest,
    tiny_config,
    tiny_model,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from thawline.errors import DataError, RecipeError
from thawline.models.videochat import vit
from thawline.models.videochat.config import TileConfig, VisionConfig
from thawline.models.videochat.positions import image_table, video_table
from thawline.models.videochat.vit import DropPath, VisionTransformer


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, shared: Path) -> VideoChatCase:
    return VideoChatCase(shared / "parity" / "videochat2" / request.param)


def vision_gradients(model: nn.Module, case: VideoChatCase, *, blocks: int) -> dict[str, Tensor | None]:
    """Gradients of the trainable vision parameters with the patch embedding frozen and `blocks` blocks recomputed."""
    encoder = model.get_submodule("vision_encoder.encoder")
    encoder.config = dataclasses.replace(encoder.config, checkpoint_blocks=blocks)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("vision_encoder.encoder.blocks."))
        parameter.grad = None
    ids, mask = case.instruction()
    loss = model(list(case.io["stage3/video"]), case.prompts(), ids, mask)
    (loss.sum / loss.tokens).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_recomputation_loses_no_gradient_of_a_block_above_a_frozen_patch_embedding(case: VideoChatCase) -> None:
    model = case.model(BASE, STAGE2, STAGE3)
    plain = vision_gradients(model, case, blocks=0)
    recomputed = vision_gradients(model, case, blocks=2)
    assert all(g is not None for g in recomputed.values())
    # The same kernels on the same numbers, once more.
    assert all(torch.equal(g, recomputed[n]) for n, g in plain.items() if g is not None)


def test_reentrant_recomputation_would_lose_them_without_a_word_but_a_warning(
    case: VideoChatCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = case.model(BASE, STAGE2, STAGE3)

    def reentrant(layer: nn.Module, x: Tensor, *, use_reentrant: bool) -> Tensor:
        assert use_reentrant is False
        return checkpoint(layer, x, use_reentrant=True)

    monkeypatch.setattr(vit, "checkpoint", reentrant)
    if model.config.vision.blocks_run == 2:  # every block is recomputed, so nothing trainable is left in the graph
        with pytest.warns(UserWarning, match="None of the inputs have requires_grad"), pytest.raises(RuntimeError):
            vision_gradients(model, case, blocks=2)
        return
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        gradients = vision_gradients(model, case, blocks=2)
    lost = [n for n, g in gradients.items() if g is None]
    assert (len(lost), len(gradients)) == (26, 39)  # as measured on the original
    assert all(".blocks.0." in n or ".blocks.1." in n for n in lost)


def test_a_frozen_vision_transformer_may_be_recomputed_without_a_warning(case: VideoChatCase) -> None:
    model = case.model(BASE, STAGE2, STAGE3)
    encoder = model.vision_encoder.encoder
    encoder.config = dataclasses.replace(encoder.config, checkpoint_blocks=2)
    model.vision_encoder.requires_grad_(False)
    ids, mask = case.instruction()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(list(case.io["stage3/video"]), case.prompts(), ids, mask).sum.backward()
    assert model.query_tokens.grad is not None


def test_other_frame_counts_and_sizes_have_position_tables_of_their_own() -> None:
    encoder = VisionTransformer(VisionConfig(img_size=32, width=24, depth=3, heads=2, return_index=-1)).eval()
    with torch.no_grad():
        for frames, side in ((4, 32), (8, 32), (16, 48), (3, 64)):
            out = encoder(torch.randn(1, 3, frames, side, side))
            assert out.shape == (1, frames, (side // 16) ** 2, 24)
    table = video_table(8, 14, 14, 24).reshape(8, 196, 24)
    known = video_table(4, 14, 14, 24).reshape(4, 196, 24)
    # Halving the time step puts each new frame a quarter of a step from an old one (linear, half-pixel centres).
    assert torch.allclose(table[2], 0.75 * known[1] + 0.25 * known[0], atol=1e-6)
    assert torch.equal(image_table(14, 14, 24), video_table(4, 14, 14, 24)[:, :196])


def test_a_position_table_first_needed_in_inference_serves_training_later() -> None:
    encoder = VisionTransformer(VisionConfig(img_size=32, width=24, depth=2, heads=2, return_index=-1))
    frames = torch.randn(1, 3, 7, 32, 32)
    with torch.inference_mode():
        encoder(frames)
    encoder(frames).sum().backward()


def test_drop_path_leaves_samples_out_whole_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer = DropPath(0.25)
    x = torch.ones(4000, 3, 2)
    out = layer(x)
    assert sorted(set(out.flatten().tolist())) == pytest.approx([0.0, 4 / 3])
    assert torch.equal(out[:, 0, 0], out[:, 2, 1])
    assert float(out.mean()) == pytest.approx(1.0, abs=0.03)  # 3 standard deviations of the mean of 4000 draws
    assert torch.equal(layer.eval()(x), x)


@torch.no_grad()
def test_tiles_are_seen_one_by_one_in_rows_and_then_as_a_whole() -> None:
    model = tiny_model(tiny_config(tiles=TileConfig(size=32)))
    clip = torch.randn(4, 3, 64, 96)
    ids = torch.tensor([[5, 6, 7]])
    (out,) = model.encode([clip], ids, torch.ones_like(ids))
    parts = []
    for row in range(2):
        for column in range(3):
            tile = clip[:, :, row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]
            parts.append(model.encode_views(tile[None], ids, torch.ones_like(ids))[0])
    whole = functional.interpolate(clip, size=(32, 32), mode="bicubic", align_corners=False)
    parts.append(model.encode_views(whole[None], ids, torch.ones_like(ids))[0])
    assert out.shape == (7 * 6, 32)
    assert furthest(out, torch.cat(parts)) <= 1e-5  # batched and single products are summed in another order


@torch.no_grad()
def test_clips_of_different_lengths_and_kinds_share_a_batch() -> None:
    model = tiny_model()
    clips = [torch.randn(4, 3, 32, 32), torch.randn(1, 3, 32, 32), torch.randn(8, 3, 32, 32)]
    ids = torch.tensor([[5, 6, 7], [8, 9, 3]])
    mask = torch.ones_like(ids)
    out = model.encode(clips, ids, mask, owners=[0, 0, 1])
    for clip, tokens, owner in zip(clips, out, (0, 0, 1), strict=True):
        alone = model.encode_views(clip[None], ids[owner : owner + 1], mask[owner : owner + 1])[0]
        assert furthest(tokens, alone) <= 1e-5


def test_a_clip_that_is_no_whole_number_of_tiles_is_refused() -> None:
    model = tiny_model(tiny_config(tiles=TileConfig(size=32)))
    with pytest.raises(DataError, match="a clip of 33 x 64 pixels cannot be cut into tiles of 32"):
        model.encode([torch.zeros(1, 3, 33, 64)], torch.tensor([[5]]), torch.tensor([[1]]))


def test_an_instruction_is_given_exactly_where_one_is_read() -> None:
    frames = torch.zeros(1, 4, 3, 32, 32)
    with pytest.raises(RecipeError, match="takes an instruction, and none was given"):
        tiny_model().encode_views(frames)
    with pytest.raises(RecipeError, match="without text input"):
        tiny_model(tiny_config().for_captions()).encode_views(frames, torch.tensor([[5]]), torch.tensor([[1]]))


@pytest.mark.parametrize("field", [{"heads": 5}, {"img_size": 33}, {"return_index": -9}])
def test_sizes_that_cannot_be_meant_are_refused(field: dict[str, int]) -> None:
    with pytest.raises(RecipeError):
        dataclasses.replace(VisionConfig(width=24, heads=2, depth=3, img_size=32), **field)
