"""Chunk masks against WeNet's own definition, row by row."""

from __future__ import annotations

import pytest
import torch

from thawline.models.wenet.masks import chunk_mask, draw_chunk, encoder_mask


@pytest.mark.parametrize(("size", "chunk", "left"), [(9, 3, -1), (10, 4, 1), (7, 2, 0), (5, 8, 2), (1, 1, 0)])
def test_a_frame_sees_its_chunk_and_the_left_ones(size: int, chunk: int, left: int) -> None:
    expected = torch.zeros(size, size, dtype=torch.bool)
    for i in range(size):
        start = 0 if left < 0 else max((i // chunk - left) * chunk, 0)
        expected[i, start : min((i // chunk + 1) * chunk, size)] = True
    assert torch.equal(chunk_mask(size, chunk, left, torch.device("cpu")), expected)


def test_the_draw_uses_the_global_generator_and_covers_full_context() -> None:
    torch.manual_seed(3)
    first = [draw_chunk(60, max_chunk=25, draw_left=True) for _ in range(200)]
    torch.manual_seed(3)
    assert [draw_chunk(60, max_chunk=25, draw_left=True) for _ in range(200)] == first
    full = [d for d in first if d[0] == 60]
    assert 60 < len(full) < 140
    assert all(1 <= chunk <= 25 and left >= 0 for chunk, left in first if chunk != 60)


def test_very_short_batches_draw_without_failing() -> None:
    for size in (1, 2, 3):
        for _ in range(20):
            chunk, _ = draw_chunk(size, max_chunk=25, draw_left=True)
            assert chunk >= 1


def test_evaluation_draws_nothing() -> None:
    before = torch.get_rng_state()
    valid = torch.ones(1, 1, 30, dtype=torch.bool)
    mask = encoder_mask(
        valid, chunk_size=-1, left_chunks=-1, static_chunk=0, dynamic=True, draw_left=True, max_chunk=25
    )
    assert mask is valid
    assert torch.equal(torch.get_rng_state(), before)


def test_static_chunks_hold_also_in_evaluation() -> None:
    valid = torch.ones(1, 1, 6, dtype=torch.bool)
    mask = encoder_mask(
        valid, chunk_size=-1, left_chunks=-1, static_chunk=2, dynamic=False, draw_left=False, max_chunk=25
    )
    assert torch.equal(mask[0], chunk_mask(6, 2, -1, torch.device("cpu")))
