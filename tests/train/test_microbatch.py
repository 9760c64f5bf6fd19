"""Numbers of micro-batches, and the order of sums: pure functions, tried on numbers and words."""

from __future__ import annotations

import math
import operator
import random
from itertools import chain

import pytest
from tests.train.toy import Points

from thawline.data.loader import Loader
from thawline.data.sampler import Batching, BatchPlan, Cursor
from thawline.train.microbatch import (
    ROOT,
    Residues,
    children,
    combine,
    count_for,
    numbered,
    owned,
    planned_steps,
    roots,
    tree_sum,
)


def divisors(count: int) -> list[int]:
    return [world for world in range(1, count + 1) if count % world == 0]


EVERY_WORLD = [(count, world) for count in (1, 2, 3, 6, 7, 8, 12, 16, 30, 36) for world in divisors(count)]


def brackets(left: str, right: str) -> str:
    return f"({left}+{right})"


def test_the_tree_of_a_power_of_two_is_bit_reversed() -> None:
    assert tree_sum(8, ROOT, str, brackets) == "(((0+4)+(2+6))+((1+5)+(3+7)))"


def test_the_tree_of_other_numbers_takes_their_prime_factors_smallest_first() -> None:
    assert tree_sum(6, ROOT, str, brackets) == "(((0+2)+4)+((1+3)+5))"
    assert children(Residues(1, 2), 6) == (Residues(1, 6), Residues(3, 6), Residues(5, 6))


@pytest.mark.parametrize(("count", "world"), EVERY_WORLD)
def test_every_world_makes_the_same_additions(count: int, world: int) -> None:
    parts = {root: tree_sum(count, root, str, brackets) for r in range(world) for root in roots(count, r, world)}
    assert combine(count, parts, brackets) == tree_sum(count, ROOT, str, brackets)


@pytest.mark.parametrize(("count", "world"), EVERY_WORLD)
def test_a_world_of_any_size_sums_floats_to_the_same_bits(count: int, world: int) -> None:
    chance = random.Random(count)
    values = [chance.uniform(-1, 1) * 10 ** chance.randint(-8, 8) for _ in range(count)]
    parts = {
        root: tree_sum(count, root, values.__getitem__, operator.add)
        for r in range(world)
        for root in roots(count, r, world)
    }
    assert combine(count, parts, operator.add) == tree_sum(count, ROOT, values.__getitem__, operator.add)


@pytest.mark.parametrize(("count", "world"), EVERY_WORLD)
def test_ranks_own_every_micro_batch_once_and_the_same_number_each(count: int, world: int) -> None:
    shares = [owned(count, rank, world) for rank in range(world)]
    assert sorted(chain.from_iterable(shares)) == list(range(count))
    assert {len(share) for share in shares} == {count // world}
    for rank, share in enumerate(shares):
        below = [n for root in roots(count, rank, world) for n in range(root.first, count, root.modulus)]
        assert sorted(below) == list(share)


@pytest.mark.parametrize(("count", "world", "sums"), [(8, 4, 1), (12, 4, 1), (12, 2, 1), (12, 6, 2), (12, 3, 4)])
def test_a_rank_sends_one_sum_where_the_factors_allow(count: int, world: int, sums: int) -> None:
    assert {len(roots(count, rank, world)) for rank in range(world)} == {sums}


@pytest.mark.parametrize("count", [1, 2, 4, 8, 64, 12, 30, 7])
def test_at_most_one_sum_a_level_is_alive_beside_the_new_one(count: int) -> None:
    alive: set[int] = set()
    most = 0

    def leaf(number: int) -> int:
        nonlocal most
        alive.add(number)
        most = max(most, len(alive))
        return number

    def add(left: int, right: int) -> int:
        alive.remove(right)
        return left

    tree_sum(count, ROOT, leaf, add)
    assert most <= math.log2(count) + 1


def test_a_micro_batch_that_is_missing_adds_nothing_wherever_it_is_missing() -> None:
    there = {0: "0", 3: "3", 5: "5"}
    whole = tree_sum(6, ROOT, there.get, brackets)
    assert whole == "(0+(3+5))"
    made = {root: tree_sum(6, root, there.get, brackets) for r in range(3) for root in roots(6, r, 3)}
    assert combine(6, {root: s for root, s in made.items() if s is not None}, brackets) == whole


def test_a_world_that_does_not_divide_the_micro_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="3 ranks cannot share 8 micro-batches equally"):
        owned(8, 0, 3)


def test_a_short_batch_leaves_numbers_out_and_the_others_keep_theirs() -> None:
    assert numbered([(1, 2, 3, 4, 5), (6,)], each=2) == {0: (1, 2), 1: (3, 4, 5), 3: (6,)}


@pytest.mark.parametrize("batching", [Batching(size=6), Batching(frames=20)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_worlds_of_1_2_and_4_read_the_same_global_batches(batching: Batching, accumulate: int) -> None:
    plan = BatchPlan(101, seed=3, batching=batching, length=Points(101, noisy=False).length, window=32)
    start = plan.cursor_at(2, 2 * accumulate)

    def global_batches(world: int, fixed: int | None) -> list[tuple[list[int], Cursor]]:
        count = count_for(accumulate=accumulate, world=world, fixed=fixed)
        shares = [planned_steps(plan, start, accumulate, count, rank, world) for rank in range(world)]
        return [
            (sorted(i for rank in step for r in rank.requests.values() for i in r.ids), step[0].next)
            for step in zip(*shares, strict=True)
        ]

    assert global_batches(1, None) == global_batches(2, None) == global_batches(4, None)
    assert global_batches(1, None) == global_batches(1, 8) == global_batches(2, 8) == global_batches(4, 8)


@pytest.mark.parametrize(
    "workers", [0, pytest.param(1, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long)]
)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_micro_batch_holds_the_same_bits_for_every_world_and_number_of_workers(workers: int, world: int) -> None:
    samples = Points(48, noisy=True)
    plan = BatchPlan(48, seed=3, batching=Batching(size=10), length=samples.length)

    def read(world: int, workers: int) -> dict[tuple[int, int], list[object]]:
        found: dict[tuple[int, int], list[object]] = {}
        for rank in range(world):
            steps = list(planned_steps(plan, Cursor(), 1, 4, rank, world))
            asked = [(step, n, request) for step, s in enumerate(steps) for n, request in s.requests.items()]
            with Loader(samples, seed=3, workers=workers) as loader:
                for (step, n, _), loaded in zip(asked, loader.iterate(r for *_, r in asked), strict=True):
                    found[step, n] = [loaded.batch.keys, loaded.batch.x.tolist(), loaded.batch.y.tolist()]
        return found

    assert read(world, workers) == read(1, 0)
