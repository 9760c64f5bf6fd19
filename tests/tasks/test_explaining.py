from __future__ import annotations

import inspect
import re

import pytest

from thawline import errors
from thawline.errors import RecipeError, ThawlineError
from thawline.freeze import doctor
from thawline.tasks.explaining import PAGES, explain
from thawline.train import compatibility

ERRORS = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, ThawlineError)]


@pytest.mark.parametrize("error", [e for e in ERRORS if e is not ThawlineError], ids=lambda e: e.__name__)
def test_every_error_and_its_exit_code_have_a_page(error: type[ThawlineError]):
    assert explain(error.__name__).meaning
    assert error.__name__ in explain(str(error.exit_code)).meaning


def test_every_finding_of_the_doctor_has_a_page():
    source = inspect.getsource(doctor)
    found = set(re.findall(r'code="([a-z-]+)"', source)) | {"not-in-optimizer", "not-in-plan", "not-in-model"}
    assert len(found) > 15
    for code in (*found, *(f"no-gradient-{why}" for why in doctor._WHY)):
        assert explain(code).meaning


def test_every_grade_has_a_page():
    for grade in compatibility.Grade.__args__:
        assert "Grade of a resume" in explain(grade).meaning


def test_words_are_found_however_they_are_spelled():
    assert explain("basemismatch") is explain("BaseMismatch")
    assert len({page.title.lower() for page in PAGES}) == len(PAGES)


def test_an_unknown_word_names_the_near_one():
    with pytest.raises(RecipeError, match=r"did you mean norm-drifts\?"):
        explain("norm-drift")
