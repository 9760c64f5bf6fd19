"""What is read from a train.yaml, and what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from thawline.errors import RecipeError
from thawline.models.wenet.config import encoder_frames, read_config

MINIMAL: dict[str, Any] = {
    "input_dim": 80,
    "output_dim": 30,
    "encoder": "conformer",
    "encoder_conf": {"output_size": 16, "attention_heads": 4, "num_blocks": 1, "cnn_module_kernel": 7},
    "decoder": "transformer",
    "decoder_conf": {"attention_heads": 4, "num_blocks": 1},
    "model_conf": {"ctc_weight": 0.3},
    "optim": "adam",
    "dataset_conf": {"anything": ["goes", "here"]},
}


def changed(**changes: Any) -> dict[str, Any]:
    """MINIMAL with `section__key=value` applied."""
    values = copy.deepcopy(MINIMAL)
    for path, value in changes.items():
        *sections, key = path.split("__")
        at = values
        for section in sections:
            at = at.setdefault(section, {})
        at[key] = value
    return values


def test_defaults_are_wenets() -> None:
    config = read_config(MINIMAL)
    assert config.encoder.pos_enc_layer_type == "rel_pos"
    assert config.encoder.selfattention_layer_type == "rel_selfattn"
    assert config.encoder.activation_type == "swish"
    assert (config.sos, config.eos, config.blank) == (29, 29, 0)
    assert read_config(changed(encoder="transformer", encoder_conf={})).encoder.activation_type == "relu"


def test_a_config_is_a_value(wenet_case: Any) -> None:
    config = read_config(MINIMAL)
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config) == config


@pytest.mark.parametrize(
    ("changes", "where", "words"),
    [
        ({"encoder": "squeezeformer"}, "train.yaml: encoder", "not supported"),
        ({"model": "transducer"}, "train.yaml: model", "not supported"),
        ({"predictor": "rnn"}, "train.yaml: predictor", "transducers"),
        ({"encoder_conf__ouput_size": 16}, "train.yaml: encoder_conf", "closest: output_size"),
        ({"encoder_conf__output_size": "16"}, "train.yaml: encoder_conf.output_size", "not a whole number"),
        ({"encoder_conf__causal": "yes"}, "train.yaml: encoder_conf.causal", "not true or false"),
        ({"encoder_conf__dropout_rate": True}, "train.yaml: encoder_conf.dropout_rate", "not a number"),
        ({"encoder_conf__input_layer": "conv2d5"}, "train.yaml: encoder_conf.input_layer", "closest: conv2d"),
        ({"encoder_conf__mlp_type": "moe"}, "train.yaml: encoder_conf.mlp_type", "only"),
        ({"encoder_conf__layer_norm_type": "rms_norm"}, "train.yaml: encoder_conf.layer_norm_type", "only"),
        ({"encoder_conf__attention_heads": 3}, "train.yaml: encoder_conf.attention_heads", "16 values"),
        ({"encoder_conf__cnn_module_kernel": 8}, "train.yaml: encoder_conf.cnn_module_kernel", "no middle"),
        ({"encoder_conf__pos_enc_layer_type": "abs_pos"}, "train.yaml: encoder_conf.pos_enc_layer_type", "rel_pos"),
        ({"decoder_conf__r_num_blocks": 1}, "train.yaml: decoder_conf.r_num_blocks", "bitransformer"),
        ({"decoder_conf__use_output_layer": False}, "train.yaml: decoder_conf.use_output_layer", "only"),
        ({"model_conf__reverse_weight": 0.3}, "train.yaml: model_conf.reverse_weight", "bitransformer"),
        ({"model_conf__ctc_weight": 1.5}, "train.yaml: model_conf.ctc_weight", "outside 0..1"),
        ({"model_conf__ctc_wieght": 0.5}, "train.yaml: model_conf", "closest: ctc_weight"),
        ({"model_conf__apply_non_blank_embedding": True}, "apply_non_blank_embedding", "not supported"),
        ({"decoder": None}, "train.yaml: model_conf.ctc_weight", "ctc_weight: 1.0"),
        ({"ctc_conf__ctc_blank_id": 99}, "train.yaml", "outside the vocabulary of 30"),
        ({"encoder_conf": None}, "train.yaml", "not a WeNet model configuration"),
        ({"output_dim": None}, "train.yaml", "output_dim is missing"),
        ({"cmvn": "global_cmvn"}, "train.yaml: cmvn_conf.cmvn_file", "without a file"),
        ({"model": "whisper"}, "train.yaml: tokenizer_conf.special_tokens", "'sot' is missing"),
    ],
)
def test_what_would_be_another_network_is_refused_with_its_place(changes: Any, where: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_config(changed(**changes))
    assert where in caught.value.where
    assert words in str(caught.value)


def test_keys_without_effect_and_older_spellings_are_read() -> None:
    config = read_config(
        changed(
            encoder_conf__use_sdpa=True,
            encoder_conf__positionwise_conv_kernel_size=1,
            encoder_conf__n_kv_head=None,
            cmvn_file="data/train/global_cmvn",
            is_json_cmvn=True,
        )
    )
    assert (config.cmvn_file, config.cmvn_is_json) == ("data/train/global_cmvn", True)


def test_ctc_only_models_need_no_decoder() -> None:
    assert read_config(changed(decoder=None, model_conf__ctc_weight=1.0)).decoder is None


@pytest.mark.parametrize("layer", ["linear", "conv1d2", "conv2d", "conv2d6", "conv2d8"])
def test_encoder_frames_counts_what_the_subsampling_gives(layer: str) -> None:
    import torch

    from thawline.models.wenet.embedding import NoPositionalEncoding
    from thawline.models.wenet.subsampling import subsampling

    front = subsampling(layer, 80, 4, 0.0, NoPositionalEncoding(4, 0.0))
    for frames in range(front.min_frames, front.min_frames + 30):
        valid = torch.ones(1, 1, frames, dtype=torch.bool)
        x, _, kept = front(torch.zeros(1, frames, 80), valid)
        assert x.size(1) == kept.size(2) == encoder_frames(layer, frames)
    assert encoder_frames(layer, front.min_frames - 1) == 0
