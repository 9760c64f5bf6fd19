"""Any batch of a corpus of any size is reached at once, with little memory, and is the one that is met on the way.

The time it takes is in benchmarks/results/position.md.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.bench_position import SEED, Rows

from thawline.data.loader import BatchRequest, Loader
from thawline.data.sampler import BatchPlan, Cursor

REPOSITORY = Path(__file__).resolve().parents[2]
ROWS = 100_000_000


def batches_at(batching: str, workers: int, cursors: list[Cursor]) -> dict[str, Any]:
    """What a fresh interpreter finds at these positions, and the memory that it needed."""
    program = [sys.executable, "benchmarks/bench_position.py", "first", str(ROWS), batching, str(workers)]
    places = [f"{c.epoch},{c.window},{c.batch}" for c in cursors]
    done = subprocess.run([*program, *places], check=True, capture_output=True, text=True, cwd=REPOSITORY)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def walked(plan: BatchPlan, dice: random.Random) -> list[tuple[Cursor, tuple[int, ...]]]:
    """Two neighbouring windows somewhere, gone through from the start of the first."""
    epoch, window = dice.randrange(1000), dice.randrange(plan.windows - 1)
    walk = []
    for cursor, ids in plan.batches(Cursor(epoch, window, 0)):
        if cursor.window > window + 1:
            break
        walk.append((cursor, ids))
    return walk


@pytest.mark.parametrize(("batching", "workers"), [("size", 0), ("frames", 0), ("frames", 2)])
def test_the_first_batch_at_a_random_place_among_100_million_rows_is_the_one_met_on_the_way(
    batching: str, workers: int
) -> None:
    dice = random.Random(f"{batching} {workers}")
    rows = Rows(ROWS)
    met: list[tuple[Cursor, tuple[int, ...]]] = []
    for _ in range(3):
        met += dice.sample(walked(rows.plan(batching), dice), 3)
    with Loader(rows, seed=SEED) as loader:
        requests = [BatchRequest(epoch=cursor.epoch, cursor=cursor, ids=ids) for cursor, ids in met]
        expected = [[[id, draws] for id, draws in loaded.batch] for loaded in loader.iterate(requests)]
    found = batches_at(batching, workers, [cursor for cursor, _ in met])
    assert found["batches"] == expected
    assert found["memory_mb"] < 300


def test_positions_follow_from_the_number_of_a_batch_wherever_it_lies() -> None:
    plan = Rows(ROWS).plan("size")
    for epoch in (0, 1, 999_983):
        for index in (0, 1, 100_000, ROWS // 8 - 2):
            here, following = (plan.cursor_at(epoch, i) for i in (index, index + 1))
            assert plan.next_cursor(here) == following
            assert plan.index_of(here) == index
    assert len({plan.cursor_at(0, index) for index in range(1000)}) == 1000
