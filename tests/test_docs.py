"""The README tells the truth: its Python runs, its YAML parses, both languages agree, every verb is real."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from thawline.cli.app import VERBS
from thawline.core.config import parse_yaml
from thawline.freeze.plan import FreezePlan

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_python_blocks_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), {})
    assert "100%" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_yaml_blocks_are_plans_that_can_be_meant(page: Path) -> None:
    found = blocks(page, "yaml")
    assert len(found) == 2
    for block in found:
        FreezePlan(**parse_yaml(block, page.name).data["plan"])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_shown_is_a_verb(page: Path) -> None:
    shown = set(re.findall(r"^thawline (\w+)", page.read_text(encoding="utf-8"), re.M))
    assert shown
    assert shown <= set(VERBS)


def test_both_languages_have_the_same_commands_and_figures() -> None:
    english, chinese = (page.read_text(encoding="utf-8") for page in PAGES)
    for language in ("sh", "python"):
        strip = [re.sub(r"\s*#.*", "", "".join(blocks(page, language))) for page in PAGES]
        assert strip[0] == strip[1]
    assert english.count("\n## ") == chinese.count("\n## ")
    figures = [re.findall(r"\d+\.\d+ %", text) for text in (english, chinese)]
    assert figures[0] == figures[1]


def test_recipes_bind_whatever_their_data() -> None:
    from thawline.train.recipe import read_recipe

    for recipe in sorted(p for p in (ROOT / "recipes").rglob("*.yaml") if p.name != "train.yaml"):
        assert read_recipe(recipe).plan
