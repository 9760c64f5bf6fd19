"""WeNet's two kinds of LoRA file give the same model; each is told from the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from thawline.errors import CheckpointError
from thawline.models.wenet.lora import resolve_lora


@pytest.fixture
def lora(wenet_case: Any) -> Any:
    case = wenet_case("u2_conformer_lora")
    conf = case.json("meta.json")["lora_conf"]
    files = {
        name: torch.load(case.folder / f"{name}.pt", weights_only=True)
        for name in ("base", "step", "epoch", "lora_only")
    }
    return case, conf["lora_alpha"] / conf["lora_rank"], files


@pytest.mark.parametrize(
    ("name", "kind"), [("base", "none"), ("step", "unmerged"), ("epoch", "merged"), ("lora_only", "factors")]
)
def test_each_kind_is_recognised_and_gives_its_model(lora: Any, name: str, kind: str) -> None:
    case, scale, files = lora
    found = resolve_lora(files[name], scale=scale, base=files["base"])
    assert found.kind == kind
    model = case.empty()
    model.load_state_dict(dict(found.tensors), strict=True)
    io = load_file(case.folder / "io.safetensors")
    feats = io["feats"]
    lengths = io.get("feats_lengths", torch.full((feats.size(0),), feats.size(1)))
    with torch.no_grad():
        out, _ = model.eval().encode(feats, lengths)
    expected = io["encoder_out.base" if kind == "none" else "encoder_out.with_lora"]
    torch.testing.assert_close(out, expected, atol=2e-5, rtol=0)


def test_without_a_base_the_kind_must_be_said(lora: Any) -> None:
    _, scale, files = lora
    with pytest.raises(CheckpointError, match="nothing in it says which"):
        resolve_lora(files["step"], scale=scale)
    assert resolve_lora(files["step"], scale=scale, merged=False).kind == "unmerged"
    with pytest.raises(CheckpointError, match="factors only"):
        resolve_lora(files["lora_only"], scale=scale)


def test_another_base_and_a_patched_file_are_refused(lora: Any) -> None:
    _, scale, files = lora
    name = next(n for n in files["step"] if n.endswith("linear_q.lora_A"))
    weight = name.replace("lora_A", "weight")
    other = {**files["base"], weight: files["base"][weight] + 1.0}
    with pytest.raises(CheckpointError, match="neither the base's weight"):
        resolve_lora(files["step"], scale=scale, base=other)
    mixed = {**files["step"], weight: files["epoch"][weight]}
    with pytest.raises(CheckpointError, match="some weights hold their factors"):
        resolve_lora(mixed, scale=scale, base=files["base"])
    half = {n: t for n, t in files["step"].items() if n != name}
    with pytest.raises(CheckpointError, match="lora_A is missing"):
        resolve_lora(half, scale=scale, base=files["base"])
