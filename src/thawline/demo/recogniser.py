"""The demo's recogniser before it has learned anything: a WeNet directory (train.yaml, units.txt, global_cmvn).

A U2 model as WeNet's recipes describe it, only small: WeNet itself builds the same network from this train.yaml.
There are no weights in the directory; `init: random` in the recipe draws them from the seed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from thawline.ckpt.store import atomic_dir
from thawline.core.config import dump_yaml
from thawline.data.cmvn import cmvn_sums
from thawline.data.manifest import read_manifest
from thawline.data.speech import SpeechSamples
from thawline.data.speech_frontend import SpeechFrontend
from thawline.data.text import read_units
from thawline.demo.voices import RATE_HZ

MEL_BINS = 80
BLOCKS = 3


def write_recogniser(folder: Path, *, units: Path, train_list: Path) -> None:
    """Write the directory: the shape of the model, its words, and the CMVN statistics of `train_list`."""
    with atomic_dir(folder) as temporary:
        (temporary / "train.yaml").write_text(dump_yaml(_settings(len(read_units(units)))))
        shutil.copyfile(units, temporary / "units.txt")
        samples = SpeechSamples(read_manifest(train_list), SpeechFrontend(), training=False)
        (temporary / "global_cmvn").write_text(json.dumps(cmvn_sums(samples).to_json()) + "\n")


def _settings(vocabulary: int) -> dict[str, Any]:
    """train.yaml: WeNet's keys, all of which WeNet reads."""
    dropout = {"dropout_rate": 0.05, "positional_dropout_rate": 0.05}
    return {
        "model": "asr_model",
        "input_dim": MEL_BINS,
        "output_dim": vocabulary,
        "encoder": "conformer",
        "encoder_conf": {
            "output_size": 64,
            "attention_heads": 4,
            "linear_units": 128,
            "num_blocks": BLOCKS,
            **dropout,
            "attention_dropout_rate": 0.0,
            "input_layer": "conv2d",
            "normalize_before": True,
            "pos_enc_layer_type": "rel_pos",
            "selfattention_layer_type": "rel_selfattn",
            "activation_type": "swish",
            "use_cnn_module": True,
            "cnn_module_kernel": 15,
            "cnn_module_norm": "batch_norm",
        },
        "decoder": "transformer",
        "decoder_conf": {
            "attention_heads": 4,
            "linear_units": 64,
            "num_blocks": 1,
            **dropout,
            "self_attention_dropout_rate": 0.0,
            "src_attention_dropout_rate": 0.0,
        },
        "ctc": "ctc",
        "ctc_conf": {"ctc_blank_id": 0},
        "model_conf": {"ctc_weight": 0.7, "lsm_weight": 0.0, "length_normalized_loss": False},
        "cmvn": "global_cmvn",
        "cmvn_conf": {"cmvn_file": "global_cmvn", "is_json_cmvn": True},
        "tokenizer": "char",
        "tokenizer_conf": {
            "symbol_table_path": "units.txt",
            "split_with_space": True,  # a unit is a word
            "connect_symbol": " ",
            "bpe_path": None,
            "non_lang_syms_path": None,
            "is_multilingual": False,
            "num_languages": 1,
            "special_tokens": {"<blank>": 0, "<unk>": 1, "<sos>": vocabulary - 1, "<eos>": vocabulary - 1},
        },
        "dataset": "asr",
        "dataset_conf": {
            "filter_conf": {"max_length": 1000, "min_length": 10, "token_max_length": 10, "token_min_length": 1},
            "resample_conf": {"resample_rate": RATE_HZ},
            "speed_perturb": False,
            "fbank_conf": {"num_mel_bins": MEL_BINS, "frame_shift": 10, "frame_length": 25, "dither": 0.0},
            "spec_aug": False,
            "shuffle": True,
            "shuffle_conf": {"shuffle_size": 1500},
            "sort": True,
            "sort_conf": {"sort_size": 500},
            "batch_conf": {"batch_type": "static", "batch_size": 8},
        },
        "grad_clip": 5.0,
        "accum_grad": 1,
        "max_epoch": 4,
        "log_interval": 10,
        "optim": "adam",
        "optim_conf": {"lr": 0.002},
        "scheduler": "warmuplr",
        "scheduler_conf": {"warmup_steps": 30},
        "save_states": "model_only",
        "train_engine": "torch_ddp",
        "use_amp": False,
        "dtype": "fp32",
    }
