"""Whisper base on real speech, against transformers' own pipeline. Skipped where its weights are absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from thawline.data.audio import read_audio
from thawline.tasks.recognition import Recognizer

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def weights() -> Path:
    """Whisper base in Hugging Face's layout, weights included."""
    folder = Path(os.environ.get("THAWLINE_WHISPER_BASE", ""))
    if not (folder / "model.safetensors").is_file():
        pytest.skip("set THAWLINE_WHISPER_BASE to a folder of openai/whisper-base with model.safetensors")
    return folder


@pytest.fixture(scope="module")
def recognizer(weights: Path) -> Recognizer:
    return Recognizer.open(weights)


@pytest.fixture(scope="module")
def theirs(weights: Path) -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    model = transformers.WhisperForConditionalGeneration.from_pretrained(weights, dtype=torch.float32).eval()
    return model, transformers.WhisperProcessor.from_pretrained(weights)


def clips(shared: Path) -> list[Path]:
    rows = [json.loads(line) for line in (shared / "data/an4/dev.list").read_text().splitlines()]
    return [
        shared / "parity/fbank/librispeech-1995-1837-0001.wav",
        *(shared / "data/an4" / rows[i]["wav"] for i in (0, 40, 80)),
    ]


def test_greedy_tokens_are_those_of_transformers(shared: Path, recognizer: Recognizer, theirs: tuple[Any, Any]) -> None:
    model, processor = theirs
    files = clips(shared)
    ours = list(recognizer.transcripts(files))
    for file, found in zip(files, ours, strict=True):
        inputs = processor(read_audio(file), sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
        with torch.no_grad():
            # Without a task transformers leaves out the task token, and the model repeats itself for ever.
            ids = model.generate(**inputs, language="en", task="transcribe")[0].tolist()
        text = [token for token in ids if token < processor.tokenizer.eos_token_id]
        assert list(found.tokens) == text, file.name
        assert found.text == processor.tokenizer.decode(text, skip_special_tokens=True).strip()
    assert "great sorrow of his life" in ours[0].text


def test_the_nbest_list_is_that_of_transformers_beam_search(shared: Path, recognizer: Recognizer) -> None:
    transformers = pytest.importorskip("transformers")
    logits = transformers.generation.logits_process
    files, model, beam = clips(shared)[1:], recognizer.model, 4
    found = list(recognizer.with_options(language="en", beam=beam).transcripts(files))
    config: Any = model.generation_config
    prompt = [config.decoder_start_token_id, config.lang_to_id["<|en|>"], config.task_to_id["transcribe"]]
    prompt.append(config.no_timestamps_token_id)
    for file, ours in zip(files, found, strict=True):
        feats = torch.from_numpy(recognizer.frontend.features_of(read_audio(file), None))[None]
        with torch.no_grad():
            theirs = transformers.GenerationMixin.generate(
                model,
                encoder_outputs=model.model.encoder(feats.transpose(1, 2)),  # type: ignore[operator, union-attr]
                decoder_input_ids=torch.tensor([prompt]),
                logits_processor=transformers.LogitsProcessorList(
                    [
                        logits.SuppressTokensLogitsProcessor(config.suppress_tokens),
                        logits.SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, len(prompt)),
                    ]
                ),
                num_beams=beam,
                num_return_sequences=beam,
                early_stopping=True,
                max_length=448,
                return_dict_in_generate=True,
                output_scores=True,
            )
        texts = [
            recognizer.tokenizer.decode([t for t in row if t < config.eos_token_id]).strip()
            for row in theirs.sequences.tolist()
        ]
        assert [text for text, _ in ours.nbest] == texts, file.name
        # The same sum in one pass without a cache: fp32 rounding over some tens of tokens.
        assert [score for _, score in ours.nbest] == pytest.approx(theirs.sequences_scores.tolist(), abs=1e-4)
        assert ours.to_json()["nbest"][0]["text"] == ours.text == texts[0]


def test_a_long_recording_follows_the_time_marks_as_transformers_does(
    shared: Path, recognizer: Recognizer, theirs: tuple[Any, Any], tmp_path: Path
) -> None:
    soundfile = pytest.importorskip("soundfile")
    one = read_audio(clips(shared)[0])
    whole = np.concatenate([one, np.zeros(8000, np.float32)] * 4)  # 37 s
    soundfile.write(tmp_path / "long.wav", whole, 16000, subtype="FLOAT")
    found = next(recognizer.with_options(language="en").transcripts([tmp_path / "long.wav"]))
    model, processor = theirs
    inputs = processor(
        whole, sampling_rate=16000, return_tensors="pt", truncation=False, padding="longest", return_attention_mask=True
    )
    with torch.no_grad():
        out = model.generate(**inputs, return_timestamps=True, return_segments=True, language="en", task="transcribe")
    segments = out["segments"][0]
    assert [s.text for s in found.segments] == [
        processor.tokenizer.decode(s["tokens"], skip_special_tokens=True).strip() for s in segments
    ]
    assert [s.start_s for s in found.segments] == pytest.approx([float(s["start"]) for s in segments])
    assert found.segments[-1].start_s > 28


@pytest.mark.parametrize("copies", [1, 4], ids=["8.7 s", "37 s"])
def test_words_and_their_times_are_those_of_transformers_pipeline(
    shared: Path, recognizer: Recognizer, theirs: tuple[Any, Any], copies: int, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    soundfile = pytest.importorskip("soundfile")
    one = read_audio(clips(shared)[0])
    whole = np.concatenate([one, np.zeros(8000, np.float32)] * copies)
    soundfile.write(tmp_path / "speech.wav", whole, 16000, subtype="FLOAT")
    found = next(recognizer.with_options(language="en").transcripts([tmp_path / "speech.wav"], times=True))
    model, processor = theirs
    pipeline = transformers.pipeline(
        "automatic-speech-recognition", model=model, tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor, dtype=torch.float32,
    )  # fmt: skip
    out = pipeline(
        {"raw": whole, "sampling_rate": 16000},
        return_timestamps="word",
        generate_kwargs={"language": "en", "task": "transcribe", "num_beams": 1},  # the pipeline takes 5 by itself
    )
    assert [word.text for word in found.words] == [chunk["text"].strip() for chunk in out["chunks"]]
    times = [edge for word in found.words for edge in (word.start_s, word.end_s)]
    assert times == pytest.approx([edge for chunk in out["chunks"] for edge in chunk["timestamp"]], abs=0.011)
    assert len(found.words) >= 30 * copies


def test_second_attempts_leave_clear_speech_alone(shared: Path, recognizer: Recognizer) -> None:
    once, again = (
        next(recognizer.with_options(language="en", fallback=fallback).transcripts([clips(shared)[0]]))
        for fallback in (False, True)
    )
    assert again.text == once.text
    assert again.score == pytest.approx(once.score, abs=1e-2)


def test_the_verb_prints_nothing_on_standard_error(shared: Path, weights: Path) -> None:
    argv = ["transcribe", str(weights), str(clips(shared)[0]), "--language", "en", "--json", "--srt"]
    program = f"import sys; from thawline.cli.app import run; sys.exit(run({argv[:-1]!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout)["transcripts"][0]["language"] == "en"
