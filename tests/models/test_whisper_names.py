"""The name table against WeNet's own converter and against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from thawline.core.whisper import (
    dims_of_huggingface,
    huggingface_values,
    special_tokens,
    wenet_values,
)
from thawline.errors import CheckpointError
from thawline.models.wenet.config import read_config
from thawline.models.wenet.masks import valid_mask
from thawline.models.wenet.targets import TeacherForcing
from thawline.models.whisper_names import LANGUAGES, TIED, WENET_ONLY, rule_of, translate


def test_openai_to_wenet_and_back_is_wenets_own_mapping(wenet_case: Any) -> None:
    golden = wenet_case("whisper_from_openai").json("mapping.json")
    for openai, wenet in golden["mapping"]:
        assert translate(openai, "openai", "wenet") == wenet
        assert translate(wenet, "wenet", "openai") == openai
    absent = set(golden["keys_absent_from_converted_file"])
    assert absent == {*WENET_ONLY, TIED["wenet"][0]}
    assert all(translate(name, "wenet", "openai") is None for name in absent)


def test_converting_by_the_table_gives_wenets_file_and_outputs(wenet_case: Any) -> None:
    case = wenet_case("whisper_from_openai")
    openai = torch.load(case.folder / "openai.pt", weights_only=True)
    expected = torch.load(case.folder / "final.pt", weights_only=True)
    model = case.empty()
    tensors = {}
    for name, tensor in openai["model_state_dict"].items():
        rule = rule_of(name, "openai")
        assert rule is not None
        target = translate(name, "openai", "wenet")
        tensors[target] = tensor.float().unsqueeze(0) if rule.leading_axis else tensor.float()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[n], expected[n]) for n in expected)
    tied, source = TIED["wenet"]
    tensors[tied] = tensors[source]
    tensors["decoder.output_layer.bias"] = torch.zeros(case.config.vocabulary)
    tensors |= {n: model.state_dict()[n] for n in ("ctc.ctc_lo.weight", "ctc.ctc_lo.bias")}
    model.load_state_dict(tensors, strict=True)
    io = load_file(case.folder / "io.safetensors")
    mel = io["mel"] if io["mel"].size(-1) == case.config.encoder.input_size else io["mel"].transpose(1, 2)
    tokens = io["tokens_in"]
    with torch.no_grad():
        out, lengths = model.eval().encode(mel, torch.tensor([mel.size(1)]))
        read = TeacherForcing(tokens, tokens, torch.tensor([tokens.size(1)]))
        logits = model.decoder_logits(out, lengths, read)
    assert bool(valid_mask(lengths, out.size(1)).all())
    torch.testing.assert_close(out, io["encoder_out"], atol=2e-5, rtol=0)
    torch.testing.assert_close(logits, io["decoder_logits_output_bias_zero"], atol=5e-5, rtol=0)


def test_a_fresh_tied_output_layer_has_no_random_bias(wenet_case: Any) -> None:
    model = wenet_case("whisper").empty()
    assert not bool(model.decoder.output_layer.bias.any())
    assert model.decoder.output_layer.weight is model.decoder.embed[0].weight


def test_every_hugging_face_name_is_in_the_table_and_both_networks_agree() -> None:
    transformers = pytest.importorskip("transformers")
    config, _ = huggingface_values(SMALL)
    torch.manual_seed(0)
    theirs = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig.from_dict(config)).eval()
    from thawline.models.wenet.model import build

    ours = build(read_config(wenet_values(SMALL))).eval()
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        if name == TIED["huggingface"][0]:
            continue
        target = translate(name, "huggingface", "wenet")
        assert target is not None, name
        assert translate(target, "wenet", "huggingface") == name
        rule = rule_of(name, "huggingface")
        assert rule is not None
        tensors[target] = tensor.unsqueeze(0) if rule.leading_axis else tensor
    fresh = ours.state_dict()
    ours.load_state_dict({n: tensors.get(n, fresh[n]) for n in fresh} | {TIED["wenet"][0]: tensors[TIED["wenet"][1]]})
    mel = torch.randn(1, 3000, 4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out, _ = ours.encode(mel, torch.tensor([3000]))
        torch.testing.assert_close(
            out, theirs.model.encoder(mel.transpose(1, 2)).last_hidden_state, atol=1e-5, rtol=1e-5
        )


SMALL = {
    "n_mels": 4,
    "n_vocab": 51865,
    "n_audio_ctx": 1500,
    "n_audio_state": 8,
    "n_audio_head": 2,
    "n_audio_layer": 2,
    "n_text_ctx": 448,
    "n_text_state": 8,
    "n_text_head": 2,
    "n_text_layer": 2,
}


def test_sizes_go_round() -> None:
    config, generation = huggingface_values(SMALL)
    assert dims_of_huggingface(config) == SMALL
    assert generation["lang_to_id"]["<|zh|>"] == 50260
    assert len(LANGUAGES) == len(set(LANGUAGES)) == 100
    with pytest.raises(CheckpointError, match="four times the width"):
        dims_of_huggingface({**config, "encoder_ffn_dim": 7})
    with pytest.raises(CheckpointError, match="none of OpenAI's"):
        special_tokens(40000)
    with pytest.raises(CheckpointError, match="n_mels missing"):
        wenet_values({k: v for k, v in SMALL.items() if k != "n_mels"})


def test_wenets_values_are_those_its_converter_writes(wenet_case: Any) -> None:
    case = wenet_case("whisper_from_openai")
    dims = case.json("mapping.json")["dims"]
    ours = wenet_values(dims, case.values["tokenizer_conf"]["special_tokens"])
    sections = (
        "encoder",
        "decoder",
        "encoder_conf",
        "decoder_conf",
        "model",
        "model_conf",
        "ctc_conf",
        "input_dim",
        "output_dim",
    )
    assert {k: ours[k] for k in sections} == {k: case.values[k] for k in sections}
