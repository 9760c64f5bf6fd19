"""Storage that refuses, code that raises, data that hang: the last whole checkpoint stays, the run goes on from it."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.runs import AtStep, bits, checkpoints, events, run
from tests.train.toy import Points, ToyTask, write_recipe

from thawline.ckpt import store
from thawline.ckpt.store import Buffer, StorageError
from thawline.errors import LawBroken, RecipeError, Stopped, ThawlineError
from thawline.train.ema import Ema
from thawline.train.rundir import RowLog, read_rows


class Refusing(store.FileSystem):
    """Refuses writes with `code` while it is set."""

    code = 0

    def write(self, descriptor: int, data: Buffer) -> int:
        if self.code:
            raise OSError(self.code, os.strerror(self.code))
        return super().write(descriptor, data)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Refusing:
    disk = Refusing()
    monkeypatch.setattr(store, "SYSTEM", disk)
    return disk


class Spell(AtStep):
    """The disk refuses from one step to another."""

    def __init__(self, disk: Refusing, first: int, last: int, code: int = errno.ENOSPC) -> None:
        self.disk, self.first, self.last, self.code = disk, first, last, code

    def step(self, row: Any, speed: Any) -> None:
        self.disk.code = self.code if self.first <= row["step"] < self.last else 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO])
def test_a_storage_that_refuses_for_a_while_leaves_the_run_going_and_its_bits_as_they_are(
    tmp_path: Path, disk: Refusing, code: int
) -> None:
    write_recipe(tmp_path)
    whole = run(tmp_path, "whole")
    made = run(tmp_path, "run", monitor=Spell(disk, 5, 17, code))
    refused = events(made.dir, "not saved")
    assert [e["step"] for e in refused] == [6, 7, 9, 12, 14, 15]
    assert os.strerror(code) in refused[0]["reason"]
    assert bits(made.dir) == bits(whole.dir)


def test_a_run_that_is_to_stop_for_it_ends_in_75_and_names_the_last_whole_checkpoint(
    tmp_path: Path, disk: Refusing
) -> None:
    write_recipe(tmp_path)
    stop = ["run.checkpoint.on_error=stop"]
    whole = run(tmp_path, "whole", stop)
    with pytest.raises(Stopped, match=r"No space left on device.*last whole checkpoint is step-00000007") as caught:
        run(tmp_path, "run", stop, monitor=Spell(disk, 8, 999))
    assert caught.value.exit_code == 75
    assert "thawline resume" in caught.value.fix
    disk.code = 0
    assert bits(run(tmp_path, "run", stop).dir) == bits(whole.dir)


def test_the_last_save_that_is_refused_ends_in_75_and_can_be_made_up_for(tmp_path: Path, disk: Refusing) -> None:
    write_recipe(tmp_path)
    whole = run(tmp_path, "whole")
    with pytest.raises(Stopped, match="last whole checkpoint is step-00000018"):
        run(tmp_path, "run", monitor=Spell(disk, 21, 999))
    assert not (tmp_path / "run" / "model").exists()
    disk.code = 0
    assert bits(run(tmp_path, "run").dir) == bits(whole.dir)


def test_an_export_that_is_refused_ends_in_75_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(tmp_path)

    class Full(ToyTask):
        def export(self, model: Any, folder: Path) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "weights.safetensors"))

    with pytest.raises(Stopped, match="last whole checkpoint is step-00000021"):
        run(tmp_path, "run", task=Full())
    assert bits(run(tmp_path, "run").dir) == bits(run(tmp_path, "whole").dir)


def test_without_any_checkpoint_it_is_the_storage_error_itself(tmp_path: Path, disk: Refusing) -> None:
    write_recipe(tmp_path)
    with pytest.raises(StorageError) as caught:
        run(tmp_path, "run", ["run.checkpoint.on_error=stop"], monitor=Spell(disk, 1, 999))
    assert caught.value.exit_code == 4


def test_a_run_taken_up_on_a_full_disk_ends_in_75_too(tmp_path: Path, disk: Refusing) -> None:
    write_recipe(tmp_path)
    with pytest.raises(Stopped):
        run(tmp_path, "run", monitor=AtStep(9))
    disk.code = errno.ENOSPC
    with pytest.raises(Stopped, match="last whole checkpoint is step-00000009"):
        run(tmp_path, "run")
    disk.code = 0
    assert bits(run(tmp_path, "run").dir) == bits(run(tmp_path, "whole").dir)


def test_a_place_that_can_hold_no_run_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    with pytest.raises(RecipeError, match="is not a folder"):
        run(tmp_path, recipe.name)
    with pytest.raises(StorageError, match="Not a directory"):
        run(tmp_path, f"{recipe.name}/run")


# --- logs -------------------------------------------------------------------------------------------------------------


def test_rows_that_are_refused_wait_and_come_in_order(tmp_path: Path, disk: Refusing) -> None:
    log = RowLog(tmp_path / "log.jsonl")
    log.append({"n": 0})
    disk.code = errno.ENOSPC
    log.append({"n": 1})
    with pytest.raises(StorageError, match="No space left"):
        log.flush()
    disk.code = 0
    log.append({"n": 2})
    assert read_rows(log.path) == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_a_row_of_which_the_disk_took_a_part_is_written_whole_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Short(Refusing):
        """Takes four bytes, then no more."""

        def write(self, descriptor: int, data: Buffer) -> int:
            if self.code:
                return super().write(descriptor, data)
            self.code = errno.ENOSPC
            return os.write(descriptor, bytes(data)[:4])

    log = RowLog(tmp_path / "log.jsonl")
    log.append({"n": 0})
    monkeypatch.setattr(store, "SYSTEM", Short())
    log.append({"n": 1})
    assert (tmp_path / "log.jsonl").read_bytes() == b'{"n": 0}\n{"n"'
    assert read_rows(log.path) == [{"n": 0}]
    monkeypatch.setattr(store, "SYSTEM", store.FileSystem())
    log.append({"n": 2})
    assert read_rows(log.path) == [{"n": 0}, {"n": 1}, {"n": 2}]


@pytest.mark.parametrize("log", ["metrics.jsonl", "events.jsonl", "speed.jsonl"])
def test_a_torn_last_line_of_a_log_does_not_hinder_going_on(tmp_path: Path, log: str) -> None:
    write_recipe(tmp_path)
    whole = run(tmp_path, "whole")
    with pytest.raises(Stopped):
        run(tmp_path, "run", monitor=AtStep(9))
    with (tmp_path / "run" / log).open("ab") as file:
        file.write(b'{"step": 10, "lo')
    assert bits(run(tmp_path, "run").dir) == bits(whole.dir)
    for line in (tmp_path / "run" / log).read_text().splitlines():
        json.loads(line)


# --- code that raises -------------------------------------------------------------------------------------------------


class Raises(ToyTask):
    """Raises in a step, after forward passes have moved statistics and backward passes left gradients."""

    def __init__(self, error: BaseException, call: int) -> None:
        self.error, self.call, self.calls = error, call, 0

    def loss(self, model: Any, batch: Any) -> Any:
        sums = super().loss(model, batch)
        self.calls += 1
        if self.calls == self.call:
            raise self.error
        return sums


EVERYTHING = ['plan={train: ["**"]}', "run.checkpoint.best=null"]


@pytest.mark.parametrize(
    "error",
    [ValueError("of the user"), KeyboardInterrupt(), RuntimeError("of torch"), ThawlineError("of ours")],
    ids=lambda e: type(e).__name__,
)
def test_a_step_that_raises_leaves_a_whole_checkpoint_of_the_step_before(tmp_path: Path, error: BaseException) -> None:
    write_recipe(tmp_path)
    whole = run(tmp_path, "whole", EVERYTHING)
    with pytest.raises(type(error)):
        run(tmp_path, "run", EVERYTHING, task=Raises(error, call=20))  # the second half of step 11
    assert checkpoints(tmp_path / "run")[-1].name == "step-00000010"
    assert events(tmp_path / "run", "stopped")[-1]["step"] == 10
    assert bits(run(tmp_path, "run", EVERYTHING).dir) == bits(whole.dir)


def test_an_evaluation_that_raises_leaves_its_step_and_is_made_up_for(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    whole = run(tmp_path, "whole", ["run.ema={}"])

    class Unlucky(ToyTask):
        def evaluate(self, model: Any, samples: Any, batches: Any) -> Any:
            raise ValueError("of the user")

    with pytest.raises(ValueError, match="of the user"):
        run(tmp_path, "run", ["run.ema={}"], task=Unlucky())
    assert checkpoints(tmp_path / "run")[-1].name == "step-00000007"
    with pytest.raises(ValueError, match="of the user"):
        run(tmp_path, "run", ["run.ema={}"], task=Unlucky())
    assert bits(run(tmp_path, "run", ["run.ema={}"]).dir) == bits(whole.dir)


def fail() -> None:
    raise ValueError("of the user")


def interrupt_twice() -> None:
    """The first Ctrl-C asks the run to stop after its step, the second does not wait for that."""
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("act", "error"), [(fail, ValueError), (interrupt_twice, KeyboardInterrupt)])
def test_what_raises_between_steps_leaves_a_checkpoint_of_the_last_one(
    tmp_path: Path, act: Callable[[], None], error: type[BaseException]
) -> None:
    write_recipe(tmp_path)
    whole = run(tmp_path, "whole")
    with pytest.raises(error):
        run(tmp_path, "run", monitor=AtStep(10, act))
    assert checkpoints(tmp_path / "run")[-1].name == "step-00000010"
    assert bits(run(tmp_path, "run").dir) == bits(whole.dir)


def test_an_update_that_is_cut_off_leaves_the_checkpoint_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(tmp_path)
    whole = run(tmp_path, "whole")
    usual, calls = torch.optim.AdamW.step, []

    def step(self: Any, *args: Any) -> Any:
        calls.append(1)
        usual(self, *args)
        if len(calls) == 11:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "run")
    assert checkpoints(tmp_path / "run")[-1].name == "step-00000009"
    assert bits(run(tmp_path, "run").dir) == bits(whole.dir)


def test_averages_that_are_cut_off_on_their_way_out_of_the_model_are_not_saved_as_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(tmp_path)
    whole = run(tmp_path, "whole", ["run.ema={}"])
    usual, calls = Ema._put_, []

    def put(self: Ema, values: Any) -> None:
        calls.append(1)
        if len(calls) == 2:  # the weights come back after the evaluation of step 7
            raise KeyboardInterrupt
        usual(self, values)

    with monkeypatch.context() as patch:
        patch.setattr(Ema, "_put_", put)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "run", ["run.ema={}"])
    assert checkpoints(tmp_path / "run")[-1].name == "step-00000006"
    assert bits(run(tmp_path, "run", ["run.ema={}"]).dir) == bits(whole.dir)


def test_a_broken_law_is_never_saved(tmp_path: Path) -> None:
    write_recipe(tmp_path)

    class Thief(ToyTask):
        def loss(self, model: Any, batch: Any) -> Any:
            with torch.no_grad():
                model.body[1].weight.add_(1)
            return super().loss(model, batch)

    with pytest.raises(LawBroken):
        run(tmp_path, "run", task=Thief())
    assert not checkpoints(tmp_path / "run")


# --- data that hang ---------------------------------------------------------------------------------------------------


def test_storage_that_is_away_is_waited_for_and_recorded(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    whole = run(tmp_path, "whole")

    class Away(Points):
        tries = 0

        def read(self, id: int, epoch: int) -> Any:
            if (id, epoch) == (9, 1) and self.tries < 2:
                self.tries += 1
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return super().read(id, epoch)

    notes: list[str] = []
    made = run(tmp_path, "run", task=_reading(lambda: Away(50, noisy=True)), monitor=Listening(notes))
    waits = [e["reason"] for e in events(made.dir, "waiting")]
    assert len(waits) == 2
    assert "sample p9" in waits[0]
    assert set(waits) <= set(notes)
    assert bits(made.dir) == bits(whole.dir)


class Listening(AtStep):
    def __init__(self, notes: list[str]) -> None:
        super().__init__(-1)
        self.notes = notes

    def note(self, text: str) -> None:
        self.notes.append(text)


def _reading(points: Callable[[], Points]) -> ToyTask:
    class Reading(ToyTask):
        def samples(self, recipe: Any, model: Any, split: str) -> Points:
            return super().samples(recipe, model, split) if split == "valid" else points()

    return Reading()
