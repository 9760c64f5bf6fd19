"""A whole VideoChat2 model with random tiny weights, as files on disk, and videos to train on."""

from __future__ import annotations

import dataclasses
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from thawline.core.extras import need
from thawline.models.videochat.build import build, read_config
from thawline.models.videochat.names import as_upstream, part_of

WORDS = (
    *("[INST]", "[/INST]", "<Video>", "</Video>", "<Image>", "</Image>", "what", "is", "it", ".", "a", "the", "dark"),
    *("light", "frame", "now", "look", "grey", "white", "black", "video", "contains", "4", "frames", "sampled", "at"),
    *("seconds", "describe", "following", "image", "concisely", "The", "Look"),
)
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SECTION: dict[str, Any] = {
    "vision_encoder": {
        "name": "vit_l14",
        "img_size": 32,
        "patch_size": 16,
        "encoder_embed_dim": 24,
        "encoder_depth": 4,
        "encoder_num_heads": 2,
        "num_frames": 4,
        "tubelet_size": 1,
        "use_checkpoint": False,
        "checkpoint_num": 0,
        "return_index": -2,
        "vit_add_ln": True,
    },
    "num_query_token": 4,
    "extra_num_query_token": 2,
    "qformer_hidden_dropout_prob": 0.1,
    "qformer_attention_probs_dropout_prob": 0.1,
    "qformer_drop_path_rate": 0.1,
    "qformer_text_input": True,
    "max_txt_len": 96,
    "use_lora": True,
    "lora_r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.1,
}


def write_llm(folder: Path) -> Path:
    """A Mistral of two layers with a tokenizer of words."""
    transformers = need("transformers", extra="hf")
    tokenizers = need("tokenizers", extra="hf")
    torch.manual_seed(1)
    transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES)).save_pretrained(folder)
    vocabulary = {word: n for n, word in enumerate(("<unk>", "<s>", "</s>", *dict.fromkeys(WORDS)))}
    spelling = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    spelling.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    spelling.add_special_tokens(["<unk>", "<s>", "</s>"])
    spelling.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
            }
        )
    )
    return folder


def write_bert(folder: Path) -> Path:
    """The Q-Former's vocabulary and sizes."""
    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "look", "at", "the", "video", "."]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 64,
        "layer_norm_eps": 1e-12,
        "vocab_size": len(words),
    }
    (folder / "config.json").write_text(json.dumps(sizes))
    return folder


def write_parts(folder: Path) -> Path:
    """A directory like the golden cases': llm/, bert/, config.json, and the files of stages 1, 2 and 3."""
    folder.mkdir(parents=True, exist_ok=True)
    write_llm(folder / "llm")
    write_bert(folder / "bert")
    (folder / "config.json").write_text(json.dumps({"model": SECTION}))
    config = read_config(folder / "llm", folder / "bert", SECTION)
    torch.manual_seed(2)
    model = build(dataclasses.replace(config), folder / "llm", folder / "bert").model
    tensors = {as_upstream(n): t.detach() for n, t in model.state_dict().items() if part_of(n) != "llm"}
    for name, tensor in tensors.items():
        if "lora_B" in name or name == "extra_query_tokens":  # which start at zero
            torch.nn.init.normal_(tensor, std=0.2)
    early = ("vision_encoder", "vision_layernorm", "qformer", "text_branch", "queries", "derived")
    torch.save({n: t for n, t in tensors.items() if part_of(n) in early}, folder / "base_vit_qformer.pth")
    second = {n: t for n, t in tensors.items() if part_of(n) not in ("lora", "text_branch")}
    torch.save({"model": second}, folder / "stage2_delta.pth")
    torch.save({"model": tensors}, folder / "stage3_delta.pth")
    return folder


def write_video(path: Path, grey: int, frames: int = 12) -> Path:
    """A video of 40 x 32 pixels whose frames get lighter."""
    av = need("av", extra="video")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 40, 32, "bgr0"
        for number in range(frames):
            picture = np.full((32, 40, 3), min(grey + 6 * number, 255), np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_corpus(folder: Path, samples: int = 8) -> Path:
    """An instruction file about two videos; the dark one is called dark."""
    folder.mkdir(parents=True, exist_ok=True)
    write_video(folder / "dark.mkv", 10)
    write_video(folder / "light.mkv", 170)
    rows = []
    for number in range(samples):
        shade = ("dark", "light")[number % 2]
        turns = [{"i": "look at the video .", "q": "what is it", "a": f"the {shade} video"}]
        turns.append({"q": "what now", "a": f"a {shade} frame"})
        rows.append({"video": f"{shade}.mkv", "QA": turns[: 1 + number % 2]})
    (folder / "it.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "it.json"


RECIPE = """\
task: videochat
model: parts
data: {train: corpus/it.json, valid: corpus/it.json, batch: {size: 2}}
plan: {preset: switches}
optim: {name: adamw, lr: 1e-2, weight_decay: 0.02, schedule: {name: cosine, warmup: 2 steps}}
run: {epochs: 3, seed: 3, workers: 0, checkpoint: {every: 2 steps, keep: 2, best: valid/loss}}
options: {freeze_vit: true, freeze_qformer: true}
"""


def write_recipe(folder: Path, text: str = RECIPE) -> Path:
    write_parts(folder / "parts")
    write_corpus(folder / "corpus")
    path = folder / "chat.yaml"
    path.write_text(text, encoding="utf-8")
    return path
