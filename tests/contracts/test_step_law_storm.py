"""The step law by force: killed at random moments, a run ends with the bytes of one that was left alone.

The moments are drawn from a seed: after so many seconds, after so many steps, after so many system calls of a save. The
short storms belong to the suite; `make storm` runs the long ones (THAWLINE_STORM_KILLS of them a case).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.contracts.storm import Nursery, Weather, storm
from tests.contracts.storm_cases import CASES, write_case


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    pytest.importorskip("transformers")
    with Nursery() as made:
        yield made


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_a_run_killed_seven_times_ends_with_the_bytes_of_one_left_alone(
    case: str, nursery: Nursery, tmp_path: Path
) -> None:
    folder = write_case(case, tmp_path / case)
    tally = storm(folder, nursery, Weather(kills=7, seed=1, afresh_every=5, workers_every=4))
    assert tally.kills.total() == 7
    assert tally.afresh >= 1
    assert tally.with_workers >= 1


@pytest.mark.storm
@pytest.mark.parametrize("case", CASES)
def test_a_storm(case: str, nursery: Nursery, tmp_path: Path) -> None:
    kills = int(os.environ.get("THAWLINE_STORM_KILLS", "200"))
    folder = write_case(case, tmp_path / case)
    tally = storm(folder, nursery, Weather(kills=kills, seed=2, afresh_every=20, workers_every=6))
    print(f"\n{case}: {tally}")
    assert tally.kills.total() == kills
    assert tally.in_saves > kills // 10
