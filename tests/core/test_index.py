"""A model as plain data: kinds from classes and from names, ties, sizes."""

from __future__ import annotations

import pytest
from torch import nn

from thawline.core.index import ModelIndex, ParamInfo, bits_of, original_name
from thawline.errors import RecipeError
from thawline.freeze.inspect import index_of


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.bn = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.register_buffer("scratch", self.bn.running_mean.clone(), persistent=False)


def test_a_live_model_lists_every_tensor_with_its_owner_and_its_ties():
    index = index_of(Tied())
    assert [p.name for p in index.params if p.tied_to] == ["head.weight"]
    assert index.aliases() == {"embed.weight": ("embed.weight", "head.weight")}
    assert index["bn.running_mean"].is_buffer
    assert index["bn.running_mean"].persistent
    assert not index["scratch"].persistent
    assert index["norm.weight"].module_class == "LayerNorm"
    assert index.modules["bn"] == ("BatchNorm1d", "_BatchNorm", "_NormBase")


@pytest.mark.parametrize(
    ("kind", "paths"),
    [
        ("norm", ["norm", "bn"]),
        ("embedding", ["embed"]),
        ("linear", ["head"]),
        ("bias", ["norm.bias", "bn.bias", "head.bias"]),
        ("LayerNorm", ["norm"]),
    ],
)
def test_kinds_are_told_from_classes(kind: str, paths: list[str]):
    assert [n.path for n in index_of(Tied()).of_kind(kind)[0]] == paths


def test_a_header_takes_statistics_and_whole_numbers_for_buffers():
    infos = [
        ParamInfo(name="bn.weight", shape=(4,), dtype="F32"),
        ParamInfo(name="bn.running_mean", shape=(4,), dtype="F32"),
        ParamInfo(name="bn.num_batches_tracked", shape=(), dtype="I64"),
        ParamInfo(name="encoder.global_cmvn.mean", shape=(80,), dtype="F32"),
    ]
    index = ModelIndex.from_header(infos)
    assert [p.name for p in index.params] == ["bn.weight"]
    assert [n.path for n in index.of_kind("norm")[0]] == ["bn"]


def test_a_header_and_the_live_model_agree_on_kinds_of_usual_names():
    live = index_of(Tied())
    header = ModelIndex.from_header([i for i in live.tensors if i.persistent and i.tied_to is None])
    for kind in ("norm", "embedding"):
        assert [n.path for n in header.of_kind(kind)[0]] == [n.path for n in live.of_kind(kind)[0]]


def test_a_lazy_layer_is_refused_until_it_has_a_shape():
    with pytest.raises(RecipeError, match="has no shape yet"):
        index_of(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(RecipeError, match="run one batch"):
        index_of(nn.Sequential(nn.LazyBatchNorm1d()))


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("a.b.weight", "a.b.weight"),
        ("base_model.model.a.q.base_layer.weight", "a.q.weight"),
        ("a.modules_to_save.default.weight", "a.weight"),
        ("_orig_mod.a._checkpoint_wrapped_module.weight", "a.weight"),
    ],
)
def test_wrappers_are_not_part_of_a_name(name: str, original: str):
    assert original_name(name) == original


@pytest.mark.parametrize(("dtype", "bits"), [("F32", 32), ("BF16", 16), ("I64", 64), ("BOOL", 8), ("F8_E4M3", 8)])
def test_bits_of_a_type(dtype: str, bits: int):
    assert bits_of(dtype) == bits
