"""What TensorBoard shows of a run, read back with its own reader; and what the run's clock says."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.train.runs import AtStep, bits, run
from tests.train.toy import write_recipe

from thawline.core import extras
from thawline.errors import MissingExtra, Stopped
from thawline.train import clock as clocks
from thawline.train.clock import Clock
from thawline.train.monitor import PlainMonitor
from thawline.train.rundir import RunDirectory, read_rows

pytest.importorskip("tensorboard")
ON = ["run.tensorboard=true"]


def shown(run_dir: Path) -> dict[str, dict[int, float]]:
    """Tag -> step -> value, as TensorBoard shows them; a step that is shown twice fails."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run_dir / "tensorboard"))
    reader.Reload()
    found = {}
    for tag in reader.Tags()["scalars"]:
        events = reader.Scalars(tag)
        assert len({e.step for e in events}) == len(events)
        found[tag] = {e.step: e.value for e in events}
    return found


def logged(run_dir: Path, name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in read_rows(run_dir / "metrics.jsonl") if name in row}


def test_the_board_shows_every_figure_of_the_log(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    made = run(tmp_path, "run", ON)
    board = shown(made.dir)
    for name in ("loss", "lr", "grad_norm"):
        assert board[f"train/{name}"] == pytest.approx(logged(made.dir, name), rel=1e-6)  # single precision there
    assert board["valid/loss"] == pytest.approx(logged(made.dir, "valid/loss"), rel=1e-6)
    speed = {"seconds", "samples_per_s", "memory_mb", "peak_memory_mb", "eta_s", "wait/data", "wait/saving"}
    assert {f"speed/{name}" for name in speed} <= board.keys()


def test_a_run_killed_and_resumed_shows_each_step_once_and_none_is_lost(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    whole = run(tmp_path, "whole", ON)
    died = subprocess.run([sys.executable, "-c", _DYING, str(tmp_path), *ON], env=_ENVIRONMENT, check=False)
    assert died.returncode == -9
    again = run(tmp_path, "cut", ON)
    assert bits(again.dir) == bits(whole.dir)
    assert shown(again.dir)["train/loss"] == shown(whole.dir)["train/loss"]
    assert shown(again.dir)["valid/loss"] == shown(whole.dir)["valid/loss"]
    assert len(list((again.dir / "tensorboard").iterdir())) == 2


_ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
_DYING = """
import os, signal, sys
from pathlib import Path
from tests.train.runs import AtStep, run
run(Path(sys.argv[1]), "cut", sys.argv[2:], monitor=AtStep(11, lambda: os.kill(os.getpid(), signal.SIGKILL)))
"""


def test_a_loss_that_is_not_a_number_leaves_a_gap(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    made = run(tmp_path, "run", [*ON, "options={poison: [9]}", "run.epochs=1", "run.checkpoint.best=null"])
    (gap,) = (row["step"] for row in read_rows(made.dir / "metrics.jsonl") if row.get("loss") == "nan")
    board = shown(made.dir)
    assert set(range(1, 8)) - set(board["train/loss"]) == {gap}
    assert gap in board["train/lr"]


def test_the_board_changes_nothing(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    kinds = (".safetensors", "metrics")
    made = run(tmp_path, "with", ON), run(tmp_path, "without")
    one, other = ({k: v for k, v in bits(r.dir).items() if k.endswith(kinds)} for r in made)
    assert one == other


def test_a_full_disk_takes_figures_from_the_board_and_nothing_from_the_run(tmp_path: Path) -> None:
    write_recipe(tmp_path)

    def fill() -> None:
        """Let the board's open file be one on a full disk."""
        (descriptor,) = (fd for fd in Path("/proc/self/fd").iterdir() if "tfevents" in str(fd.resolve()))
        with open("/dev/full", "wb") as full:
            os.dup2(full.fileno(), int(descriptor.name))

    made = run(tmp_path, "run", ON, monitor=AtStep(4, fill))
    assert set(shown(made.dir)["train/loss"]) == {1, 2, 3}
    assert bits(made.dir) == bits(run(tmp_path, "whole", ON).dir)


def test_without_its_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(tmp_path)

    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(extras.importlib, "import_module", absent)
    with pytest.raises(MissingExtra, match=r"pip install 'thawline\[tensorboard\]'"):
        run(tmp_path, "run", ON)


# --- the clock --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be moved."""
    hands = [100.0]
    monkeypatch.setattr(clocks, "perf_counter", lambda: hands[0])
    return hands


def test_the_clock_tells_pace_rest_and_what_was_waited_for(tmp_path: Path, hands: list[float]) -> None:
    clock = Clock(tmp_path / "speed.jsonl", step=10, total_steps=20)
    hands[0] += 2.0
    first = clock.lap(8, 11)
    assert (first["seconds"], first["samples_per_s"], first["eta_s"]) == (2.0, 4.0, 18.0)
    with clock.waiting("evaluation"):
        hands[0] += 6.0
    clock.waited("data", 1.0)
    hands[0] += 2.0
    second = clock.lap(8, 12)
    assert (second["wait/evaluation"], second["wait/data"]) == (0.75, 0.125)
    assert second["samples_per_s"] == pytest.approx(4.0)  # what trains is not slower for an evaluation between
    assert second["eta_s"] == 40.0
    assert [row["step"] for row in read_rows(tmp_path / "speed.jsonl")] == [11, 12]
    assert "wait/data" not in clock.lap(8, 13)


def test_memory_is_what_is_held_now_and_at_most(tmp_path: Path) -> None:
    held, peak = clocks.memory_mb()
    assert 10 < held <= peak * 1.01  # pages that are being given back are counted in one of the two


def test_the_line_says_what_the_run_waits_for_and_how_long_it_will_take() -> None:
    out = io.StringIO()
    monitor = PlainMonitor(out=out, interval_s=0)
    monitor.begin(step=0, total_steps=50)
    speed = {"samples_per_s": 3.0, "memory_mb": 812.0, "eta_s": 3725.0, "wait/data": 0.62, "wait/saving": 0.01}
    monitor.step({"step": 4, "epoch": 0.5, "loss": 1.0, "lr": 1e-3}, speed)
    assert out.getvalue() == (
        "step 4/50  epoch 0.50  loss 1.0000  lr 1.00e-03  3.0 samples/s  812 MB  (waits for data 62%)  1:02:05 left\n"
    )


def test_a_stopped_run_has_its_figures_on_the_board(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    with pytest.raises(Stopped):
        run(tmp_path, "run", ON, monitor=AtStep(5))
    assert set(shown(tmp_path / "run")["train/loss"]) == set(range(1, 6))
    assert RunDirectory(tmp_path / "run").board.is_dir()
