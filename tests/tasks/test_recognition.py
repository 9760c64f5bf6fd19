"""Audio in, text and times out: modes, windows, subtitles, and what is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.cli.speech_fixture import write_all, write_wav

from thawline.data.text import BLANK, CharTokenizer, build_units
from thawline.errors import DataError, RecipeError
from thawline.models.decode.align import ctc_align
from thawline.tasks.recognition import Recognizer
from thawline.tasks.speech_windows import quiet_windows
from thawline.tasks.transcript import Timed, Transcript, join_words, spoken_words, subrip, webvtt, words_of

MODES = ("ctc_greedy_search", "ctc_prefix_beam_search", "attention", "attention_rescoring")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("recognition")
    write_all(place)
    return place


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_models_own_tokens_with_a_score(folder: Path, mode: str) -> None:
    recognizer = Recognizer.open(folder / "base", mode=mode, beam=4, ctc_weight=0.3)
    found = next(recognizer.transcripts([folder / "dev0.wav"]))
    from thawline.data.audio import read_audio

    feats = torch.from_numpy(recognizer.frontend.features_of(read_audio(folder / "dev0.wav", rate_hz=8000), None))
    model: Any = recognizer.model
    with torch.no_grad():
        theirs = model.decode(feats[None], torch.tensor([len(feats)]), mode=mode, beam=4, ctc_weight=0.3)[0]
    assert found.tokens == theirs.tokens
    assert found.score == pytest.approx(theirs.score, abs=1e-4)
    assert found.text == recognizer.tokenizer.decode(theirs.tokens).strip()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "ctc_gready_search"}, "'ctc_greedy_search'"),
        ({"mode": "whisper"}, "mode whisper is for Whisper"),
        ({"beem": 3}, "beem"),
        ({"beam": 0}, "beam"),
        ({"chunk_size": 4}, "this model knows full context only"),
        ({"mode": "attention_rescoring", "reverse_weight": 0.3}, "no right-to-left decoder"),
        (
            {"hotwords": ("xyz",), "mode": "ctc_prefix_beam_search"},
            "cannot be spelled with this model's units: 'x', 'y'",
        ),
        ({"hotwords": ("abc",), "mode": "attention"}, "attention does not take a context"),
        ({"prompt": "Mr. Quilter"}, "prompt is for Whisper alone"),
        ({"task": "translate"}, "this model cannot translate"),
        ({"left_chunks": -7}, "left_chunks: input should be greater than or equal to -1"),
        ({"length_penalty": float("nan")}, "length_penalty: input should be a finite number"),
    ],
)
def test_what_a_model_cannot_do_is_refused_before_anything_is_decoded(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as refused:
        Recognizer.open(folder / "base", **options)
    assert message in str(refused.value)


def test_hotwords_change_what_is_heard(folder: Path) -> None:
    plain = Recognizer.open(folder / "base", mode="ctc_prefix_beam_search", beam=12)  # no label is pruned
    forced = plain.with_options(hotwords=("abcd",), hotword_score=30.0)
    texts = [next(r.transcripts([folder / "dev0.wav"])).text for r in (plain, forced)]
    assert "abcd" not in texts[0]
    assert "abcd" in texts[1]


# --- times ---


def best_path(log_probs: torch.Tensor, tokens: tuple[int, ...]) -> tuple[int, ...]:
    """All alignments, one by one: slow and plain."""
    import itertools

    frames, best, begins = log_probs.size(0), -np.inf, ()
    for path in itertools.product(sorted({0, *tokens}), repeat=frames):
        spelled = tuple(k for k, _ in itertools.groupby(path))
        if tuple(t for t in spelled if t) != tokens:
            continue
        score = float(sum(log_probs[t, label] for t, label in enumerate(path)))
        if score > best:
            starts = [t for t, label in enumerate(path) if label and (t == 0 or path[t - 1] != label)]
            best, begins = score, tuple(starts)
    return begins


@pytest.mark.parametrize("tokens", [(1,), (1, 2), (1, 1), (2, 1, 2)])
def test_alignment_is_the_best_of_all_paths(tokens: tuple[int, ...]) -> None:
    for seed in range(5):
        log_probs = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)).double().log_softmax(-1)
        assert ctc_align(log_probs, tokens, blank=0) == best_path(log_probs, tokens)


def test_alignment_refuses_more_tokens_than_frames_can_hold() -> None:
    with pytest.raises(DataError, match="2 tokens need 3 encoder frames, there are 2"):
        ctc_align(torch.zeros(2, 3).log_softmax(-1), (1, 1), blank=0)


@pytest.mark.parametrize("mode", MODES)
def test_words_lie_in_order_inside_the_recording_and_spell_the_text(folder: Path, mode: str) -> None:
    recognizer = Recognizer.open(folder / "base", mode=mode)
    found = next(recognizer.transcripts([folder / "dev3.wav"], times=True))
    assert " ".join(word.text for word in found.words).split() == found.text.split()
    assert len(found.token_times_s) == len(found.tokens)
    assert {word.start_s for word in found.words} <= set(found.token_times_s)
    edges = [edge for word in found.words for edge in (word.start_s, word.end_s)]
    assert edges == sorted(edges)
    assert all(0 <= edge <= found.seconds + 0.02 for edge in edges)


def test_tokens_become_words_at_marks_spaces_and_ideographs() -> None:
    characters = CharTokenizer(build_units(["ab cd 你好"]))
    ids = characters.encode("ab cd 你好")
    words = words_of(characters, ids, [0.1 * i for i in range(len(ids))], 3.0)
    assert [(w.text, round(w.start_s, 1)) for w in words] == [("ab", 0.0), ("cd", 0.3), ("你", 0.6), ("好", 0.7)]
    assert words[0].end_s == pytest.approx(0.2)  # the space begins
    assert words[-1].end_s == pytest.approx(0.7 + 0.6)
    by_word = CharTokenizer({BLANK: 0, "one": 1, "two": 2}, split_with_space=True)
    assert [w.text for w in words_of(by_word, [1, 2, 1], [0.0, 0.5, 0.9], 1.0, [0.9, 0.5, 0.7])] == [
        "one",
        "two",
        "one",
    ]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (" Mr. Quilter's gospel (in 3.5 parts) cost $20, he said: \"Don't!\" -- so...", "english"),
        ("今天天气很好，我们去公园吧。", "chinese"),
        (" Größe, naïve Fußgänger — „ja“", "german"),
        (" ¿Qué hora es? [risas]", "spanish"),
    ],
)
def test_a_whispers_tokens_become_words_as_in_transformers(shared: Path, text: str, language: str) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.whisper.tokenization_whisper import _combine_tokens_into_words

    from thawline.data.text import WhisperTokenizer

    place = shared / "models" / "whisper-base"
    ours, theirs = WhisperTokenizer(place), transformers.WhisperTokenizer.from_pretrained(place)
    tokens = ours.encode(text)
    spans = [(float(n), n + 1.0) for n in range(len(tokens))]
    found = spoken_words(ours, tokens, spans, spaced=language != "chinese")
    words, _, numbers = _combine_tokens_into_words(theirs, tokens, language)
    assert [w.text for w in found] == [w.strip() for w in words]
    assert [(w.start_s, w.end_s) for w in found] == [(float(n[0]), n[-1] + 1.0) for n in numbers]


def test_subtitles_are_written_as_players_read_them() -> None:
    cues = [Timed(0.0, 1.5, "a < b & c"), Timed(3599.9996, 3661.25, "two\nlines")]
    assert subrip(cues) == (
        "1\n00:00:00,000 --> 00:00:01,500\na < b & c\n\n2\n01:00:00,000 --> 01:01:01,250\ntwo lines\n\n"
    )
    assert webvtt(cues) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\na &lt; b &amp; c\n\n01:00:00.000 --> 01:01:01.250\ntwo lines\n\n"
    )


def test_words_are_joined_into_lines_until_a_pause_or_six_seconds() -> None:
    words = [Timed(i * 1.0, i * 1.0 + 0.9, f"w{i}") for i in range(8)] + [Timed(20.0, 20.5, "late")]
    cues = join_words(words)
    assert [cue.text for cue in cues] == ["w0 w1 w2 w3 w4 w5", "w6 w7", "late"]
    assert (cues[0].start_s, cues[0].end_s) == (0.0, 5.9)
    assert join_words([Timed(0, 1, "你"), Timed(1, 2, "好"), Timed(2, 3, "ok")])[0].text == "你好 ok"


def test_a_transcript_is_plain_json() -> None:
    found = Transcript(file="a.wav", text="hi", tokens=(1, 2), seconds=1.23456, words=(Timed(0, 0.5, "hi", 0.987654),))
    assert json.loads(json.dumps(found.to_json())) == {
        "file": "a.wav",
        "text": "hi",
        "seconds": 1.235,
        "tokens": [1, 2],
        "score": None,
        "words": [{"start": 0, "end": 0.5, "text": "hi", "confidence": 0.9877}],
    }


# --- long recordings ---


def test_windows_cover_the_recording_and_are_cut_where_it_is_quiet() -> None:
    rate = 1000
    samples = np.random.RandomState(0).randn(95 * rate).astype(np.float32)
    for pause in (24.0, 51.0, 78.5):
        samples[int(pause * rate) : int((pause + 0.4) * rate)] = 0
    windows = quiet_windows(samples, rate)
    assert windows[0][0] == 0
    assert windows[-1][1] == len(samples)
    assert all(a[1] == b[0] for a, b in pairwise(windows))
    assert all(end - begin <= 30 * rate for begin, end in windows)
    cuts = [end / rate for _, end in windows[:-1]]
    assert [round(cut) for cut in cuts] == [24, 51, 79]
    assert quiet_windows(samples[: 30 * rate], rate) == [(0, 30 * rate)]


def test_a_long_recording_is_decoded_in_windows_with_times_of_the_whole(folder: Path, tmp_path: Path) -> None:
    write_wav(tmp_path / "long.wav", 70.0, 440)
    recognizer = Recognizer.open(folder / "base", blank_penalty=30.0)  # so that an untrained model says something
    found = next(recognizer.transcripts([tmp_path / "long.wav"], times=True))
    assert found.windows == 3
    assert "3 windows cut at quiet places" in found.notes[0]
    assert found.words[-1].start_s > 40
    assert [w.start_s for w in found.words] == sorted(w.start_s for w in found.words)


def test_a_recording_over_the_limit_is_refused_by_its_header(folder: Path, tmp_path: Path) -> None:
    import wave

    with wave.open(str(tmp_path / "three_hours.wav"), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(1)
        out.setframerate(1000)
        out.writeframes(bytes([128]) * (3 * 3600 * 1000))
    with pytest.raises(DataError, match=r"3\.00 hours are more than the limit of 2\.00") as refused:
        list(Recognizer.open(folder / "base").transcripts([tmp_path / "three_hours.wav"]))
    assert "--max-minutes" in refused.value.fix


def test_a_missing_recording_names_the_nearest(folder: Path) -> None:
    with pytest.raises(DataError, match="no such audio file") as refused:
        Recognizer.open(folder / "base").transcribe([folder / "dev00.wav"])
    assert "dev0.wav" in refused.value.fix


# --- a data set ---


def test_unreadable_utterances_count_as_deletions_and_say_why(folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (folder / "dev.list").read_text().splitlines()]
    for row in rows:
        row["wav"] = str(folder / row["wav"])
    (tmp_path / "cut.wav").write_bytes(Path(rows[1]["wav"]).read_bytes()[:3000])
    rows[1]["wav"] = str(tmp_path / "cut.wav")
    rows[1]["txt"] = "a b c d e f"
    (tmp_path / "dev.list").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = Recognizer.open(folder / "base").evaluate(tmp_path / "dev.list")
    assert result.metrics["unreadable"] == 1
    assert result.metrics["utterances"] == 4
    assert [row["key"] for row in result.rows] == [row["key"] for row in rows]
    bad = result.rows[1]
    assert (bad["hyp"], bad["errors"]) == ("", 6)
    assert "cut short" in bad["unreadable"]
    import jiwer

    assert result.metrics["wer"] == pytest.approx(
        jiwer.wer([row["ref"] for row in result.rows], [row["hyp"] for row in result.rows])
    )
