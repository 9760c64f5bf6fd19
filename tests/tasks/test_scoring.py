"""Error rates against jiwer's own, alignments, and the table of errors."""

from __future__ import annotations

import jiwer
import pytest

from thawline.data.utterance import Utterance
from thawline.errors import RecipeError
from thawline.tasks.scoring import alignment, confusions, normalizer, score
from thawline.tasks.speech_page import evaluation_page

REFERENCES = ["the cat sat", "on the mat", "你好 世界", ""]
HYPOTHESES = ["the cat sat down", "in mat", "你好世界", "noise here"]


def test_rates_are_jiwers_over_the_whole_set() -> None:
    found = score(REFERENCES[:3], HYPOTHESES[:3])
    assert found["wer"] == pytest.approx(jiwer.wer(REFERENCES[:3], HYPOTHESES[:3]))
    spaced = [[" ".join("".join(text.split())) for text in side[:3]] for side in (REFERENCES, HYPOTHESES)]
    assert found["cer"] == pytest.approx(jiwer.wer(*spaced))
    assert (found["utterances"], found["words"]) == (3, 8)


def test_words_heard_where_nothing_was_said_are_errors() -> None:
    assert score([""], ["two words"])["wer"] == 1.0
    assert score([""], [""])["wer"] == 0.0
    assert score([*REFERENCES], HYPOTHESES)["wer"] == pytest.approx(
        (jiwer.wer(REFERENCES[:3], HYPOTHESES[:3]) * 8 + 2) / 8
    )
    assert [word["op"] for word in alignment("", "two words")] == ["insert", "insert"]


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("none", "Cafe\u0301  IS  open", "Caf\u00e9 IS open"),
        ("basic", "Well, it's 5 o'clock!", "well it s 5 o clock"),
        ("basic", "你好，世界。", "你好 世界"),
    ],
)
def test_what_normalisers_fold(name: str, text: str, wanted: str) -> None:
    assert normalizer(name)(text) == wanted


def test_an_unknown_normaliser_names_those_there_are() -> None:
    with pytest.raises(RecipeError) as refused:
        normalizer("loud")
    assert refused.value.fix == "none, basic or english"


def test_an_alignment_says_what_became_of_each_word() -> None:
    found = alignment("on the red mat sat", "in the mat sat now please")
    assert [(w["op"], w["ref"], w["hyp"]) for w in found] == [
        ("substitute", "on", "in"),
        ("equal", "the", "the"),
        ("delete", "red", ""),
        ("equal", "mat", "mat"),
        ("equal", "sat", "sat"),
        ("insert", "", "now"),
        ("insert", "", "please"),
    ]


def test_the_commonest_errors_come_first_by_kind() -> None:
    rows = [alignment(r, h) for r, h in [("a b", "a c"), ("b", "c"), ("d", ""), ("", "e e")]]
    assert confusions(rows) == {
        "substitute": [{"ref": "b", "hyp": "c", "count": 2}],
        "delete": [{"ref": "d", "hyp": "", "count": 1}],
        "insert": [{"ref": "", "hyp": "e", "count": 2}],
    }


def test_the_page_escapes_texts_and_says_why_there_is_no_sound() -> None:
    row = {"key": "<k>", "alignment": alignment("a <b>", "a &"), "errors": 1}
    gone = Utterance(key="<k>", wav="/nowhere/x.wav", txt="a <b>")
    page = evaluation_page([row], {"wer": 0.5}, {"<k>": gone}, title="t <1>")
    assert "&lt;b&gt;" in page
    assert "&amp;" in page
    assert "<k>" not in page
    assert "50.00%" in page
    assert "no sound: " in page
