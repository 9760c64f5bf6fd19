"""PEFT adapters merged into their base; the judge is peft itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from thawline.ckpt.convert import convert
from thawline.errors import BaseMismatch, CheckpointError

peft = pytest.importorskip("peft")


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.q_proj = nn.Linear(8, 12)
        self.v_proj = nn.Linear(12, 8, bias=False)
        self.conv = nn.Conv2d(3, 6, 3)
        self.one = nn.Conv2d(6, 4, 1)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.v_proj(self.q_proj(self.norm(self.embed(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


TARGETS = ["embed", "q_proj", "v_proj"]


def adapter(folder: Path, *, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Tensor]:
    """Write base.safetensors and lora/; returns the state dict of peft's own `merge_and_unload` of what it loads."""
    torch.manual_seed(0)
    net = Net().to(dtype)
    save_file({n: t.clone() for n, t in net.state_dict().items()}, folder / "base.safetensors")
    config = peft.LoraConfig(r=4, lora_alpha=6, **({"target_modules": TARGETS} | changes))
    model = peft.get_peft_model(net, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(folder / "lora")
    fresh = Net().to(dtype)
    fresh.load_state_dict(load_file(folder / "base.safetensors"))
    merged = peft.PeftModel.from_pretrained(fresh, folder / "lora").merge_and_unload()
    return dict(merged.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"modules_to_save": ["head"]},
        {"rank_pattern": {"body.q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ],
    ids=["plain", "rslora", "a head of its own", "patterns"],
)
def test_linear_layers_and_embeddings_come_out_as_from_peft_bit_for_bit(
    changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    want = adapter(tmp_path, dtype=dtype, **changes)
    report = convert(
        tmp_path / "lora", tmp_path / "m.safetensors", to="safetensors", base=tmp_path / "base.safetensors"
    )
    have = load_file(tmp_path / "m.safetensors")
    assert have.keys() == want.keys()
    for name, tensor in want.items():
        assert have[name].dtype == dtype
        assert torch.equal(have[name], tensor), name
    assert report.verified
    assert report.origins["body.q_proj.weight"] == "merged adapter"
    assert report.origins["body.norm.weight"] != "merged adapter"


def test_convolutions_come_out_as_from_peft_bit_for_bit(tmp_path: Path) -> None:
    want = adapter(tmp_path, target_modules=["conv", "one"])
    convert(tmp_path / "lora", tmp_path / "m.safetensors", to="safetensors", base=tmp_path / "base.safetensors")
    have = load_file(tmp_path / "m.safetensors")
    assert have.keys() == want.keys()
    assert all(torch.equal(have[name], tensor) for name, tensor in want.items())


def test_a_base_saved_without_the_heads_prefix_is_known_by_its_endings(tmp_path: Path) -> None:
    want = adapter(tmp_path)
    base = load_file(tmp_path / "base.safetensors")
    save_file(
        {n.removeprefix("body."): t for n, t in base.items() if n.startswith("body.")}, tmp_path / "body.safetensors"
    )
    convert(tmp_path / "lora", tmp_path / "m.safetensors", to="safetensors", base=tmp_path / "body.safetensors")
    have = load_file(tmp_path / "m.safetensors")
    assert torch.equal(have["q_proj.weight"], want["body.q_proj.weight"])


def test_another_base_is_refused_by_name(tmp_path: Path) -> None:
    adapter(tmp_path)
    base = load_file(tmp_path / "base.safetensors")
    save_file(base | {"body.q_proj.weight": torch.zeros(12, 9)}, tmp_path / "wide.safetensors")
    with pytest.raises(BaseMismatch, match=r"\(12, 4\) and \(4, 8\) do not make up body.q_proj.weight of \(12, 9\)"):
        convert(tmp_path / "lora", tmp_path / "m", to="safetensors", base=tmp_path / "wide.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(BaseMismatch, match=r"adapts 'body\.embed\.weight', which the base .* does not have"):
        convert(tmp_path / "lora", tmp_path / "m", to="safetensors", base=tmp_path / "other.safetensors")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "a LoRA adapter with use_dora"),
        ({"trainable_token_indices": [1, 2]}, "with trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
        ({"peft_type": "IA3"}, "is a IA3 adapter"),
        ({"r": 5}, "have rank 4, adapter_config.json says r = 5"),
    ],
)
def test_an_adapter_that_is_not_a_product_added_to_a_weight_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    adapter(tmp_path)
    config = tmp_path / "lora/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "lora", tmp_path / "m", to="safetensors", base=tmp_path / "base.safetensors")


def test_an_embedding_that_peft_saves_beside_its_adapter_does_not_undo_it(tmp_path: Path) -> None:
    want = adapter(tmp_path)
    file = tmp_path / "lora/adapter_model.safetensors"
    own = load_file(tmp_path / "base.safetensors")["body.embed.weight"]
    # What `save_pretrained` adds for an adapted embedding of a Hugging Face model (save_embedding_layers).
    save_file({**load_file(file), "base_model.model.body.embed.base_layer.weight": own}, file)
    convert(tmp_path / "lora", tmp_path / "m.safetensors", to="safetensors", base=tmp_path / "base.safetensors")
    have = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(have[name], tensor) for name, tensor in want.items())


@pytest.mark.filterwarnings("ignore")  # peft's own: that tied layers are adapted, which is what is tested here
@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=",".join)
def test_of_tied_weights_only_the_names_that_trained_as_copies_change(saved: list[str], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(config)
    net.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "lora")
    want = model.merge_and_unload().state_dict()
    convert(tmp_path / "lora", tmp_path / "m.safetensors", to="safetensors", base=tmp_path / "base")
    have = load_file(tmp_path / "m.safetensors")
    assert have.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(have[name], tensor), name
    tied = "lm_head.weight", "model.embed_tokens.weight"
    assert torch.equal(have[tied[0]], have[tied[1]]) == torch.equal(want[tied[0]], want[tied[1]])


def test_an_adapter_alone_is_no_model(tmp_path: Path) -> None:
    adapter(tmp_path)
    with pytest.raises(CheckpointError, match="what it is added to is in its base"):
        convert(tmp_path / "lora", tmp_path / "m", to="hf")
