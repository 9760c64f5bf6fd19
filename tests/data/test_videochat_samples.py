"""Samples of video chat follow from (seed, epoch, number); batches carry what normalises their loss."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.data.test_conversation import Words
from tests.data.test_video import write_video

from thawline.data.conversation import read_dialogues
from thawline.data.conversation_templates import TEMPLATES
from thawline.data.conversation_tokens import IGNORE
from thawline.data.videochat import ChatSamples, ClipSettings, pad_words
from thawline.errors import DataError, RecipeError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    write_video(tmp_path / "v.mkv", "ffv1", "bgr0")
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    image.fromarray(np.zeros((40, 30, 3), np.uint8)).save(tmp_path / "i.png")
    rows: list[dict[str, Any]] = [
        {"video": "v.mkv", "QA": [{"i": "Look .", "q": f"q{n} ?", "a": f"a{n}"} for n in range(4)]},
        {"image": "i.png", "QA": [{"q": "what ?", "a": "black"}]},
        {"video": "bad.mp4", "QA": [{"q": "x", "a": "y"}]},
        {"video": "v.mkv", "caption": "it gets light"},
        {"QA": [{"q": "hi", "a": "ho"}]},
        {"image": ["i.png", "i.png"], "QA": [{"q": "same ?", "a": "yes"}]},
    ]
    file = tmp_path / "it.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def samples(corpus: Path, **changes: Any) -> ChatSamples:
    options: dict[str, Any] = {
        "template": TEMPLATES["mistral"],
        "tokenizer": Words(),
        "instruction_tokenizer": Words(),
        "settings": ClipSettings(frames=4, size=32),
        "training": True,
        "seed": 7,
    }
    return ChatSamples(read_dialogues(corpus), **{**options, **changes})


def test_a_sample_is_the_same_whoever_reads_it_and_whatever_was_drawn_before(corpus: Path) -> None:
    one, other = samples(corpus), samples(corpus)
    for number in (1, 3, 4):
        other.read(number, 0)
    torch.manual_seed(1)
    np.random.seed(1)
    a, b = one.read(0, 2), other.read(0, 2)
    assert torch.equal(a.clips[0], b.clips[0])
    assert a.turns == b.turns


def test_epochs_and_seeds_give_other_frames_and_orders(corpus: Path) -> None:
    first = samples(corpus).read(0, 0)
    assert not torch.equal(first.clips[0], samples(corpus).read(0, 1).clips[0])
    assert not torch.equal(first.clips[0], samples(corpus, seed=8).read(0, 0).clips[0])
    assert len({samples(corpus).read(0, epoch).turns for epoch in range(6)}) > 1


def test_evaluation_draws_nothing(corpus: Path) -> None:
    one = samples(corpus, training=False)
    a, b = one.read(0, 0), one.read(0, 5)
    assert torch.equal(a.clips[0], b.clips[0])
    assert a.turns == tuple((f"q{n} ?", f"a{n}") for n in range(4))


def test_the_conversation_says_when_frames_were_taken_unless_told_not_to(corpus: Path) -> None:
    words = Words()
    made = samples(corpus, training=False, tokenizer=words).read(0, 0)
    said = " ".join(words.said(made.encoded.pieces[-1]))
    assert "contains 4 frames sampled at 0.5, 1.8, 3.0, 4.2 seconds." in said
    silent = samples(corpus, training=False, tokenizer=words, settings=ClipSettings(frames=4, size=32, say_times=False))
    assert "seconds." not in " ".join(words.said(silent.read(0, 0).encoded.pieces[-1]))


def test_a_bad_video_costs_one_sample_and_is_named(corpus: Path) -> None:
    with pytest.raises(DataError, match=r"bad\.mp4: the video cannot be read"):
        samples(corpus).read(2, 0)


def test_a_batch_holds_all_clips_in_order_and_the_number_of_learnt_tokens(corpus: Path) -> None:
    reader = samples(corpus)
    read = [reader.read(n, 0) for n in (0, 1, 4, 5)]
    batch = reader.collate(read)
    assert [tuple(c.shape) for c in batch.clips] == [(4, 3, 32, 32)] + [(1, 3, 32, 32)] * 3
    assert [len(p.pieces) - 1 for p in batch.prompts] == [1, 1, 0, 2]
    learnt = sum(label != IGNORE for p in batch.prompts for piece in p.labels for label in piece)
    assert batch.weights == {"utterances": 4.0, "tokens": float(learnt)}
    assert batch.text_ids is not None
    assert batch.text_mask is not None
    assert batch.text_ids.shape == batch.text_mask.shape
    assert batch.to("cpu").keys == batch.keys


def test_captions_have_an_order_in_front_and_no_instruction(corpus: Path) -> None:
    words = Words()
    reader = samples(corpus, tokenizer=words, instruction_tokenizer=None)
    sample = reader.read(3, 0)
    kept = [t for piece in sample.encoded.labels for t in piece if t != IGNORE]
    assert words.said(kept) == ["it", "gets", "light", "</s>"]
    assert reader.collate([sample]).text_ids is None


def test_tiles_are_made_where_the_settings_ask_for_them(corpus: Path) -> None:
    clip = samples(corpus, settings=ClipSettings(frames=2, size=16, max_tiles=6)).read(0, 0).clips[0]
    assert clip.shape[0] == 2
    assert clip.shape[-1] % 16 == clip.shape[-2] % 16 == 0
    assert clip.shape[-1] > 16


def test_instructions_are_padded_on_their_side() -> None:
    ids, mask = pad_words([[5, 6, 7], [8]], 0, "left")
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert pad_words([[5, 6, 7], [8]], 9, "right")[0].tolist() == [[5, 6, 7], [8, 9, 9]]


def test_a_length_needs_no_video_and_a_broken_entry_has_one_too(corpus: Path) -> None:
    reader = samples(corpus, visual_tokens=96)
    assert reader.length(0) > 96 > reader.length(4)
    assert reader.length(2) > 0
    assert len(reader) == 6
    assert reader.fingerprint == read_dialogues(corpus).fingerprint


def test_a_reader_crosses_to_worker_processes(corpus: Path) -> None:
    one = samples(corpus)
    other = pickle.loads(pickle.dumps(one))
    assert torch.equal(one.read(0, 1).clips[0], other.read(0, 1).clips[0])


def test_no_frames_cannot_be_meant(corpus: Path) -> None:
    with pytest.raises(RecipeError, match="0 frames a video"):
        samples(corpus, settings=ClipSettings(frames=0))
