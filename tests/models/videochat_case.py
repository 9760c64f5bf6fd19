"""VideoChat2's golden cases, made by running the original project; and tiny models that need no file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from thawline.core.extras import need
from thawline.models.videochat.config import (
    Family,
    LoraConfig,
    QFormerConfig,
    VideoChatConfig,
    VisionConfig,
    from_upstream,
)
from thawline.models.videochat.llm import ChatTokenizer, InstructionTokenizer, load_llm
from thawline.models.videochat.loading import load_parts_
from thawline.models.videochat.model import IGNORE, Prompt, VideoChat

BASE, STAGE2, STAGE3, STAGE3F = (
    "base_vit_qformer.pth",
    "stage2_delta.pth",
    "stage3_delta.pth",
    "stage3f_delta.pth",
)
CASES = ("mistral_a", "vicuna_a")


@dataclass(frozen=True)
class VideoChatCase:
    """One folder of golden files."""

    folder: Path

    @cached_property
    def settings(self) -> dict[str, Any]:
        return self.json("config.json")

    @cached_property
    def io(self) -> dict[str, Tensor]:
        return load_file(self.folder / "io.safetensors")

    @property
    def family(self) -> Family:
        return self.settings["family"]

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def config(self, stage: int = 3) -> VideoChatConfig:
        config = from_upstream(self.settings["model"], family=self.family, bert=self.json("bert/config.json"))
        lora = dataclasses.replace(config.lora, targets=()) if config.lora is not None else None
        config = dataclasses.replace(config, lora=lora).as_upstream()
        return config.for_captions() if stage == 2 else config

    def read(self, name: str) -> dict[str, Tensor]:
        tensors = torch.load(self.folder / name, weights_only=True)
        return tensors.get("model", tensors)

    def parts(self, *names: str) -> list[tuple[str, dict[str, Tensor]]]:
        return [(name, self.read(name)) for name in names]

    def llm(self) -> nn.Module:
        return load_llm(self.folder / "llm")

    def chat_tokenizer(self) -> ChatTokenizer:
        return ChatTokenizer.load(self.folder / "llm")

    def instruction_tokenizer(self) -> InstructionTokenizer:
        return InstructionTokenizer.load(self.folder / "bert", max_tokens=self.config().max_text_tokens)

    def empty(self, config: VideoChatConfig | None = None) -> VideoChat:
        torch.manual_seed(0)
        ids = self.settings["special_ids"]
        return VideoChat(config or self.config(), self.llm(), bos_id=ids["bos"], pad_id=ids["pad"])

    def model(self, *files: str, stage: int = 3, new: tuple[Any, ...] = ()) -> VideoChat:
        model = self.empty(self.config(stage))
        load_parts_(model, self.parts(*files), new=new)
        return model.eval()

    def prompts(self) -> list[Prompt]:
        """The two conversations of the fixtures as numbers, with the labels that upstream computed."""
        made = []
        visual = self.config().qformer.all_queries
        for number, ids in enumerate(self.settings["token_ids"]):
            before, after = ids["before_ids"], ids["after_ids"]
            after = after[: self.config().max_text_tokens - 1 - len(before)]  # bos is one of them
            start = 1 + len(before) + visual
            labels = self.io["stage3/llm_labels"][number, start : start + len(after)].tolist()
            made.append(Prompt(pieces=(before, after), labels=([IGNORE] * len(before), labels)))
        return made

    def instruction(self) -> tuple[Tensor, Tensor]:
        return (
            self.io["stage3/qformer_input_ids"],
            self.io["stage3/qformer_attention_mask"][:, self.config().qformer.all_queries :],
        )


def furthest(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference."""
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    return float((a - b).abs().max())


class Letters:
    """A tokenizer of single characters: for models with random weights, where no file is at hand."""

    bos_id, eos_id, pad_id = 1, 2, 2

    def encode(self, text: str) -> list[int]:
        return [3 + ord(c) % 90 for c in text]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        return [(i, i + 1) for i in range(len(text))]

    def decode(self, ids: Any) -> str:
        return "".join(chr(32 + (i - 3) % 90) for i in ids)


def tiny_llm(family: Family) -> nn.Module:
    """A language model of two small layers with random weights."""
    transformers = need("transformers", extra="hf")
    sizes: dict[str, Any] = {
        "vocab_size": 100,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    kinds = {
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "vicuna": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "phi": (transformers.Phi3Config, transformers.Phi3ForCausalLM),
    }
    settings, kind = kinds[family]
    torch.manual_seed(1)
    model: nn.Module = kind(settings(**sizes))
    return model


def tiny_config(family: Family = "mistral", **changes: Any) -> VideoChatConfig:
    """A whole model with nothing from any file: 32-pixel frames, three vision blocks, two Q-Former layers."""
    return dataclasses.replace(
        VideoChatConfig(
            family=family,
            vision=VisionConfig(img_size=32, width=24, depth=4, heads=2),
            qformer=QFormerConfig(
                hidden_size=16, layers=2, heads=2, intermediate_size=24, vocab_size=100, max_positions=64, queries=4,
                extra_queries=2,
            ),
            lora=LoraConfig(r=2, alpha=4, dropout=0.0),
            max_text_tokens=64,
        ),
        **changes,
    )  # fmt: skip


def tiny_model(config: VideoChatConfig | None = None) -> VideoChat:
    config = config or tiny_config()
    llm = tiny_llm(config.family)
    torch.manual_seed(2)
    model = VideoChat(config, llm, bos_id=1, pad_id=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name == "extra_query_tokens":  # which start at zero
            nn.init.normal_(parameter, std=0.2)
    return model.eval()
