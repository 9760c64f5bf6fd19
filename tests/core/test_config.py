from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thawline.core.config import Strict, bind, dump_yaml, override, parse_yaml, read_yaml
from thawline.errors import RecipeError


class Optim(Strict):
    lr: float
    clip: float = 1.0


class Recipe(Strict):
    task: str
    optim: Optim
    names: tuple[str, ...] = ()
    either: Optim | str = "none"


GOOD = """\
task: speech
optim:
  lr: 1e-3
names: [a, "b[-2:]"]
"""


def test_a_number_with_an_exponent_is_a_number() -> None:
    assert bind(Recipe, parse_yaml(GOOD, "r.yaml")).optim.lr == 1e-3


def test_words_that_yaml_1_1_took_for_truth_values_stay_words() -> None:
    assert parse_yaml("[on, no, yes, true]", "r.yaml").data == ["on", "no", "yes", True]


def test_every_value_knows_where_it_was_written() -> None:
    recipe = bind(Recipe, parse_yaml(GOOD, "r.yaml"))
    assert recipe.optim.where("lr") == "r.yaml:3:3"
    assert recipe.where("names", 1) == "r.yaml:4:12"
    assert Optim(lr=1).where("lr") == ""


def test_an_unknown_key_is_refused_with_its_place_and_the_nearest_known_key() -> None:
    with pytest.raises(RecipeError) as caught:
        bind(Recipe, parse_yaml("task: a\noptim:\n  lr: 1\n  clop: 2\n", "r.yaml"))
    assert str(caught.value) == (
        "r.yaml:4:3: unknown key 'clop' in 'optim'\n  fix: did you mean 'clip'? known keys: clip, lr"
    )


def test_a_misspelt_override_is_refused_and_named() -> None:
    doc = override(parse_yaml(GOOD, "r.yaml"), ["optim.clop=3"])
    with pytest.raises(RecipeError, match=r"override 'optim.clop=3': unknown key 'clop' in 'optim'"):
        bind(Recipe, doc)


def test_all_complaints_come_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        bind(Recipe, parse_yaml("tusk: a\noptim: {lr: fast}\n", "r.yaml"))
    text = str(caught.value)
    assert "'task' is missing" in text
    assert "unknown key 'tusk'" in text
    assert "r.yaml:2:9: optim.lr" in text


def test_a_slice_without_quotes_in_a_flow_list_is_explained() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_yaml("train: [ctc, encoder.encoders[-2:]]", "r.yaml")
    assert 'write "encoder.encoders[-2:]"' in str(caught.value)
    assert caught.value.where.startswith("r.yaml:1:")


def test_a_key_written_twice_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"r.yaml:2:1: the key 'a' is written twice"):
        parse_yaml("a: 1\na: 2\n", "r.yaml")


def test_a_tag_never_builds_an_object() -> None:
    with pytest.raises(RecipeError, match="is not allowed"):
        parse_yaml("a: !!python/object/apply:os.system [ls]\nb: !x 1", "r.yaml")


def test_a_missing_file_names_its_likely_neighbour(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(GOOD)
    with pytest.raises(RecipeError, match=r"did you mean .*recipe\.yaml"):
        read_yaml(tmp_path / "recpie.yaml")


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("# nothing\n")
    with pytest.raises(RecipeError, match="the file is empty"):
        read_yaml(tmp_path / "r.yaml")


def test_overrides_reach_list_items_and_new_keys_and_know_their_folder(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(GOOD)
    doc = override(read_yaml(tmp_path / "r.yaml"), ["names.0=z", "optim.clip=5"])
    assert doc.data["names"] == ["z", "b[-2:]"]
    assert doc.data["optim"] == {"lr": 1e-3, "clip": 5}
    assert doc.origin("names", 0).folder == Path.cwd()
    assert doc.origin("task").folder == tmp_path


@pytest.mark.parametrize("text", ["", "=3", "optim.lr"])
def test_an_override_without_key_or_value_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is not an override"):
        override(parse_yaml(GOOD, "r.yaml"), [text])


def test_an_override_inside_a_plain_value_is_refused() -> None:
    with pytest.raises(RecipeError, match="'task' is a value, it has no 'x'"):
        override(parse_yaml(GOOD, "r.yaml"), ["task.x=1"])


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("ab[*e1.", min_size=1, max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(plain)
def test_what_is_dumped_reads_back_as_the_same_data(data: object) -> None:
    wrapped = {"data": data}
    assert parse_yaml(dump_yaml(wrapped), "r.yaml").data == wrapped
