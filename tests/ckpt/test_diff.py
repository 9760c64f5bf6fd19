"""Comparing two sets of tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from thawline.ckpt.diff import block_of, diff


def halves(*words: int) -> Tensor:
    return torch.tensor(words, dtype=torch.uint16).view(torch.float16)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (halves(0x7E01), halves(0x7E01), True),
        (halves(0x7E01), halves(0x7E02), False),
        (halves(0x0000), halves(0x8000), False),
        (torch.tensor([math.inf]), torch.tensor([math.inf]), True),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), False),
        (torch.tensor([1]), torch.tensor([[1]]), False),
        (torch.empty(0, 3), torch.empty(0, 3), True),
        (torch.empty(0, 3), torch.empty(3, 0), False),
        (torch.tensor(2), torch.tensor(2), True),
        (torch.tensor(True), torch.tensor(False), False),
        (torch.ones(3, 2), torch.ones(2, 3).t(), True),
    ],
    ids=[
        "nan",
        "another nan",
        "signed zero",
        "inf",
        "type",
        "shape",
        "empty",
        "empty of another shape",
        "scalar",
        "bool",
        "strides",
    ],
)
def test_equality_is_of_bits_shape_and_type(one: Tensor, other: Tensor, same: bool) -> None:
    assert diff({"x": one}, {"x": other}).is_same is same


def test_the_figures_are_those_of_numpy_in_double_precision() -> None:
    torch.manual_seed(0)
    a = torch.randn(1000, 1100)  # more than one piece
    b = a.clone()
    b[:, :11] += torch.randn(1000, 11)
    (found,) = diff({"x": a}, {"x": b}).tensors
    gap = b.numpy().astype("f8") - a.numpy().astype("f8")
    assert found.status == "changed"
    assert found.differing == int((gap != 0).sum())
    assert found.max_abs == abs(gap).max()
    # another order of summation over 1.1 million squares
    assert found.relative == pytest.approx(
        (gap**2).sum() ** 0.5 / (a.numpy().astype("f8") ** 2).sum() ** 0.5, rel=1e-12
    )


def test_nan_and_infinity_are_counted_and_do_not_hide_the_rest() -> None:
    a = torch.tensor([1.0, math.nan, 3.0, math.inf, 5.0])
    b = torch.tensor([1.5, math.nan, math.nan, math.inf, 5.0])
    (found,) = diff({"x": a}, {"x": b}).tensors
    assert (found.differing, found.not_finite, found.max_abs) == (2, 1, 0.5)


def test_every_tensor_is_accounted_for_by_name() -> None:
    a = {"enc.0.w": torch.zeros(2), "enc.1.w": torch.zeros(2), "old.w": torch.zeros(3)}
    b = {"enc.1.w": torch.ones(2), "enc.0.w": torch.zeros(2), "new.w": torch.zeros(4)}
    found = diff(a, b, first="base", second="run")
    assert [found.names(s) for s in ("same", "changed", "added", "removed")] == [
        ("enc.0.w",),
        ("enc.1.w",),
        ("new.w",),
        ("old.w",),
    ]
    assert found.table() == (
        "block  tensors  changed    elements  max abs  relative\n"
        "enc.0  1        0          0         -        -\n"
        "enc.1  1        1          100.0%    1        -\n"
        "old    1        1 removed  100.0%    -        -\n"
        "new    1        1 added    100.0%    -        -\n"
        "base and run are different: 1 same, 1 changed, 1 added, 1 removed"
    )
    assert diff(a, a).summary() == "A and B are bitwise equal: 3 same, 0 changed, 0 added, 0 removed"


def test_the_json_is_strict_json() -> None:
    found = diff({"x": torch.tensor([math.nan, 1.0])}, {"x": torch.tensor([1.0, math.inf])}).to_json()
    text = json.dumps(found, allow_nan=False)
    assert json.loads(text)["tensors"][0]["max_abs"] is None


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("encoder.encoders.11.norm.weight", "encoder.encoders.11"),
        ("model.decoder.embed_tokens.weight", "model.decoder.embed_tokens"),
        ("weight", "weight"),
        ("layer2.0.conv.weight", "layer2.0"),
    ],
)
def test_blocks_are_layers(name: str, block: str) -> None:
    assert block_of(name) == block


def test_one_pair_of_tensors_is_read_at_a_time() -> None:
    class Lazy(Mapping[str, Tensor]):
        alive = 0

        def __getitem__(self, name: str) -> Tensor:
            Lazy.alive += 1
            return torch.full((2,), 1.0)

        def __iter__(self) -> Iterator[str]:
            for number in range(5):
                assert Lazy.alive % 2 == 0
                yield str(number)

        def __len__(self) -> int:
            return 5

    assert diff(Lazy(), Lazy()).is_same
    assert Lazy.alive == 10


def test_names_that_hold_anything_stay_on_their_line_of_the_table() -> None:
    odd = {"a\nb\x1b[2J.w": torch.zeros(1), f"{'x' * 9000}.w": torch.zeros(1), "层.w": torch.zeros(1)}
    lines = diff(odd, odd).table().splitlines()
    assert len(lines) == 5
    assert max(map(len, lines)) < 200
    assert lines[1].startswith("a\\nb\\x1b[2J ")
    assert lines[3].startswith("层 ")
