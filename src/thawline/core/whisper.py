"""Whisper's languages, special tokens and sizes, the latter in three spellings: OpenAI's `dims`, WeNet's train.yaml,
Hugging Face's config.json. Plain facts that models and checkpoints both go by; no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thawline.errors import CheckpointError

_LANGUAGES = """
    en zh de es ru ko fr ja pt tr pl ca nl ar sv it id hi fi vi he uk el ms cs ro da hu ta no th ur hr bg lt la mi ml
    cy sk te fa lv bn sr az sl kn et mk br eu is hy ne mn bs kk sq sw gl mr pa si km sn yo so af oc ka be tg sd gu am
    yi lo uz fo ht ps tk nn mt sa lb my bo tl mg as tt haw ln ha ba jw su yue
"""
LANGUAGES: tuple[str, ...] = tuple(_LANGUAGES.split())
"""Whisper's languages in the order of their tokens: the token of LANGUAGES[i] is start-of-transcript + 1 + i."""

_TIMES = 1501  # 0.00 to 30.00 s in steps of 0.02
_BESIDE_LANGUAGES = 8  # end, start, translate, transcribe, lm, prev, no speech, no timestamps

DIMS = (
    "n_mels",
    "n_vocab",
    "n_audio_ctx",
    "n_audio_state",
    "n_audio_head",
    "n_audio_layer",
    "n_text_ctx",
    "n_text_state",
    "n_text_head",
    "n_text_layer",
)


def check_dims(dims: Mapping[str, Any], *, where: str = "") -> dict[str, int]:
    """The ten sizes as whole numbers. Raises CheckpointError naming what is missing."""
    missing = [name for name in DIMS if not isinstance(dims.get(name), int)]
    if missing:
        raise CheckpointError(
            f"these are not the sizes of an OpenAI Whisper: {', '.join(missing)} missing",
            where=where,
            fix="give the .pt file that OpenAI ships",
        )
    return {name: int(dims[name]) for name in DIMS}


def has_special_tokens(vocabulary: int) -> bool:
    """Whether a vocabulary of this size is one of OpenAI's, whose special tokens are known."""
    return 0 < vocabulary - 51765 - int(vocabulary >= 51865) <= len(LANGUAGES)


def special_tokens(vocabulary: int) -> dict[str, int]:
    """The ids of Whisper's special tokens, WeNet's names, from the size of the vocabulary alone.

    >>> special_tokens(51865)["transcribe"], special_tokens(51864)["eot"], special_tokens(51866)["no_timestamps"]
    (50359, 50256, 50364)
    """
    multilingual = vocabulary >= 51865
    languages = vocabulary - 51765 - int(multilingual)
    if not has_special_tokens(vocabulary):
        raise CheckpointError(
            f"a vocabulary of {vocabulary} is none of OpenAI's (51864, 51865, 51866)",
            fix="give the special tokens explicitly",
        )
    eot = vocabulary - languages - _TIMES - _BESIDE_LANGUAGES
    after = eot + 2 + languages
    return {
        "eot": eot,
        "sot": eot + 1,
        "translate": after,
        "transcribe": after + 1,
        "sot_prev": after + 3,
        "no_speech": after + 4,
        "no_timestamps": after + 5,
        "timestamp_begin": after + 6,
    }


def wenet_values(dims: Mapping[str, int], special: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The train.yaml of WeNet's Whisper variant, as WeNet's converter writes it, without data and training settings.

    special: the special tokens, where the vocabulary is not one of OpenAI's.
    """
    d = check_dims(dims)
    tokens = dict(special) if special is not None else special_tokens(d["n_vocab"])
    multilingual = d["n_vocab"] >= 51865
    shared = {
        "activation_type": "gelu",
        "dropout_rate": 0.1,
        "gradient_checkpointing": True,
        "key_bias": False,
        "normalize_before": True,
        "positional_dropout_rate": 0.1,
    }
    return {
        "input_dim": d["n_mels"],
        "output_dim": d["n_vocab"],
        "encoder": "transformer",
        "encoder_conf": {
            **shared,
            "attention_dropout_rate": 0.0,
            "attention_heads": d["n_audio_head"],
            "input_layer": "conv1d2",
            "linear_units": 4 * d["n_audio_state"],
            "num_blocks": d["n_audio_layer"],
            "output_size": d["n_audio_state"],
            "pos_enc_layer_type": "abs_pos_whisper",
            "static_chunk_size": -1,
            "use_dynamic_chunk": False,
            "use_dynamic_left_chunk": False,
        },
        "decoder": "transformer",
        "decoder_conf": {
            **shared,
            "attention_heads": d["n_text_head"],
            "input_layer": "embed_learnable_pe",
            "linear_units": 4 * d["n_text_state"],
            "num_blocks": d["n_text_layer"],
            "self_attention_dropout_rate": 0.0,
            "src_attention": True,
            "src_attention_dropout_rate": 0.0,
            "src_key_bias": False,
            "tie_word_embedding": True,
            "use_output_layer": True,
        },
        "ctc_conf": {"ctc_blank_id": tokens["no_speech"]},
        "cmvn": None,
        "cmvn_conf": {"cmvn_file": None, "is_json_cmvn": None},
        "model": "whisper",
        "model_conf": {"ctc_weight": 0.3, "length_normalized_loss": False, "lsm_weight": 0.1},
        "tokenizer": "whisper",
        "tokenizer_conf": {
            "bpe_path": None,
            "is_multilingual": multilingual,
            "non_lang_syms_path": None,
            "num_languages": d["n_vocab"] - 51765 - int(multilingual)
            if special is None
            else tokens["translate"] - tokens["sot"] - 1,
            "special_tokens": tokens,
            "split_with_space": False,
            "symbol_table_path": None,
        },
    }


def huggingface_values(dims: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and generation_config.json of the same network. The latter lacks the list of suppressed tokens'
    symbols.

    The suppressed tokens of OpenAI's decoder follow from its tokenizer, which a .pt file does not hold: only those that
    begin a text are set (blank and end of text). A vocabulary that is none of OpenAI's gets no special tokens at all:
    such a network encodes and scores, and refuses to decode.
    """
    d = check_dims(dims)
    known = has_special_tokens(d["n_vocab"])
    tokens = special_tokens(d["n_vocab"]) if known else {}
    multilingual = d["n_vocab"] >= 51865
    ids = {
        "bos_token_id": tokens.get("eot"),
        "eos_token_id": tokens.get("eot"),
        "pad_token_id": tokens.get("eot"),
    }
    if known:
        ids["decoder_start_token_id"] = tokens["sot"]  # transformers takes no null here
    config = {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "activation_function": "gelu",
        "vocab_size": d["n_vocab"],
        "num_mel_bins": d["n_mels"],
        "d_model": d["n_audio_state"],
        "encoder_layers": d["n_audio_layer"],
        "encoder_attention_heads": d["n_audio_head"],
        "encoder_ffn_dim": 4 * d["n_audio_state"],
        "decoder_layers": d["n_text_layer"],
        "decoder_attention_heads": d["n_text_head"],
        "decoder_ffn_dim": 4 * d["n_text_state"],
        "max_source_positions": d["n_audio_ctx"],
        "max_target_positions": d["n_text_ctx"],
        **ids,
    }
    if not known:
        return config, {}
    generation: dict[str, Any] = {
        **ids,
        "begin_suppress_tokens": [220, tokens["eot"]],
        "is_multilingual": multilingual,
        "max_initial_timestamp_index": 50,
        "max_length": d["n_text_ctx"],
        "no_timestamps_token_id": tokens["no_timestamps"],
        "prev_sot_token_id": tokens["sot_prev"],
        "return_timestamps": False,
        "suppress_tokens": sorted(v for k, v in tokens.items() if k not in ("eot", "timestamp_begin", "no_timestamps")),
    }
    if multilingual:
        count = tokens["translate"] - tokens["sot"] - 1
        generation["lang_to_id"] = {f"<|{name}|>": tokens["sot"] + 1 + i for i, name in enumerate(LANGUAGES[:count])}
        generation["task_to_id"] = {k: tokens[k] for k in ("transcribe", "translate")}
    return config, generation


def dims_of_huggingface(config: Mapping[str, Any], *, where: str = "config.json") -> dict[str, int]:
    """OpenAI's sizes from a config.json. Raises CheckpointError where OpenAI's form cannot express it."""
    if config.get("encoder_ffn_dim") != 4 * config.get("d_model", 0):
        raise CheckpointError(
            "OpenAI's form has feed-forward layers of four times the width, this one has "
            f"{config.get('encoder_ffn_dim')} for {config.get('d_model')}",
            where=where,
            fix="keep it in Hugging Face's form",
        )
    return check_dims(
        {
            "n_mels": config.get("num_mel_bins"),
            "n_vocab": config.get("vocab_size"),
            "n_audio_ctx": config.get("max_source_positions"),
            "n_audio_state": config.get("d_model"),
            "n_audio_head": config.get("encoder_attention_heads"),
            "n_audio_layer": config.get("encoder_layers"),
            "n_text_ctx": config.get("max_target_positions"),
            "n_text_state": config.get("d_model"),
            "n_text_head": config.get("decoder_attention_heads"),
            "n_text_layer": config.get("decoder_layers"),
        },
        where=where,
    )
