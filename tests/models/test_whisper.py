"""Whisper in Hugging Face's spelling: transformers' own numbers, this project's surface. Tiny random weights."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from thawline.errors import DataError, RecipeError
from thawline.models import whisper
from thawline.models.family import build_empty, sniff

transformers = pytest.importorskip("transformers")

CONFIG: dict[str, Any] = {
    "model_type": "whisper",
    "vocab_size": 60,
    "num_mel_bins": 8,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_source_positions": 25,
    "max_target_positions": 20,
    "pad_token_id": 40,
    "bos_token_id": 40,
    "eos_token_id": 40,
    "decoder_start_token_id": 41,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}
GENERATION: dict[str, Any] = {
    "bos_token_id": 40,
    "eos_token_id": 40,
    "pad_token_id": 40,
    "decoder_start_token_id": 41,
    "no_timestamps_token_id": 47,
    "prev_sot_token_id": 46,
    "lang_to_id": {"<|en|>": 42, "<|zh|>": 43},
    "task_to_id": {"translate": 44, "transcribe": 45},
    "is_multilingual": True,
    "suppress_tokens": [3, *range(41, 60)],
    "begin_suppress_tokens": [5, 40],
    "max_length": 20,
    "return_timestamps": False,
    "max_initial_timestamp_index": 5,
}


def tiny() -> Any:
    torch.manual_seed(0)
    model = whisper.build(CONFIG, GENERATION)
    for parameter in model.parameters():
        parameter.data.mul_(8.0)  # varied output instead of one token for ever
    return model


def features(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 50, 8, generator=generator), torch.full((batch,), 50)


def test_names_are_hugging_faces_and_the_output_layer_stays_tied() -> None:
    ours = tiny()
    theirs = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig.from_dict(CONFIG))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for model in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(model) is whisper.Whisper
        assert model.proj_out.weight is model.model.decoder.embed_tokens.weight


def test_encode_is_transformers_own() -> None:
    model, (feats, lengths) = tiny(), features()
    with torch.no_grad():
        out, frames = model.encode(feats, lengths)
        assert torch.equal(out, model.model.encoder(feats.transpose(1, 2)).last_hidden_state)
    assert frames.tolist() == [25, 25, 25]


def test_the_loss_is_transformers_own_over_the_text_and_its_end() -> None:
    model, (feats, lengths) = tiny(), features()
    target = torch.tensor([[7, 8, 9], [10, -1, -1], [-1, -1, -1]])
    counts = torch.tensor([3, 1, 0])
    labels = torch.tensor(
        [[-100, -100, -100, 7, 8, 9, 40], [-100, -100, -100, 10, 40, -100, -100], [-100] * 3 + [40] + [-100] * 3]
    )
    read = torch.tensor([[41, 42, 45, 47, 7, 8, 9], [41, 43, 44, 47, 10, 40, 40], [41, 42, 45, 47, 40, 40, 40]])
    languages, tasks = ["en", "zh", "en"], ["transcribe", "translate", "transcribe"]
    theirs = model(feats.transpose(1, 2), decoder_input_ids=read, labels=labels)
    ours = model.loss(feats, lengths, target, counts, languages=languages, tasks=tasks)
    torch.testing.assert_close(ours.total, theirs.loss)
    sums = model.loss_sums(feats, lengths, target, counts, languages=languages, tasks=tasks)
    assert sums.weights == model.loss_weights(counts) == {"utterances": 3.0, "tokens": 7.0}
    torch.testing.assert_close(sums.total(), theirs.loss)


@pytest.mark.parametrize("beam", [1, 3])
def test_decoding_is_transformers_generate_and_scores_are_the_models(beam: int) -> None:
    model, (feats, lengths) = tiny(), features()
    found = model.decode(feats, lengths, beam=beam, languages=["en", "zh", "en"])
    ids = model.generate(
        feats.transpose(1, 2),
        attention_mask=torch.ones(3, 50, dtype=torch.long),
        language=["en", "zh", "en"],
        task="transcribe",
        num_beams=beam,
        early_stopping=beam > 1,
    )
    for b, (hypothesis, row) in enumerate(zip(found, ids.tolist(), strict=True)):
        text = [t for t in row if t < 40]
        assert list(hypothesis.tokens) == text
        assert hypothesis.tokens
        assert 3 not in hypothesis.tokens
        assert hypothesis.tokens[0] != 5
        ended = len(hypothesis.tokens) < 16
        prompt = [41, 43 if b == 1 else 42, 45, 47]
        with torch.no_grad():
            logits = model(
                feats[b : b + 1].transpose(1, 2), decoder_input_ids=torch.tensor([[*prompt, *text]])
            ).logits.log_softmax(-1)[0]
        score = sum(float(logits[3 + i, t]) for i, t in enumerate([*text, *([40] if ended else [])]))
        assert hypothesis.score == pytest.approx(score, abs=1e-3)


def test_decoding_leaves_the_training_mode_as_it_was() -> None:
    model, (feats, lengths) = tiny().train(), features(1)
    model.decode(feats, lengths, languages=["en"])
    assert model.training


def test_short_features_are_continued_with_the_log_mel_of_silence() -> None:
    model = tiny()
    feats = torch.full((2, 30, 8), 0.5)
    feats[1] = -1.0
    window = model.window(feats, torch.tensor([30, 20]))
    assert window.shape == (2, 8, 50)
    assert torch.equal(window[0, :, 30:], torch.full((8, 20), -1.5))  # the floor of 1e-10
    assert torch.equal(window[1, :, 20:], torch.full((8, 30), -1.5))
    loud = model.window(torch.full((1, 30, 8), 2.0), torch.tensor([30]))
    assert torch.equal(loud[0, :, 30:], torch.full((8, 20), 0.0))  # 8 decades under the peak


def test_refusals_name_the_nearest() -> None:
    model, (feats, lengths) = tiny(), features(1)
    with pytest.raises(RecipeError, match="its decoder alone, not by 'ctc_greedy_search'"):
        model.decode(feats, lengths, mode="ctc_greedy_search")
    with pytest.raises(RecipeError, match="closest: beam"):
        model.decode(feats, lengths, beams=2)
    with pytest.raises(DataError, match="unknown language 'xx'"):
        model.decode(feats, lengths, languages=["xx"])
    with pytest.raises(DataError, match="51 frames, but Whisper's window is 50"):
        model.encode(torch.zeros(1, 51, 8), torch.tensor([51]))
    with pytest.raises(RecipeError, match="full context only"):
        model.encode(feats, lengths, chunk_size=16)
    with pytest.raises(DataError, match="21 tokens with the prompt"):
        model.loss(feats, lengths, torch.ones(1, 17, dtype=torch.long), torch.tensor([17]), languages=["en"])
    with pytest.raises(RecipeError, match="'bert' is not whisper"):
        whisper.build({"model_type": "bert"})


def test_a_pickled_model_opens_in_another_process(tmp_path: Path) -> None:
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(tiny()))
    code = "import pickle, sys; print(type(pickle.load(open(sys.argv[1], 'rb'))).__name__)"
    command = [sys.executable, "-c", code, str(tmp_path / "model.pickle")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "Whisper"


def test_importing_the_module_does_not_import_transformers() -> None:
    code = "import sys, thawline.models.whisper; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.long
def test_whisper_base_transcribes_as_transformers_does(shared: Path) -> None:
    """Token for token under greedy search; needs the weights beside the configuration."""
    folder = shared / "models" / "whisper-base"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"the weights of whisper-base are not in {folder}")
    soundfile = pytest.importorskip("soundfile")
    from safetensors.torch import load_file

    model = build_empty(sniff(folder))
    tensors = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    tensors["proj_out.weight"] = tensors["model.decoder.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True)
    model.float()
    theirs = transformers.WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = transformers.WhisperProcessor.from_pretrained(folder)
    rows = (shared / "data" / "an4" / "dev.list").read_text(encoding="utf-8").splitlines()[:3]
    files = [shared / "data" / "an4" / json.loads(row)["wav"] for row in rows]
    files.append(shared / "parity" / "fbank" / "librispeech-1995-1837-0001.wav")
    audio = [soundfile.read(file, dtype="float32")[0] for file in files]
    mel = processor(audio, sampling_rate=16000, return_tensors="pt").input_features
    ours = model.decode(mel.transpose(1, 2), torch.full((4,), 3000), languages=["en"] * 4)
    ids = theirs.eval().generate(mel, language="en", task="transcribe")
    for hypothesis, row in zip(ours, ids.tolist(), strict=True):
        assert list(hypothesis.tokens) == [t for t in row if t < 50257]
