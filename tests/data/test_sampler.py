"""Batches as pure functions of (seed, epoch, position)."""

from __future__ import annotations

import math
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from thawline.data.sampler import Batching, BatchPlan, Cursor, Permutation
from thawline.errors import DataError


def length_of(i: int) -> float:
    return 20.0 + (i * 7919) % 977


batchings = st.one_of(
    st.builds(Batching, size=st.integers(1, 9), sort=st.booleans()),
    st.builds(Batching, frames=st.integers(1, 5000), sort=st.booleans()),
    st.builds(
        Batching,
        bucket_boundaries=st.just((200, 500)),
        bucket_sizes=st.tuples(*[st.integers(1, 9)] * 3),
        sort=st.booleans(),
    ),
)
plans = st.builds(
    lambda n, seed, batching, shuffle, window: BatchPlan(
        n, seed=seed, batching=batching, length=length_of, shuffle=shuffle, window=window
    ),
    st.integers(1, 300),
    st.integers(0, 2**63 - 1),
    batchings,
    st.booleans(),
    st.integers(1, 100),
)


@settings(deadline=None)
@given(st.integers(1, 4000), st.integers(0, 2**63 - 1))
def test_the_permutation_reaches_every_index_exactly_once(n: int, key: int):
    image = Permutation(n, key=key)(range(n))
    assert np.array_equal(np.sort(image), np.arange(n))


def test_the_permutation_of_an_index_does_not_depend_on_what_is_asked_with_it():
    permutation = Permutation(100_003, key=5)
    whole = permutation(range(100_003))
    assert [int(permutation([i])[0]) for i in (0, 1, 77_777, 100_002)] == whole[[0, 1, 77_777, 100_002]].tolist()


def test_the_permutation_is_pinned_so_that_old_runs_go_on_in_their_own_order():
    assert Permutation(10, key=7)(range(10)).tolist() == [5, 8, 7, 6, 3, 9, 0, 1, 2, 4]
    assert Permutation(10**12, key=7)([0, 1, 10**12 - 1]).tolist() == [
        267668104309,
        620970113779,
        13043604629,
    ]


def test_every_id_lands_everywhere_equally_often():
    n, keys = 12, 6000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), Permutation(n, key=key)(range(n))] += 1
    chi2 = float(((counts - keys / n) ** 2 / (keys / n)).sum())
    # 121 degrees of freedom: mean 121, standard deviation 15.6; five deviations never fail by chance on fixed keys.
    assert chi2 < 121 + 5 * math.sqrt(2 * 121)


def test_neighbours_do_not_stay_neighbours():
    image = Permutation(10_000, key=3)(range(10_000))
    steps = np.abs(np.diff(image))
    assert np.mean(steps < 100) < 0.03  # uniform: 0.02
    assert abs(float(np.corrcoef(image, np.arange(10_000))[0, 1])) < 0.05


@settings(deadline=None)
@given(plans, st.integers(0, 5))
def test_every_id_is_read_exactly_once_per_epoch(plan: BatchPlan, epoch: int):
    ids = Counter(i for _, batch in plan.batches(Cursor(epoch)) for i in batch)
    assert ids == Counter(range(plan.n))


@settings(deadline=None)
@given(plans, st.integers(0, 3), st.data())
def test_from_any_cursor_the_rest_of_the_epoch_is_the_tail_of_the_whole(
    plan: BatchPlan, epoch: int, data: st.DataObject
):
    whole = list(plan.batches(Cursor(epoch)))
    k = data.draw(st.integers(0, len(whole) - 1))
    cursor, ids = whole[k]
    fresh = BatchPlan(
        plan.n,
        seed=plan.seed,
        batching=plan.batching,
        length=length_of,
        shuffle=plan.shuffle,
        window=plan.window,
    )
    assert list(fresh.batches(cursor)) == whole[k:]
    assert fresh.batch(cursor) == ids
    assert fresh.cursor_at(epoch, k) == cursor
    assert fresh.index_of(cursor) == k
    assert fresh.next_cursor(cursor) == (whole[k + 1][0] if k + 1 < len(whole) else Cursor(epoch + 1))


@settings(deadline=None)
@given(plans, st.integers(0, 3))
def test_the_number_of_batches_is_what_iteration_yields(plan: BatchPlan, epoch: int):
    total = plan.batches_in_epoch(epoch)
    assert total == sum(1 for _ in plan.batches(Cursor(epoch)))
    assert plan.cursor_at(epoch, total) == Cursor(epoch + 1)


@settings(deadline=None)
@given(plans)
def test_the_bounds_on_a_batch_are_kept(plan: BatchPlan):
    for _, batch in plan.batches(Cursor()):
        longest = max(map(length_of, batch))
        batching = plan.batching
        if batching.frames is not None:
            assert len(batch) == 1 or longest * len(batch) <= batching.frames
        elif batching.bucket_boundaries:
            buckets = {int(np.searchsorted((200, 500), length_of(i), side="right")) for i in batch}
            assert len(buckets) == 1
            assert len(batch) <= batching.bucket_sizes[buckets.pop()]
        else:
            assert len(batch) <= (batching.static_size or 0)


def test_a_single_sample_over_the_bound_makes_its_own_batch():
    plan = BatchPlan(5, seed=1, batching=Batching(frames=100), length=[30, 30, 1000, 30, 40], window=8)
    assert sorted(map(sorted, (b for _, b in plan.batches(Cursor())))) == [[0, 1, 3], [2], [4]]


@pytest.mark.parametrize("batching", [Batching(size=4), Batching(frames=3000)])
def test_epochs_and_seeds_have_their_own_order(batching: Batching):
    def order(seed: int, epoch: int) -> list[tuple[int, ...]]:
        plan = BatchPlan(200, seed=seed, batching=batching, length=length_of, window=64)
        return [b for _, b in plan.batches(Cursor(epoch))]

    orders = [order(1, 0), order(1, 1), order(2, 0), order(1, 2)]
    assert all(a != b for k, a in enumerate(orders) for b in orders[:k])
    assert order(1, 1) == orders[1]


def test_without_shuffle_the_manifest_order_is_kept_even_where_sorting_is_on():
    plan = BatchPlan(20, seed=1, batching=Batching(size=6), length=length_of, shuffle=False, window=8)
    assert [i for _, b in plan.batches(Cursor(3)) for i in b] == list(range(20))
    assert [len(b) for _, b in plan.batches(Cursor())] == [6, 6, 6, 2]


def test_sorting_makes_batches_of_similar_length():
    def padding(sort: bool) -> float:
        plan = BatchPlan(4096, seed=1, batching=Batching(size=16, sort=sort), length=length_of)
        batches = [[length_of(i) for i in b] for _, b in plan.batches(Cursor())]
        return sum(max(b) * len(b) for b in batches) / sum(map(sum, batches))

    assert padding(True) < 1.02 < 1.5 < padding(False)


def test_static_batches_are_full_but_for_one_whatever_the_window():
    plan = BatchPlan(1003, seed=1, batching=Batching(size=16), length=length_of, window=100)
    sizes = Counter(len(b) for _, b in plan.batches(Cursor()))
    assert sizes == {16: 62, 11: 1}


def test_a_length_column_and_a_length_function_give_the_same_plan():
    column = np.array([length_of(i) for i in range(500)], dtype=np.float32)
    makers: list[Callable[[int], float] | np.ndarray | list[float]] = [
        length_of,
        column,
        column.tolist(),
    ]
    orders = [list(BatchPlan(500, seed=3, batching=Batching(frames=4000), length=m).batches(Cursor())) for m in makers]
    assert orders[0] == orders[1] == orders[2]


def test_a_position_of_another_plan_is_refused():
    plan = BatchPlan(20, seed=1, batching=Batching(size=4), length=None)
    with pytest.raises(DataError, match="outside this plan of 20 samples"):
        plan.batch(Cursor(0, 3, 0))
    with pytest.raises(DataError, match="there is no batch 9"):
        plan.cursor_at(0, 9)


def test_no_samples_is_an_error():
    with pytest.raises(DataError, match="no samples"):
        BatchPlan(0, seed=1, batching=Batching(size=4), length=None)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"size": 4, "frames": 100}, "not several"),
        ({"bucket_boundaries": (10, 5), "bucket_sizes": (1, 1, 1)}, "must ascend"),
        ({"bucket_boundaries": (5, 10), "bucket_sizes": (1, 1)}, "need 3 bucket_sizes"),
        ({"bucket_sizes": (1, 1)}, "needs bucket_boundaries"),
        ({"size": 0}, "greater than or equal to 1"),
    ],
)
def test_contradictory_batch_settings_are_refused(settings_: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=message):
        Batching.model_validate(settings_)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**8 // 8 - 1))
def test_any_position_of_a_hundred_million_samples_is_reached_at_once(index: int):
    plan = BatchPlan(10**8, seed=7, batching=Batching(size=8), length=length_of)
    begin = time.process_time()
    cursor = plan.cursor_at(2, index)
    ids = plan.batch(cursor)
    assert time.process_time() - begin < 0.5  # about 5 ms here
    assert len(set(ids)) == 8
    assert plan.index_of(cursor) == index


def test_memory_does_not_grow_with_the_number_of_samples():
    tracemalloc.start()
    plan = BatchPlan(10**8, seed=7, batching=Batching(frames=12000), length=length_of)
    for window in (0, 12_345, plan.windows - 1):
        assert len(list(islice(plan.batches(Cursor(0, window, 3)), 500))) > 5
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


def test_planning_an_epoch_of_a_hundred_thousand_takes_well_under_a_second():
    lengths = [length_of(i) for i in range(100_000)]
    best = math.inf
    for epoch in range(3):
        plan = BatchPlan(100_000, seed=7, batching=Batching(frames=12000), length=lengths.__getitem__)
        begin = time.process_time()
        assert sum(len(b) for _, b in plan.batches(Cursor(epoch))) == 100_000
        best = min(best, time.process_time() - begin)
    assert best < 0.8


def test_the_module_does_not_import_torch_or_numpy():
    code = "import sys, thawline.data.sampler\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
