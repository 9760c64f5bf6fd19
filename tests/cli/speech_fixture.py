"""A recogniser and recordings made on the spot: small enough to train in a second, real enough for every verb."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np

UNITS = ["<blank>", "<unk>", "<sos/eos>", "▁", *"abcdefgh"]

TRAIN_YAML = """\
encoder: conformer
encoder_conf: {output_size: 16, attention_heads: 2, linear_units: 16, num_blocks: 2, dropout_rate: 0.1,
  positional_dropout_rate: 0.1, attention_dropout_rate: 0.0, input_layer: conv2d, cnn_module_kernel: 7,
  use_cnn_module: true, activation_type: swish, pos_enc_layer_type: rel_pos, selfattention_layer_type: rel_selfattn,
  normalize_before: true, causal: false, use_dynamic_chunk: false, cnn_module_norm: batch_norm}
decoder: transformer
decoder_conf: {attention_heads: 2, linear_units: 16, num_blocks: 1, dropout_rate: 0.1, positional_dropout_rate: 0.1,
  self_attention_dropout_rate: 0.0, src_attention_dropout_rate: 0.0}
ctc_conf: {ctc_blank_id: 0}
model: asr_model
model_conf: {ctc_weight: 0.5, lsm_weight: 0.1, length_normalized_loss: false}
input_dim: 80
output_dim: 12
tokenizer: char
tokenizer_conf: {symbol_table_path: units.txt, split_with_space: false,
  special_tokens: {<blank>: 0, <unk>: 1, <sos>: 2, <eos>: 2}}
dataset_conf:
  resample_conf: {resample_rate: 8000}
  fbank_conf: {num_mel_bins: 80, frame_shift: 10, frame_length: 25, dither: 0.1}
  filter_conf: {max_length: 2000, min_length: 5, token_min_length: 1}
  speed_perturb: true
  spec_aug: true
  spec_aug_conf: {num_t_mask: 1, num_f_mask: 1, max_t: 5, max_f: 10}
"""

RECIPE = """\
task: speech
model: base
data: {train: train.list, valid: dev.list, batch: {size: 4}}
plan: {train: [ctc, "encoder.encoders[-1]"], norms: pinned}
optim: {lr: 1e-3}
run: {epochs: 2, workers: 0, checkpoint: {every: 2 steps, best: valid/loss}}
"""


def write_wav(path: Path, seconds: float, pitch_hz: float, *, rate_hz: int = 8000) -> None:
    t = np.arange(int(seconds * rate_hz)) / rate_hz
    noise = np.random.RandomState(int(pitch_hz)).randn(len(t))
    samples = (0.3 * np.sin(2 * np.pi * pitch_hz * t) + 0.02 * noise) * 32767
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate_hz)
        out.writeframes(samples.astype("<i2").tobytes())


def write_list(folder: Path, name: str, count: int) -> Path:
    """`count` tones and the words that stand for them."""
    rows = []
    for i in range(count):
        key = f"{name}{i}"
        write_wav(folder / f"{key}.wav", 0.6 + 0.05 * (i % 5), 200 + 60 * (i % 8))
        rows.append({"key": key, "wav": f"{key}.wav", "txt": "abcdefgh"[i % 8] + " " + "abcdefgh"[(i + 3) % 8]})
    path = folder / f"{name}.list"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_model(folder: Path, yaml: str = TRAIN_YAML, *, seed: int = 0) -> Path:
    """A WeNet directory with random weights."""
    import torch

    from thawline.tasks.loading import draw

    folder.mkdir(parents=True)
    (folder / "train.yaml").write_text(yaml)
    (folder / "units.txt").write_text("".join(f"{unit} {i}\n" for i, unit in enumerate(UNITS)))
    torch.manual_seed(seed)
    torch.save(draw(folder).state_dict(), folder / "final.pt")
    return folder


def write_chunk_model(folder: Path) -> Path:
    """One that was trained for chunks of any size."""
    yaml = TRAIN_YAML.replace("causal: false, use_dynamic_chunk: false", "causal: true, use_dynamic_chunk: true")
    return write_model(folder, yaml.replace("cnn_module_norm: batch_norm", "cnn_module_norm: layer_norm"), seed=3)


def write_all(folder: Path) -> Path:
    """A base with random weights, two lists and a recipe; returns the recipe."""
    write_model(folder / "base")
    write_list(folder, "train", 12)
    write_list(folder, "dev", 4)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    return recipe
