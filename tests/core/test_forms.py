"""What is said of a value that a setting cannot take: one sentence with the forms that it can."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from thawline.core.config import Strict, bind, parse_yaml
from thawline.core.forms import _members, form_at, words
from thawline.errors import RecipeError


class Inner(Strict):
    decay: float = Field(default=0.5, ge=0, lt=1)
    start: int = Field(default=0, alias="from")


class Outer(Strict):
    count: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    share: float | None = Field(default=None, gt=0)
    part: float = Field(default=0.0, ge=0, le=1)
    pair: tuple[float, float] | None = None
    sizes: tuple[int, ...] = ()
    flag: bool = False
    inner: Inner | None = None
    several: tuple[Inner, ...] = ()
    policy: Literal["a", "b"] | dict[str, Literal["a", "b"]] = "a"
    free: dict[str, Any] = {}
    name: str | None = None


SENTENCES = {
    "count: many": "count: expected a whole number of at least 1, 'auto' or null, got 'many'",
    "count: 0": "count: expected a whole number of at least 1, 'auto' or null, got 0",
    "count: {a: 1}": "count: expected a whole number of at least 1, 'auto' or null, got {'a': 1}",
    "share: none": "share: expected a number above 0 or null, got 'none'",
    "part: 2": "part: input should be less than or equal to 1, got 2",
    "part: x": "part: expected a number from 0 to 1, got 'x'",
    "pair: 0.9": "pair: expected a list of 2 numbers or null, got 0.9",
    "pair: [0.9]": "pair: expected a list of 2 numbers or null, got [0.9]",
    "pair: [0.9, x]": "pair.1: expected a number, got 'x'",
    "sizes: [[1]]": "sizes.0: expected a whole number, got [1]",
    "sizes: 1": "sizes: expected a list of whole numbers, got 1",
    "flag: maybe": "flag: expected true or false, got 'maybe'",
    "inner: true": "inner: expected keys and values (decay, from) or null, got True",
    "inner: {decay: x}": "inner.decay: expected a number of at least 0 and below 1, got 'x'",
    "inner: {from: x}": "inner.from: expected a whole number, got 'x'",
    "several: [x]": "several.0: expected keys and values (decay, from), got 'x'",
    "policy: c": "policy: expected 'a', 'b' or keys with 'a' or 'b' each, got 'c'",
    "policy: {x: c}": "policy.x: expected 'a' or 'b', got 'c'",
    "free: 5": "free: expected keys and values, got 5",
    "name: [a]": "name: expected a text or null, got ['a']",
}


@pytest.mark.parametrize("text", SENTENCES)
def test_one_sentence_names_the_forms_and_what_was_written(text: str) -> None:
    with pytest.raises(RecipeError) as refused:
        bind(Outer, parse_yaml(text, "r.yaml"))
    assert refused.value.what == SENTENCES[text]
    assert refused.value.where.startswith("r.yaml:1:")
    assert refused.value.fix == ""


def test_several_complaints_are_several_lines_without_an_empty_fix() -> None:
    with pytest.raises(RecipeError) as refused:
        bind(Outer, parse_yaml("pair: [x, y]\nflag: 5", "r.yaml"))
    assert str(refused.value) == (
        "r.yaml:1:8: pair.0: expected a number, got 'x'\n"
        "r.yaml:1:11: pair.1: expected a number, got 'y'\n"
        "r.yaml:2:1: flag: expected true or false, got 5"
    )


def test_every_field_of_a_recipe_has_words() -> None:
    from thawline.train.recipe import Recipe

    waiting: list[tuple[str | int, ...]] = [(name,) for name in Recipe.model_fields]
    seen = 0
    while waiting:
        path = waiting.pop()
        form = form_at(Recipe, path)
        assert form is not None, path
        said = words(form)
        assert said, path
        assert "<" not in said, (path, said)
        assert "pydantic" not in said
        seen += 1
        for kind in {k for k, _ in _members(form)}:
            if isinstance(kind, type) and issubclass(kind, Strict):
                waiting += [(*path, f.alias or n) for n, f in kind.model_fields.items()]
    assert seen > 60
