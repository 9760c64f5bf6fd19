from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from thawline.demo.espeak import Sentence, speak
from thawline.errors import DataError, MissingExtra

pytest.importorskip("espeakng_loader", reason="the extra `demo` is not installed")

SAID = Sentence(text="three seven one nine", voice="en-us+m3")


def test_a_sentence_becomes_samples_of_a_plausible_length():
    ((samples, rate_hz),) = speak([SAID])
    assert rate_hz == 22050
    assert samples.dtype == np.int16
    assert 0.5 < len(samples) / rate_hz < 3.0
    assert np.abs(samples).max() > 1000  # there is sound, not silence


def test_voice_speed_and_pitch_each_change_the_samples():
    others = [
        Sentence(text=SAID.text, voice="en-gb-scotland+f1"),
        Sentence(text=SAID.text, voice=SAID.voice, rate_wpm=260),
        Sentence(text=SAID.text, voice=SAID.voice, pitch=90),
    ]
    # A process each: within one, the same sentence said twice differs already.
    (plain, _), *rest = [next(iter(speak([sentence]))) for sentence in (SAID, *others)]
    assert all(not np.array_equal(plain, samples) for samples, _ in rest)
    assert len(rest[1][0]) < len(plain)


@pytest.mark.parametrize("voice", ["en-gb", "xx", "en-us+nobody", ""])
def test_a_voice_that_is_not_there_is_refused_instead_of_speaking_with_the_previous_one(voice: str):
    said = speak([SAID, Sentence(text="one", voice=voice)])
    next(said)
    with pytest.raises(DataError, match="espeak-ng has no voice") as caught:
        next(said)
    assert repr(voice) in caught.value.what
    assert "gmw/en-US" in caught.value.what  # what would have been heard in its place


def test_a_text_without_sound_is_refused():
    with pytest.raises(DataError, match="gave no sound for ''"):
        list(speak([Sentence(text="", voice="en-us")]))


def test_a_package_that_is_not_there_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(MissingExtra) as caught:
        next(speak([SAID]))
    assert "thawline[demo]" in caught.value.fix


def test_a_child_that_dies_is_an_error_and_not_a_short_answer(monkeypatch: pytest.MonkeyPatch):
    start = subprocess.Popen

    def dying(command: list[str], **how: object) -> subprocess.Popen[bytes]:
        return start([sys.executable, "-c", "import os; os.kill(os.getpid(), 11)"], **how)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "Popen", dying)
    with pytest.raises(DataError, match="ended with code -11"):
        list(speak([SAID]))


def test_leaving_early_ends_the_child(monkeypatch: pytest.MonkeyPatch):
    started: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def watched(*args: object, **how: object) -> subprocess.Popen[bytes]:
        started.append(start(*args, **how))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", watched)
    said = speak([SAID] * 500)
    next(said)
    said.close()  # type: ignore[attr-defined]
    assert started[0].returncode is not None
