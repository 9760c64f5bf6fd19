"""The page of a run: whole, self-contained, for any task and in any state of the run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.tasks.vision_cases import run_case, write_case
from tests.train.toy import ToyTask, write_recipe

from thawline.cli.app import run as cli
from thawline.errors import RecipeError
from thawline.report.page import write_page
from thawline.tasks.vision_classifier import Classifier
from thawline.tasks.vision_review import review_run
from thawline.train.loop import train
from thawline.train.recipe import read_recipe


class Seen(HTMLParser):
    """Tags and whatever the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href") and value]


def parsed(path: Path) -> tuple[str, Seen]:
    text = path.read_text(encoding="utf-8")
    seen = Seen()
    seen.feed(text)
    return text, seen


def toy_run(folder: Path) -> Path:
    write_recipe(folder)
    return train(
        read_recipe(folder / "toy.yaml", ["options={bad: [17]}", "data.max_bad=0.1"]), ToyTask(), folder / "run"
    ).dir


def test_the_page_shows_curves_phases_verdict_and_what_happened(tmp_path: Path) -> None:
    page = write_page(toy_run(tmp_path))
    text, seen = parsed(page)
    assert page.name == "report.html"
    assert seen.tags.count("svg") >= 4
    assert "phase 1" in text
    assert "The plan law holds." in text
    assert "bad sample" in text
    assert "point 17" in text


def test_the_page_fetches_nothing_and_runs_nothing(tmp_path: Path) -> None:
    text, seen = parsed(write_page(toy_run(tmp_path)))
    assert seen.addresses == []
    assert "script" not in seen.tags
    assert not re.search(r"url\(|@import|https?://", text)


def test_a_broken_law_is_shown_with_its_tensors(tmp_path: Path) -> None:
    directory = toy_run(tmp_path)
    report = json.loads((directory / "audit.json").read_text())
    report |= {"broken": True, "frozen_tensors_changed": ["body.0.weight"]}
    (directory / "audit.json").write_text(json.dumps(report))
    text, _ = parsed(write_page(directory))
    assert "The plan law is broken." in text
    assert "body.0.weight" in text


def test_a_run_that_was_killed_early_has_a_page_too(tmp_path: Path) -> None:
    directory = toy_run(tmp_path)
    (directory / "audit.json").unlink()
    (directory / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.1, "lr": 0.1, "loss": "nan"}\n{"step": 2, "ep')
    (directory / "events.jsonl").write_text("")
    text, _ = parsed(write_page(directory))
    assert "Not audited yet" in text


def test_names_from_files_are_escaped(tmp_path: Path) -> None:
    directory = toy_run(tmp_path)
    evil = '<img src=x onerror="alert(1)">'
    with (directory / "events.jsonl").open("a") as handle:
        handle.write(json.dumps({"event": "bad sample", "key": evil, "reason": evil}) + "\n")
    review = {
        "data": evil,
        "metrics": {"accuracy": 0.5},
        "classes": [evil, "b"],
        "confusion": [[1, 1], [0, 2]],
        "mistakes": [
            {"key": evil, "label": evil, "predicted": "b", "probability": 0.9, "label_probability": 0.1, "image": evil}
        ],
    }
    text, _ = parsed(write_page(directory, review=review))
    assert "<img src=x" not in text


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is not a run directory"):
        write_page(tmp_path)


def test_a_vision_run_gets_its_confusion_matrix_and_worst_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_case(tmp_path)
    result = run_case(tmp_path, overrides=["run.epochs=1"])  # too short to be right everywhere
    capsys.readouterr()
    assert cli(["report", str(result.dir), "--json"]) == 0
    page = Path(json.loads(capsys.readouterr().out)["report"])
    text, seen = parsed(page)
    assert "Confusion matrix" in text
    wrong = 16 - round(result.metrics["valid/accuracy"] * 16)
    assert wrong > 0
    assert len(seen.addresses) == wrong
    assert all(address.startswith("data:image/png;base64,") for address in seen.addresses)


def test_the_page_of_a_finished_run_shows_what_the_run_wrote_down_and_scores_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_case(tmp_path)
    result = run_case(tmp_path, overrides=["run.epochs=1"])
    read = review_run(result.dir)
    (rows,) = (result.dir / "evaluations").iterdir()
    rows.rename(tmp_path / "rows")
    scored = review_run(result.dir)  # what runs of before these rows were kept get
    (tmp_path / "rows").rename(rows)
    assert read is not None
    assert scored is not None
    assert scored["metrics"].pop("unreadable") == 0
    assert read["metrics"] == pytest.approx(scored["metrics"], rel=1e-5)  # other batches round otherwise
    assert read["confusion"] == scored["confusion"]
    assert [(m["key"], m["image"]) for m in read["mistakes"]] == [(m["key"], m["image"]) for m in scored["mistakes"]]
    monkeypatch.setattr(Classifier, "open", lambda *_: pytest.fail("the model was opened"))
    assert review_run(result.dir) == read


def test_rows_of_other_images_or_of_a_run_taken_up_again_are_not_taken_for_the_models(tmp_path: Path) -> None:
    write_case(tmp_path)
    result = run_case(tmp_path, overrides=["run.epochs=1"])
    (rows,) = (result.dir / "evaluations").iterdir()
    whole = rows.read_text()
    rows.write_text(whole.replace("blue/00", "blue/99"))
    other = review_run(result.dir)
    rows.write_text(whole)
    with (result.dir / "events.jsonl").open("a") as events:
        events.write('{"event": "resumed", "step": 3}\n')
    again = review_run(result.dir)
    assert other is not None
    assert again is not None
    assert other["metrics"]["unreadable"] == again["metrics"]["unreadable"] == 0  # scored anew


def test_a_vision_run_whose_images_are_gone_still_has_a_page(tmp_path: Path) -> None:
    write_case(tmp_path)
    result = run_case(tmp_path, overrides=["run.epochs=1"])
    (tmp_path / "valid").rename(tmp_path / "elsewhere")
    assert cli(["report", str(result.dir)]) == 0
    text, _ = parsed(result.dir / "report.html")
    assert "The model could not be scored" in text
