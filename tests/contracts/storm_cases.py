"""The three runs that the crash storm is let loose on: small, and with everything random that a real run has.

Each takes about forty steps of two accumulated or single batches and saves every two or three of them, so that a
random moment often falls into a save.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from tests.cli import speech_fixture
from tests.tasks import vision_cases

SPEECH = """\
task: speech
model: base
data: {train: train.list, valid: dev.list, batch: {frames: 180}}
plan:
  train: [ctc, decoder]
  norms: pinned
  thaw:
    - {after: 3 epochs, train: ["encoder.encoders[-1]"], lr: 0.3}
optim: {name: adamw, lr: 2e-3, schedule: {name: warmuplr, warmup: 6 steps}}
run:
  epochs: 8
  seed: 11
  workers: 0
  accumulate: 2
  ema: {decay: 0.9}
  evaluate: 2 epochs
  checkpoint: {every: 3 steps, keep: 2, best: valid/loss}
options: {mode: ctc_greedy_search}
"""
"""U2 Conformer with dropout, dither, speed perturbation and SpecAugment; batches by frames; a thaw; an average."""

WHISPER = """\
task: speech
model: base
data:
  train: train.list
  valid: dev.list
  batch: {size: 3}
  conf:
    resample_conf: {resample_rate: 16000}
    log_mel_spectrogram_conf: {num_mel_bins: 80, pad_or_trim: true, max_duration: 2}
    spec_aug: true
    spec_aug_conf: {num_t_mask: 1, num_f_mask: 1, max_t: 20, max_f: 10}
plan: {train: [model.decoder], norms: pinned}
optim: {name: adamw, lr: 1e-3, schedule: {name: cosine, warmup: 4 steps}}
run:
  epochs: 10
  seed: 12
  workers: 0
  evaluate: 5 epochs
  checkpoint: {every: 2 steps, keep: 3}
options: {language: en}
"""
"""Whisper, its decoder alone, with dropout and SpecAugment."""

VISION = """\
task: vision
model: base.safetensors
data:
  train: train
  valid: valid
  batch: {size: 8}
  conf: {size: 10, augment: {scale: [0.6, 1.0], flip: 0.5, jitter: 0.2}}
plan:
  train: [head]
  norms: tracking
  thaw:
    - {after: 3 epochs, train: [layer], lr: 0.1}
optim: {name: sgd, lr: 2e-2, schedule: {name: wsd, warmup: 3 steps}}
run:
  epochs: 8
  seed: 13
  workers: 0
  evaluate: 2 epochs
  checkpoint: {every: 2 steps, keep: 2, best: valid/accuracy}
options:
  head: replace
  model_fn: tests.tasks.vision_cases:tiny
"""
"""A BatchNorm net whose frozen layers go on tracking statistics, with augmentation and a thaw."""


def write_speech(folder: Path) -> None:
    speech_fixture.write_all(folder)
    speech_fixture.write_list(folder, "train", 16)
    (folder / "recipe.yaml").write_text(SPEECH)


def write_whisper(folder: Path) -> None:
    speech_fixture.write_list(folder, "train", 12)
    speech_fixture.write_list(folder, "dev", 3)
    write_tiny_whisper(folder / "base")
    (folder / "recipe.yaml").write_text(WHISPER)


def write_vision(folder: Path) -> None:
    (vision_cases.write_case(folder, VISION)).rename(folder / "recipe.yaml")


CASES: dict[str, Callable[[Path], None]] = {"speech": write_speech, "whisper": write_whisper, "vision": write_vision}


def write_case(name: str, folder: Path) -> Path:
    """Base, data and `recipe.yaml` of a case in a fresh `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    CASES[name](folder)
    return folder


SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startofprev|>",
    "<|notimestamps|>",
)


def write_tiny_whisper(folder: Path) -> None:
    """A Hugging Face Whisper with random weights and a tokenizer of single letters."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    letters = [" ", *"abcdefgh"]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    ids: dict[str, int] = {name: tokenizer.token_to_id(name) for name in SPECIAL_TOKENS}
    end = ids["<|endoftext|>"]
    config = WhisperConfig(
        vocab_size=tokenizer.get_vocab_size(),
        num_mel_bins=80,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=100,  # the two seconds of the recipe
        max_target_positions=24,
        dropout=0.1,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=ids["<|startoftranscript|>"],
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    torch.manual_seed(0)
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    generation = {
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "lang_to_id": {"<|en|>": ids["<|en|>"]},
        "task_to_id": {"translate": ids["<|translate|>"], "transcribe": ids["<|transcribe|>"]},
        "is_multilingual": True,
        "suppress_tokens": [],
        "begin_suppress_tokens": [],
        "max_length": 24,
        "return_timestamps": False,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation))
