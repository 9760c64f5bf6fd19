"""What lies beside a Whisper's weights in each of its forms: sizes, config.json, WeNet's train.yaml and units.txt."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from thawline.ckpt.engine import Job, Work
from thawline.ckpt.formats import whisper_names
from thawline.ckpt.formats.casting import FLOATING
from thawline.ckpt.source import Source
from thawline.core.whisper import has_special_tokens, wenet_values
from thawline.errors import CheckpointError


def dims_of(work: Work) -> dict[str, int]:
    """OpenAI's sizes of a Whisper whose jobs are in OpenAI's spelling: as the source states them, else as they are."""
    config = work.source.config or {}
    dims = config.get("dims")
    if isinstance(dims, dict) and all(isinstance(v, int) for v in dims.values()) and not _dims_differ(work, dims):
        return dict(dims)
    return whisper_names.dims_of({name: job.tensor for name, job in work.jobs.items()}, _heads(work))


def _dims_differ(work: Work, dims: Mapping[str, int]) -> bool:
    found = whisper_names.dims_of({name: job.tensor for name, job in work.jobs.items()}, (1, 1))
    wrong = [key for key, value in found.items() if not key.endswith("_head") and dims.get(key) != value]
    if wrong:
        raise CheckpointError(
            f"its dims say {wrong[0]} = {dims.get(wrong[0])}, its tensors say {found[wrong[0]]}",
            where=str(work.source.path),
            fix="the file is damaged, or was put together by hand",
        )
    return False


def _heads(work: Work) -> tuple[int, int] | None:
    """Attention heads of encoder and decoder, where a configuration is beside the weights."""
    config = work.source.config or {}
    dims = config.get("dims")
    if isinstance(dims, dict):
        pair = dims.get("n_audio_head"), dims.get("n_text_head")
    else:
        pair = config.get("encoder_attention_heads"), config.get("decoder_attention_heads")
    sidecar = work.source.sidecars.get("train.yaml")
    if pair == (None, None) and sidecar is not None:
        from thawline.core.config import read_yaml

        value = read_yaml(sidecar).data
        if isinstance(value, dict):
            sides = [value.get(key) for key in ("encoder_conf", "decoder_conf")]
            found = [side.get("attention_heads") if isinstance(side, dict) else None for side in sides]
            pair = found[0], found[1]
    encoder, decoder = pair
    return (encoder, decoder) if isinstance(encoder, int) and isinstance(decoder, int) else None


def huggingface_config(work: Work) -> dict[str, object] | None:
    """The configuration to write: the source's own, or a Whisper's from its sizes."""
    config = work.source.config
    dtypes = Counter(job.info.dtype for job in work.jobs.values() if job.info.dtype in FLOATING)
    main = dtypes.most_common(1)[0][0] if dtypes else "F32"
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    if config is not None and "model_type" in config:
        stated = "torch_dtype" if "torch_dtype" in config else "dtype"
        return {**config, stated: names[main]}
    if whisper_names.spelling(work.jobs) != "huggingface":
        return None
    openai = whisper_names.respell({n: job.tensor for n, job in work.jobs.items()}, "huggingface", "openai")
    dims = config.get("dims") if config is not None else None
    sizes = dict(dims) if isinstance(dims, dict) else whisper_names.dims_of(openai, _heads(work))
    ffn = openai["encoder.blocks.0.mlp.0.bias"].info.shape[0]
    return whisper_names.huggingface_config(sizes, ffn, main)


def wenet_files(source: Source, jobs: Mapping[str, Job]) -> dict[str, bytes]:
    """train.yaml and units.txt for a Whisper in WeNet's spelling, as its converter writes them
    (wenet/models/whisper/convert_whisper_to_wenet_config_and_ckpt.py); empty for another model, or for a vocabulary
    that is none of OpenAI's, whose special tokens are not known.

    units.txt needs the vocabulary, which a Hugging Face folder has (vocab.json) and OpenAI's .pt has not. WeNet itself
    takes Whisper's tokenizer from the package openai-whisper, and does not read it.
    """
    if whisper_names.spelling(jobs) != "wenet":
        return {}
    from thawline.core.config import dump_yaml  # the recipe's validation comes with it: 0.1 s that few conversions need

    openai = whisper_names.respell({name: job.tensor for name, job in jobs.items()}, "wenet", "openai")
    if not has_special_tokens(openai["decoder.token_embedding.weight"].info.shape[0]):
        return {}
    work = Work(source, {name: Job(tensor, tensor.info) for name, tensor in openai.items()})
    dims = dims_of(work)
    values = {**wenet_values(dims), **_training(dims["n_mels"])}
    for side in ("encoder", "decoder"):
        values[f"{side}_conf"]["linear_units"] = openai[f"{side}.blocks.0.mlp.0.bias"].info.shape[0]
    files = {"train.yaml": dump_yaml(values).encode()}
    vocabulary = source.sidecars.get("vocab.json")
    if vocabulary is not None:
        files["units.txt"] = _units(vocabulary, source.sidecars.get("added_tokens.json"), dims["n_vocab"])
    return files


def _training(mels: int) -> dict[str, Any]:
    """The rest of that train.yaml: features as Whisper hears them, and how WeNet would go on to train it."""
    return {
        "dataset": "asr",
        "dataset_conf": {
            "filter_conf": {"max_length": 40960, "min_length": 0, "token_max_length": 200, "token_min_length": 1},
            "resample_conf": {"resample_rate": 16000},
            "speed_perturb": False,
            "spec_aug": True,
            "spec_aug_conf": {"max_f": 10, "max_t": 50, "num_f_mask": 2, "num_t_mask": 2},
            "shuffle": True,
            "shuffle_conf": {"shuffle_size": 1500},
            "feats_type": "log_mel_spectrogram",
            "log_mel_spectrogram_conf": {"hop_length": 160, "n_fft": 400, "num_mel_bins": mels, "padding": 0},
            "sort": True,
            "sort_conf": {"sort_size": 500},
            "batch_conf": {"batch_size": 4, "batch_type": "static"},
            "language_conf": {"limited_langs": ["zh"]},
        },
        "ctc": "ctc",
        "accum_grad": 1,
        "grad_clip": 5,
        "log_interval": 10,
        "max_epoch": 100,
        "optim": "adam",
        "optim_conf": {"lr": 0.0005},
        "scheduler": "warmuplr",
        "scheduler_conf": {"warmup_steps": 12000},
    }


def _units(vocabulary: Path, added: Path | None, count: int) -> bytes:
    """A line a token: its bytes as Python writes them, spaces spelt out, and its number."""
    try:
        numbers = json.loads(vocabulary.read_text(encoding="utf-8"))
        special = {} if added is None else json.loads(added.read_text(encoding="utf-8"))
        tokens = {number: _bytes_of(token) for token, number in numbers.items()}
        tokens |= {number: token.encode() for token, number in special.items()}
    except (OSError, ValueError, KeyError, AttributeError) as exc:
        raise CheckpointError(f"is no vocabulary: {exc}", where=str(vocabulary), fix="copy it again") from exc
    lines = (f"{tokens.get(number, str(number).encode())!r}".replace(" ", "<space>") for number in range(count))
    return "".join(f"{line} {number}\n" for number, line in enumerate(lines)).encode()


def _bytes_of(token: str) -> bytes:
    """The bytes that a token of byte-level BPE stands for."""
    return bytes(map(_bytes().__getitem__, token))


@cache
def _bytes() -> dict[str, int]:
    """Which byte each character stands for (`bytes_to_unicode` of OpenAI's GPT-2 encoder)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}
