"""No message and no help text names a verb, an option or a key of a recipe that does not exist."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.guidance import Text, options, texts, wrong


def test_everything_that_messages_and_help_name_exists() -> None:
    found = list(texts())
    assert len(found) > 2000
    verbs = {t.place: t.place.split()[1] for t in found if t.place.endswith("--help")}
    assert {t.place: w for t in found if (w := wrong(t.text, verbs.get(t.place, "")))} == {}


PLANTED = {
    "try `thawline trian RECIPE`": "there is no verb `thawline trian`",
    "give a folder (--tokeniser)": "no verb has --tokeniser",
    "`thawline resume RUN --steps 4` goes back": "`thawline resume` has no --steps",
    "raise run.nonfinite_limit": "a recipe has no run.nonfinite_limit",
    "a smaller data.batch.sise": "a recipe has no data.batch.sise",
    "options.tokeniser is missing": "a recipe has no options.tokeniser",
}


@pytest.mark.parametrize("text", list(PLANTED))
def test_what_does_not_exist_is_found(text: str, tmp_path: Path) -> None:
    assert wrong(text) == [PLANTED[text]]
    (tmp_path / "module.py").write_text(f'raise ValueError("x", fix=f"{{1}} {text}")\n')
    assert [wrong(t.text) for t in texts(tmp_path) if t.place.startswith("module")] == [[PLANTED[text]]]


@pytest.mark.parametrize(
    "text",
    [
        "`thawline resume RUN --step 4` goes back, or --fork",
        "pip install --force-reinstall torch",
        "raise run.nonfinite.limit, data.max_bad or optim.schedule.warmup; options.tokenizer, data.conf.spec_aug_conf",
        "`thawline data check LIST --units U` and `thawline data cmvn LIST --conf train.yaml`",
    ],
)
def test_what_exists_is_not(text: str) -> None:
    assert wrong(text) == []


def test_an_option_of_another_verb_is_no_advice() -> None:
    assert wrong("give it as --tokenizer", "transcribe") == []
    assert wrong("give it as --tokenizer", "diff") == ["`thawline diff` has no --tokenizer"]
    assert wrong("`thawline transcribe M X --tokenizer T`", "diff") == []
    assert "--conf" in options("data cmvn")
    assert "--conf" not in options("data check")


def test_docstrings_of_verbs_are_read_and_others_are_not() -> None:
    places = [t for t in texts() if isinstance(t, Text) and t.place == "thawline train --help"]
    assert "The same command on a begun run goes on with it" in places[0].text
