from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from thawline.demo import story
from thawline.demo.evidence import changed_names, frozen_statistics
from thawline.demo.scenes import Scenes
from thawline.demo.stage import Stage
from thawline.demo.story import MARK, Rates, play
from thawline.demo.verbs import kill_at_step
from thawline.errors import RecipeError
from thawline.train.rundir import RunDirectory

pytest.importorskip("espeakng_loader", reason="the extra `demo` is not installed")


def _thawline(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "thawline", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RecipeError, match="holds no demo") as caught:
        play(tmp_path, Stage(io.StringIO()))
    assert "--out DIR" in caught.value.fix
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "demo").write_text("")
    with pytest.raises(RecipeError, match="holds no demo"):
        play(tmp_path / "demo", Stage(io.StringIO()))


def test_of_an_earlier_demo_only_the_data_stay(tmp_path: Path):
    (tmp_path / MARK).write_text("")
    for name in ("data", "runs", "recipes", "mine"):
        (tmp_path / name).mkdir()
    story._prepare(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [MARK, "data", "mine"]


def test_a_folder_that_cannot_be_written_is_an_error_with_the_way_out(tmp_path: Path):
    (tmp_path / "file").write_text("")
    done = _thawline("demo", "--out", "file/below", cwd=tmp_path)
    assert done.returncode == 2
    assert "--out DIR" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_trainer_is_killed_once_its_log_reaches_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stub = (
        "import json, sys, time\n"
        "for step in range(1, 10_000):\n"
        "    print(json.dumps({'step': step}), file=open('metrics.jsonl', 'a'), flush=True)\n"
        "    time.sleep(0.01)\n"
    )
    start = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **how: start([sys.executable, "-c", stub], **{**how, "cwd": tmp_path})
    )
    files = RunDirectory(tmp_path)
    assert kill_at_step(tmp_path, ("train",), files, step=5) == -signal.SIGKILL
    assert 5 <= len(files.metrics.read_text().splitlines()) < 1000


def test_a_trainer_that_ends_by_itself_is_not_taken_for_a_killed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **how: start([sys.executable, "-c", ""], **how))
    assert kill_at_step(tmp_path, ("train",), RunDirectory(tmp_path), step=5) == 0


def test_changed_names_are_those_whose_bits_differ_or_that_one_side_lacks():
    before = {"a": torch.tensor([0.0]), "b": torch.tensor([1.0]), "c": torch.tensor([1.0])}
    after = {"a": torch.tensor([-0.0]), "b": torch.tensor([1.0]), "d": torch.tensor([1.0])}
    assert changed_names(before, after) == {"a", "c", "d"}


def test_only_statistics_of_norms_whose_weights_do_not_train_count_as_frozen():
    state = {f"{block}.norm.{name}": torch.zeros(1) for block in "xy" for name in ("weight", "running_mean")}
    assert frozen_statistics(state, frozenset({"y.norm.weight"})) == {"x.norm.running_mean"}


@pytest.mark.parametrize(
    ("rates", "failures"),
    [
        ({"everything": (0.01, 0.2), "tracking": (0.03, 0.2), "pinned": (0.03, 0.1), "output": (0.5, 0.0)}, 0),
        ({"everything": (0.01, 0.2), "tracking": (0.03, 0.2), "pinned": (0.6, 0.1), "output": (0.7, 0.0)}, 1),
        ({"everything": (0.5, 0.2), "tracking": (0.03, 0.2), "pinned": (0.03, 0.1), "output": (0.5, 0.0)}, 1),
        ({"everything": (0.01, 0.2), "tracking": (0.03, 0.2), "pinned": (0.03, 0.1), "output": (0.02, 0.0)}, 1),
        ({"pinned": (0.03, 0.1)}, 0),
    ],
)
def test_figures_that_do_not_show_what_they_should_are_failures(
    rates: dict[str, tuple[float, float]], failures: int, tmp_path: Path
):
    stage = Stage(io.StringIO())
    told = Scenes(tmp_path, stage, variants=(), epochs=1)
    told._judge(Rates(new=0.9, old=0.0), {name: Rates(new=new, old=old) for name, (new, old) in rates.items()})
    assert len(stage.failed) == failures


@pytest.mark.long
def test_the_quick_demo_holds_in_any_folder_and_its_json_stands_alone(tmp_path: Path):
    done = _thawline("demo", "--quick", "--json", "--out", "a folder", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["failed"] == []
    assert outcome["passed"] >= 18
    assert outcome["wer"]["base"]["new"] > 2 * outcome["wer"]["pinned"]["new"]
    assert "kill -9 in mid-epoch" in done.stderr
    assert (tmp_path / "a folder" / "runs" / "pinned" / "model" / "final.pt").is_file()
