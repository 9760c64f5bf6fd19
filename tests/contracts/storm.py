"""The crash storm, from the outside: a run is killed at moment after moment until it is done, and compared.

Every comparison is of bytes: the exported model, the whole newest checkpoint (weights, optimizer, averages, counters)
and the metric log.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

from tests.contracts.storm_life import Life, Moment

from thawline.train.rundir import read_rows

REPOSITORY = Path(__file__).resolve().parents[2]
_PROGRAM = [sys.executable, "-m", "tests.contracts.storm_life"]
_ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


class Nursery:
    """A process that has imported everything, from which lives are forked; see `storm_life`."""

    def __enter__(self) -> Nursery:
        self._process = subprocess.Popen(
            [*_PROGRAM, "nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=_ENVIRONMENT,
        )
        assert self._answer() == "ready"
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._process.communicate()

    def live(self, life: Life) -> int:
        """How a life ended: its exit code, or minus the signal."""
        assert self._process.stdin is not None
        self._process.stdin.write(life.to_json() + "\n")
        self._process.stdin.flush()
        return int(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def live_afresh(life: Life) -> int:
    """The same in a new interpreter."""
    process = subprocess.Popen([*_PROGRAM, life.to_json()], cwd=REPOSITORY, env=_ENVIRONMENT)
    moment = life.moment
    try:
        return process.wait(moment.at if moment is not None and moment.kind == "clock" else None)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


@dataclass(slots=True)
class Tally:
    """What a storm did.

    kills: by kind of moment; in_saves: those that left a half-written checkpoint behind; afresh: lives in interpreters
    of their own; steps: after how many recorded steps the kills fell
    """

    kills: Counter[str] = field(default_factory=Counter)
    in_saves: int = 0
    afresh: int = 0
    with_workers: int = 0
    runs: int = 0
    steps: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} by {kind}" for kind, count in sorted(self.kills.items()))
        return (
            f"{self.kills.total()} kills ({kinds}) over {self.runs} runs, {self.in_saves} inside a save, "
            f"after {len(set(self.steps))} different steps; {self.afresh} lives in fresh interpreters, "
            f"{self.with_workers} with 2 workers"
        )


@dataclass(frozen=True, slots=True)
class Weather:
    """How a storm is: how many kills, the seed of its moments, and every how many lives one is born in a fresh
    interpreter, or reads with two workers."""

    kills: int
    seed: int
    afresh_every: int
    workers_every: int


def storm(folder: Path, nursery: Nursery, weather: Weather) -> Tally:
    """Kill the run of `folder/recipe.yaml` again and again; whole runs are compared until there were enough kills.

    AssertionError names the files that differ from the run that was never disturbed.
    """
    whole = Life(recipe=str(folder / "recipe.yaml"), run=str(folder / "whole"), log=str(folder / "log"))
    began = time.monotonic()
    _expect(nursery.live(whole), 0, whole)
    seconds = time.monotonic() - began
    steps = _recorded(Path(whole.run))
    dice, tally = random.Random(weather.seed), Tally()
    number = 0
    while tally.kills.total() < weather.kills:
        cut = replace(whole, run=str(folder / f"cut{tally.runs}"))
        code = -9
        while code != 0:
            number += 1
            enough = tally.kills.total() >= weather.kills
            moment = None if enough else _moment(dice, seconds, steps)
            workers = 2 if number % weather.workers_every == 0 else 0
            life = replace(cut, overrides=(f"run.workers={workers}",), moment=moment)
            afresh = number % weather.afresh_every == 0
            before = _half_written(Path(cut.run))
            code = live_afresh(life) if afresh else nursery.live(life)
            tally.afresh += afresh
            tally.with_workers += workers > 0
            if code == -9:
                assert moment is not None
                tally.kills[moment.kind] += 1
                tally.in_saves += not _half_written(Path(cut.run)) <= before
                tally.steps.append(_recorded(Path(cut.run)))
            else:
                _expect(code, 0, life)
        tally.runs += 1
        _compare(Path(whole.run), Path(cut.run))
    return tally


def bits(run: Path) -> dict[str, str]:
    """Digest of everything that must not depend on what happened on the way; of state.json the counters, since it also
    records settings that may differ from life to life (the number of workers)."""
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    files = [run / "metrics.jsonl", *(run / "model").iterdir(), *newest.glob("*.safetensors")]
    found = {str(f.relative_to(newest if f.parent == newest else run)): _digest(f) for f in files}
    return found | {"counters": json.dumps(json.loads((newest / "state.json").read_text())["run"])}


def _compare(whole: Path, cut: Path) -> None:
    one, other = bits(whole), bits(cut)
    differing = sorted(name for name in one | other if one.get(name) != other.get(name))
    assert not differing, f"{cut} ends otherwise than {whole}: {differing}"
    grades = {row["grade"] for row in read_rows(cut / "events.jsonl") if row["event"] == "resumed"}
    assert grades <= {"EXACT"}, grades


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _moment(dice: random.Random, seconds: float, steps: int) -> Moment:
    kind = dice.choice(("clock", "step", "call"))
    if kind == "clock":
        return Moment("clock", dice.uniform(0.0, 0.4 * seconds))
    if kind == "step":
        return Moment("step", dice.randint(1, max(1, steps // 4)), dice.uniform(0.0, 2 * seconds / steps))
    return Moment("call", dice.randint(1, 90))


def _half_written(run: Path) -> set[str]:
    """Checkpoints that a dead process left unfinished; the next save clears them away."""
    return {path.name for path in (run / "checkpoints").glob(".step-*.tmp-*")}


def _recorded(run: Path) -> int:
    return len([row for row in read_rows(run / "metrics.jsonl") if "loss" in row])


def _expect(code: int, wanted: int, life: Life) -> None:
    said = Path(life.log).read_text()[-3000:] if Path(life.log).exists() else ""
    assert code == wanted, f"a life ended with {code}: {life}\n{said}"
