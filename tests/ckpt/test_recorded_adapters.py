"""A delta records what its LoRA adapters are worth: merged from the file they come out as peft merges them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from thawline.ckpt.convert import convert
from thawline.ckpt.delta import BaseRef, Delta, compose, delta_of, read_delta, write_delta
from thawline.ckpt.source import open_source
from thawline.ckpt.tensors import SourceTensors
from thawline.core.adapter import Adapter
from thawline.errors import CheckpointError
from thawline.freeze.lora import adapters_of, inject_, merged_copy, reinject_
from thawline.freeze.plan import Lora

pytest.importorskip("peft")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.line = nn.Linear(8, 12)
        self.wave = nn.Conv1d(8, 6, 3)
        self.plane = nn.Conv2d(4, 6, 3)
        self.point = nn.Conv2d(6, 5, 1)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight


TARGETS = ("embed", "line", "wave", "plane", "point")


def trained(lora: Lora, dtype: torch.dtype = torch.float32) -> tuple[BaseRef, nn.Module]:
    """A net with adapters whose factors are not those at birth, and its base."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    base = BaseRef.of(model)
    inject_(model, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape))
    return base, model


def written(folder: Path, lora: Lora, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Delta]:
    """base.safetensors and delta.safetensors in `folder`."""
    base, model = trained(lora, dtype)
    torch.manual_seed(0)
    save_file({n: t.clone() for n, t in Net().to(dtype).state_dict().items()}, folder / "base.safetensors")
    delta = delta_of(base, model.state_dict(), merged=False, adapters=adapters_of(model))
    write_delta(folder / "delta.safetensors", delta)
    return model, delta


def merged(folder: Path) -> dict[str, Tensor]:
    with open_source(folder / "delta.safetensors", base=folder / "base.safetensors") as source:
        assert not source.adapters
        return dict(SourceTensors(source))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rslora", [False, True])
def test_every_kind_of_layer_is_merged_as_peft_merges_it(rslora: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model, delta = written(tmp_path, Lora(target=TARGETS, r=3, alpha=5, rslora=rslora), dtype)
    assert set(delta.adapters) == set(TARGETS)
    assert delta.adapters["embed"].also == ("out.weight",)
    want = merged_copy(model).state_dict()
    assert same(merged(tmp_path), want)
    assert torch.equal(merged(tmp_path)["out.weight"], want["embed.weight"])  # a tied name has the same values


@pytest.mark.parametrize("layer", ["embed", "out"])
def test_a_tied_weight_is_merged_under_each_of_its_names_whichever_has_the_adapter(layer: str, tmp_path: Path) -> None:
    base, model = trained(Lora(target=(layer,), r=2, alpha=3))
    torch.manual_seed(0)
    torch.save(Net().state_dict(), tmp_path / "base.pt")  # the file says that the two are one
    write_delta(tmp_path / "d.safetensors", delta_of(base, model.state_dict(), adapters=adapters_of(model)))
    for to in ("torch", "safetensors"):
        convert(tmp_path / "d.safetensors", tmp_path / to, to=to, base=tmp_path / "base.pt")
        with open_source(tmp_path / to) as source:
            assert same(dict(SourceTensors(source)), merged_copy(model).state_dict())
            assert sum(info.tied_to is not None for info in source.infos) == 1


def test_the_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    _, delta = written(tmp_path, Lora(target=("line", "plane"), r=2, alpha=3, dropout=0.25))
    assert read_delta(tmp_path / "delta.safetensors").adapters == delta.adapters
    assert delta.adapters["line"] == Adapter(rank=2, alpha=3.0, dropout=0.25)


def test_a_delta_without_adapters_has_no_record(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    write_delta(tmp_path / "d", delta_of(BaseRef.of(net), {n: t + 1 for n, t in net.state_dict().items()}))
    assert b'"adapters"' not in (tmp_path / "d").read_bytes()


def test_adapters_are_put_back_with_their_dropout_and_their_flag(tmp_path: Path) -> None:
    model, delta = written(tmp_path, Lora(target=("line", "wave"), r=2, alpha=3, dropout=0.25))
    fresh: Any = Net()
    reinject_(fresh, delta.adapters, source="d")
    reinject_(fresh, delta.adapters, source="d")  # those that are there stay
    fresh.load_state_dict(model.state_dict())
    assert adapters_of(fresh) == delta.adapters
    assert same(merged_copy(fresh).state_dict(), merged_copy(model).state_dict())
    x = torch.randn(2, 8)
    assert torch.equal(fresh.eval().line(x), model.eval().get_submodule("line")(x))
    with pytest.raises(CheckpointError, match="adapts 1 layers that the model does not have: nowhere"):
        reinject_(Net(), {"nowhere": Adapter(rank=1, alpha=1)}, source="d")


def test_adapters_that_are_merged_already_are_not_added_twice(tmp_path: Path) -> None:
    base, model = trained(Lora(target=("line",), r=2, alpha=3))
    want = merged_copy(model).state_dict()["line.weight"]
    model.get_submodule("line").merge(safe_merge=True)  # type: ignore[operator]
    torch.manual_seed(0)
    save_file({n: t.clone() for n, t in Net().state_dict().items()}, tmp_path / "base.safetensors")
    delta = delta_of(base, model.state_dict(), merged=True, adapters=adapters_of(model))
    assert delta.adapters["line"].merged
    write_delta(tmp_path / "delta.safetensors", delta)
    assert torch.equal(merged(tmp_path)["line.weight"], want)
    fresh: Any = Net()
    reinject_(fresh, delta.adapters, source="d")
    assert fresh.line.merged


def test_adapters_of_the_base_are_no_concern_of_the_delta() -> None:
    _, model = trained(Lora(target=("line",), r=2, alpha=3))
    assert adapters_of(model, besides=BaseRef.of(model).digests) == {}


def test_a_kind_of_adapter_that_is_more_than_a_product_is_not_recorded_as_one() -> None:
    import peft

    net = nn.Sequential(nn.Linear(4, 4))
    config = peft.LoraConfig(r=2, target_modules="0", use_dora=True)
    peft.inject_adapter_in_model(config, net, adapter_name="default")
    with pytest.raises(CheckpointError, match="more than a product added to the weight: use_dora") as caught:
        adapters_of(net)
    assert caught.value.where == "0"


def test_stacked_deltas_keep_the_adapters_that_are_still_there() -> None:
    base, model = trained(Lora(target=("line",), r=2, alpha=3))
    first = delta_of(base, model.state_dict(), adapters=adapters_of(model))
    tuned = {n: t + 1 if "lora_B" in n else t.clone() for n, t in model.state_dict().items()}
    second = delta_of(first.result, tuned)
    assert compose(first, second).adapters == first.adapters
    plain = delta_of(first.result, merged_copy(model).state_dict())
    assert compose(first, plain).adapters == {}


def test_a_delta_over_a_delta_with_adapters_is_merged_with_their_scale(tmp_path: Path) -> None:
    model, first = written(tmp_path, Lora(target=("line", "embed"), r=2, alpha=3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(1)
    base = BaseRef(fingerprint=first.result.fingerprint, digests=first.result.digests, below=first.result.below)
    write_delta(tmp_path / "second.safetensors", delta_of(base, model.state_dict()))
    whole = tmp_path / "over.safetensors"
    with pytest.raises(CheckpointError, match="is a delta over a base that is not given"):
        open_source(tmp_path / "second.safetensors", base=tmp_path / "delta.safetensors")
    read = read_delta(tmp_path / "delta.safetensors")
    at = BaseRef(fingerprint=read.base.fingerprint, digests=read.base.digests, path=str(tmp_path / "base.safetensors"))
    write_delta(whole, delta_of(at, {**trained_state(tmp_path)}, adapters=first.adapters))
    with open_source(tmp_path / "second.safetensors", base=whole) as source:
        assert same(dict(SourceTensors(source)), merged_copy(model).state_dict())


def trained_state(folder: Path) -> dict[str, Tensor]:
    with open_source(folder / "delta.safetensors", base=folder / "base.safetensors", apart=True) as source:
        return dict(SourceTensors(source))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"rank": 2, "alpha": 4.0, "scale": 1.0}, "has the scale 2.0, not 1.0"),
        ({"rank": 0, "alpha": 4.0, "scale": 1.0}, "rank 0"),
        ({"alpha": 4.0, "scale": 1.0}, "lacks something"),
        ({"rank": 2, "alpha": 4.0, "scale": 2.0, "bias": True}, "'bias', which this version does not know"),
        ([], "no mapping"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adapter.from_json(json.loads(json.dumps(record)))


def test_what_a_checkpoint_leaves_to_a_delta_with_adapters_is_taken_merged(tmp_path: Path) -> None:
    base, model = trained(Lora(target=("line",), r=2, alpha=3))
    torch.manual_seed(0)
    save_file({n: t.clone() for n, t in Net().state_dict().items()}, tmp_path / "base.safetensors")
    base = replace(base, path=str(tmp_path / "base.safetensors"))
    write_delta(tmp_path / "d.safetensors", delta_of(base, model.state_dict(), adapters=adapters_of(model)))
    part = {"wave.bias": torch.randn(6)}
    torch.save(part, tmp_path / "part.pt")
    convert(tmp_path / "part.pt", tmp_path / "o.safetensors", to="safetensors", base=tmp_path / "d.safetensors")
    assert same(load_file(tmp_path / "o.safetensors"), dict(merged_copy(model).state_dict()) | part)
