"""Deltas that know their base."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from thawline.ckpt import tensorfile
from thawline.ckpt.delta import (
    BaseRef,
    Delta,
    apply,
    check_base,
    compose,
    delta_of,
    lay_over,
    read_delta,
    stack,
    write_delta,
)
from thawline.core.digest import digest_tensor
from thawline.errors import BaseMismatch, CheckpointError


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def bits(tensors: Mapping[str, Tensor] | Iterator[tuple[str, Tensor]]) -> dict[str, str]:
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    return {name: digest_tensor(tensor) for name, tensor in pairs}


def clone(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def tuned(base: Mapping[str, Tensor], *names: str, by: float = 1.0) -> dict[str, Tensor]:
    return {name: tensor + by if name in names else tensor.clone() for name, tensor in base.items()}


def test_a_delta_holds_what_changed_and_nothing_else_and_gives_the_model_back(tmp_path: Path) -> None:
    before = clone(model().state_dict())
    net = model()
    net.train()
    net(torch.randn(8, 4))  # no optimizer step: only the statistics move
    delta = delta_of(BaseRef.of(before), net.state_dict())
    assert delta.changed == ("1.num_batches_tracked", "1.running_mean", "1.running_var")
    assert (delta.added, delta.removed) == ((), ())
    write_delta(tmp_path / "d", delta)
    assert bits(apply(before, read_delta(tmp_path / "d"))) == bits(net.state_dict())


def test_requires_grad_at_the_moment_of_saving_does_not_matter() -> None:
    base = BaseRef.of(model())
    net = model()
    nn.init.zeros_(net[2].weight)
    net.requires_grad_(False)
    assert delta_of(base, net.state_dict()).changed == ("2.weight",)


@pytest.mark.parametrize(("before", "after"), [(0x0000, 0x8000), (0x7E00, 0x7E01)], ids=["signed zero", "another nan"])
def test_a_difference_in_bits_alone_is_a_difference(before: int, after: int) -> None:
    one, two = (torch.tensor([word], dtype=torch.uint16).view(torch.float16) for word in (before, after))
    assert delta_of(BaseRef.of({"x": one}), {"x": two}).changed == ("x",)


def test_new_removed_wrapped_and_tied_tensors_are_accounted_for(tmp_path: Path) -> None:
    base = {"body": torch.randn(8, 8), "old_head": torch.randn(3), "embed": torch.randn(5, 2)}
    base["proj"] = base["embed"]
    embed = torch.randn(5, 2)
    full = {"body.base_layer": base["body"], "new_head": torch.randn(4), "embed": embed, "proj": embed}
    delta = delta_of(BaseRef.of(base), full)
    assert delta.changed == ("embed", "proj")
    assert delta.added == ("body.base_layer", "new_head")
    assert delta.copied == {"body.base_layer": "body"}
    assert delta.removed == ("body", "old_head")
    write_delta(tmp_path / "d", delta)
    with safetensors.safe_open(tmp_path / "d", framework="pt") as file:
        assert sorted(file.keys()) == ["embed", "new_head"]  # tied: once; wrapped: not at all
    back = read_delta(tmp_path / "d")
    assert back.tensors["proj"] is back.tensors["embed"]
    assert bits(apply(base, back)) == bits(full)
    assert back.result == BaseRef.of(full, below=[delta.base.fingerprint])


def test_a_part_of_the_model_may_be_given_if_it_is_said(tmp_path: Path) -> None:
    base = clone(model().state_dict())
    part = {"2.weight": base["2.weight"] * 2, "2.bias": base["2.bias"]}
    delta = delta_of(BaseRef.of(base), part, complete=False)
    assert (delta.changed, delta.removed) == (("2.weight",), ())
    assert len(delta_of(BaseRef.of(base), part).removed) == len(base) - 2


def test_the_same_delta_is_the_same_bytes_whatever_order_the_tensors_came_in(tmp_path: Path) -> None:
    base = clone(model().state_dict())
    full = tuned(base, "0.weight", "2.bias", "1.num_batches_tracked")
    write_delta(tmp_path / "a", delta_of(BaseRef.of(base), full))
    backwards = dict(reversed(full.items()))
    write_delta(tmp_path / "b", delta_of(BaseRef.of(dict(reversed(base.items()))), backwards))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_safetensors_package_reads_our_files_and_we_read_its(tmp_path: Path) -> None:
    tensors = {
        "f32": torch.randn(3, 5),
        "bf16": torch.randn(7).bfloat16(),
        "i64": torch.tensor(5),
        "bool": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 4),
        "strided": torch.randn(4, 6).t()[1:],
        "f64": torch.randn(2).double(),
    }
    with (tmp_path / "ours").open("wb") as file:
        for piece in tensorfile.pieces(tensors, {"a": "b"}):
            file.write(piece)
    assert bits(safetensors.torch.load_file(tmp_path / "ours")) == bits(tensors)
    safetensors.torch.save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs", {"a": "b"})
    metadata, back = tensorfile.read(tmp_path / "theirs")
    assert metadata == {"a": "b"}
    assert bits(back) == bits(tensors)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in back.values() if tensor.numel())
    assert tensorfile.size_of(tensors, {"a": "b"}) == (tmp_path / "ours").stat().st_size


@pytest.mark.parametrize("bad", [torch.randn(2, 2).to_sparse(), torch.empty(2, device="meta")], ids=["sparse", "meta"])
def test_a_tensor_without_plain_bytes_is_refused_by_name(bad: Tensor) -> None:
    with pytest.raises(CheckpointError, match="has no plain bytes to save") as caught:
        tensorfile.header({"encoder.weird": bad}, {})
    assert caught.value.where == "encoder.weird"


def test_another_base_is_refused_with_both_fingerprints_and_the_first_differing_tensors() -> None:
    base = clone(model().state_dict())
    other = tuned(base, "0.weight", "0.bias", "2.weight", by=0.5)
    del other["2.bias"]
    other["extra"] = torch.zeros(1)
    ref = BaseRef.of(base, path="models/base")
    delta = delta_of(ref, tuned(base, "1.bias"))
    with pytest.raises(BaseMismatch) as caught:
        list(apply(other, delta, source="run/delta.safetensors"))
    assert caught.value.exit_code == 4
    assert str(caught.value) == (
        "run/delta.safetensors: belongs to another base\n"
        f"  made over: {ref.fingerprint} (models/base)\n"
        f"  given:     {BaseRef.of(other).fingerprint}\n"
        "  3 of 9 tensors differ, first: 0.bias, 0.weight, 2.weight\n"
        "  1 of 9 tensors are missing, first: 2.bias\n"
        "  1 of 9 tensors are unknown to it, first: extra\n"
        "  fix: give the base it was made from, recorded as models/base (--base)"
    )


def test_a_base_that_only_lacks_tensors_is_refused_too() -> None:
    base = clone(model().state_dict())
    delta = delta_of(BaseRef.of(base), tuned(base, "0.weight"))
    del base["2.bias"]
    with pytest.raises(BaseMismatch, match=r"1 of 9 tensors are missing, first: 2\.bias"):
        list(apply(base, delta))


def test_deltas_stack_in_the_order_in_which_they_were_made() -> None:
    stage1 = clone(model().state_dict())
    stage2 = tuned(stage1, "0.weight", "0.bias")
    stage2["adapter"] = torch.randn(3)
    stage3 = tuned(stage2, "0.weight", "2.weight")
    stage3["0.bias"] = stage1["0.bias"].clone()  # back to what it was in the base
    del stage3["adapter"]
    del stage3["2.bias"]
    second = delta_of(BaseRef.of(stage1), stage2)
    third = delta_of(BaseRef(**_fields(second.result)), stage3)
    assert third.base.below == (second.base.fingerprint,)
    whole = stack([("two", second), ("three", third)])
    assert whole.changed == ("0.weight", "2.weight")
    assert whole.removed == ("2.bias",)
    assert bits(apply(stage1, whole)) == bits(stage3) == bits(apply(apply(stage1, second), third))


def test_deltas_in_the_wrong_order_or_one_left_out_are_refused_by_name() -> None:
    stage1 = clone(model().state_dict())
    stage2 = tuned(stage1, "0.weight")
    second = delta_of(BaseRef.of(stage1), stage2)
    third = delta_of(second.result, tuned(stage2, "2.weight"))
    with pytest.raises(BaseMismatch, match="these deltas were made in another order: two -> three") as caught:
        stack([("three", third), ("two", second)])
    assert caught.value.where == "three -> two"
    with pytest.raises(BaseMismatch, match="lies below: a delta made over it has to be applied first"):
        list(apply(stage1, third))
    with pytest.raises(BaseMismatch, match="belongs to another base"):
        compose(third, second)


names = st.sampled_from("abcdef")
models = st.dictionaries(names, st.integers(0, 3), min_size=1)


@settings(max_examples=200, deadline=None)
@given(models, models, models)
def test_composing_two_deltas_is_applying_them_one_after_the_other(
    one: dict[str, int], two: dict[str, int], three: dict[str, int]
) -> None:
    """Names vanish, come back, swap their contents: few names and few values make all of that happen."""
    first, second, third = ({n: torch.tensor([v]) for n, v in m.items()} for m in (one, two, three))
    d1 = delta_of(BaseRef.of(first), second)
    d2 = delta_of(d1.result, third)
    assert bits(apply(first, d1)) == bits(second)
    assert bits(apply(first, compose(d1, d2))) == bits(third)
    assert compose(d1, d2).result.fingerprint == BaseRef.of(third).fingerprint


@pytest.mark.parametrize("merged", [True, False, None])
def test_whether_adapters_are_merged_is_kept(tmp_path: Path, merged: bool | None) -> None:
    base = BaseRef.of({"a": torch.zeros(2)}, path="b")
    write_delta(tmp_path / "d", delta_of(base, {"a": torch.ones(2)}, merged=merged))
    back = read_delta(tmp_path / "d")
    assert (back.merged, back.base) == (merged, base)


def test_a_flipped_bit_anywhere_in_a_delta_file_is_refused_as_damage(tmp_path: Path) -> None:
    base = {"a": torch.randn(6), "b": torch.randn(3)}
    write_delta(tmp_path / "d", delta_of(BaseRef.of(base), tuned(base, "a")))
    good = (tmp_path / "d").read_bytes()
    for position in range(0, len(good), 3):
        if good[position : position + 1] == b" ":
            continue  # the padding of the header
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        (tmp_path / "d").write_bytes(bad)
        with pytest.raises(CheckpointError):
            read_delta(tmp_path / "d")
    for length in range(0, len(good), 7):
        (tmp_path / "d").write_bytes(good[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            read_delta(tmp_path / "d")


def test_a_file_that_is_no_delta_is_refused_as_that(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"is not a delta that this version reads \('no Thawline file'"):
        read_delta(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read_delta(tmp_path / "absent")


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"[]",
        b"{",
        b"{}",
    ],
)
def test_a_header_that_lies_is_refused(text: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        tensorfile.parse_header(text, 4, where=tmp_path)


def test_the_record_of_a_base_survives_its_file_and_finds_its_own_damage(tmp_path: Path) -> None:
    ref = BaseRef.of(model(), path="models/x", below=["0" * 64])
    ref.write(tmp_path / "base.json")
    assert BaseRef.read(tmp_path / "base.json") == ref
    value = json.loads((tmp_path / "base.json").read_bytes())
    value["digests"]["0.weight"] = "0" * 64
    (tmp_path / "base.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="its digests do not give its fingerprint"):
        BaseRef.read(tmp_path / "base.json")


def test_the_same_base_raises_nothing_and_its_path_does_not_matter() -> None:
    check_base(BaseRef.of(model(), path="here"), BaseRef.of(model(), path="there"))


def test_a_stream_is_consumed_one_tensor_at_a_time() -> None:
    base = {str(n): torch.full((4,), float(n)) for n in range(50)}
    delta = delta_of(BaseRef.of(base), tuned(base, "3"))
    handed_out = 0

    def stream() -> Iterator[tuple[str, Tensor]]:
        nonlocal handed_out
        for item in base.items():
            handed_out += 1
            yield item

    applied = apply(stream(), delta)
    next(applied)
    assert handed_out == 1


def _fields(ref: BaseRef) -> dict[str, object]:
    return {"fingerprint": ref.fingerprint, "digests": ref.digests, "path": "stage2", "below": ref.below}


def test_extracting_a_delta_needs_only_two_full_models(tmp_path: Path) -> None:
    base, full = clone(model(1).state_dict()), clone(model(2).state_dict())
    extracted: Delta = delta_of(BaseRef.of(iter(base.items())), iter(full.items()))
    assert bits(apply(base, extracted)) == bits(full)


def test_a_model_shaped_from_the_base_is_restored_with_wrapped_layers_and_new_ones_that_look_like_old_ones() -> None:
    base = {"a.weight": torch.randn(4), "a.bias": torch.zeros(3), "b": torch.randn(2)}
    shaped = {"a.base_layer.weight": base["a.weight"], "a.bias": base["a.bias"], "b": base["b"]}
    saved = shaped | {"lora": torch.zeros(3), "b": base["b"] + 1}  # the adapter has the bytes of a.bias
    delta = delta_of(BaseRef.of(base), {n: saved[n] for n in ("a.base_layer.weight", "lora", "b")}, complete=False)
    assert delta.copied == {"a.base_layer.weight": "a.weight", "lora": "a.bias"}
    built = shaped | {"lora": torch.randn(3)}  # another draw than what was saved
    assert bits(lay_over(built, delta)) == bits(saved)


def test_a_model_that_trained_on_is_not_taken_back_by_halves() -> None:
    base = clone(model().state_dict())
    early = delta_of(BaseRef.of(base), tuned(base, "2.weight"))
    later = tuned(base, "2.weight", "0.weight", by=5)  # 0.weight was thawed after the checkpoint
    with pytest.raises(CheckpointError, match=r"neither in the delta nor as in the base: 0\.weight") as caught:
        lay_over(later, early, source="step-00000010")
    assert "load the base anew" in str(caught.value)
    assert bits(lay_over(later, early, as_shaped=["0.weight"]))["2.weight"] == early.digests["2.weight"]
    assert bits(lay_over(base, early)) == bits(apply(base, early))
