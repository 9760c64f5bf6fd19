"""Which micro-batch is whose, and in which order sums over micro-batches are taken. Decides only; tensors are `step`'s.

A step's global batch is cut into V numbered micro-batches, and rank r of W takes r, r + W, ... A floating-point sum
depends on its order, so the order follows from V alone: a tree whose nodes are residue classes. The root is every
number; the class r mod m consists of the p classes r, r + m, ..., r + (p - 1) m mod pm, where p runs through the prime
factors of V from the smallest. For V a power of two this is the bit-reversed tree of the fast Fourier transform.

Rank r's share is the class r mod W. Where W is a product of the first of those factors (each power of two in V, say)
that is a node, and one sum is all that the rank has to send; otherwise its share is several nodes, at most V / W.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from typing import NamedTuple, TypeVar

from thawline.data.loader import BatchRequest
from thawline.data.sampler import BatchPlan, Cursor

T = TypeVar("T")
Add = Callable[[T, T], T]
"""Adds two sums; may do so in its left argument."""


class Residues(NamedTuple):
    """A node: the micro-batches whose number is `first` modulo `modulus`."""

    first: int
    modulus: int


ROOT = Residues(0, 1)


def count_for(*, accumulate: int, world: int, fixed: int | None) -> int:
    """Micro-batches of a step: those fixed by the recipe, else the fewest that give every rank equally many.

    >>> count_for(accumulate=2, world=4, fixed=None)
    4
    """
    return math.lcm(accumulate, world) if fixed is None else fixed


def edges(rows: int, parts: int) -> list[int]:
    """Where `rows` are cut so that `parts` are as equal as can be: parts + 1 ascending positions.

    >>> edges(8, 3)
    [0, 2, 5, 8]
    """
    return [rows * i // parts for i in range(parts + 1)]


def numbered(batches: Sequence[Sequence[int]], each: int) -> dict[int, tuple[int, ...]]:
    """The sample ids of every micro-batch of a step, by number: each planned batch is cut into `each` stretches.

    A number without samples (a batch of fewer than `each`) is left out; the others keep theirs.

    >>> numbered([(5, 3, 8), (1,)], each=2)
    {0: (5,), 1: (3, 8), 3: (1,)}
    """
    cuts = ((ids, edges(len(ids), each)) for ids in batches)
    stretches = [tuple(ids[at[i] : at[i + 1]]) for ids, at in cuts for i in range(each)]
    return {number: ids for number, ids in enumerate(stretches) if ids}


def owned(count: int, rank: int, world: int) -> range:
    """The numbers of the micro-batches that `rank` of `world` takes. Raises ValueError unless world divides count."""
    if count % world:
        raise ValueError(f"{world} ranks cannot share {count} micro-batches equally")
    return range(rank, count, world)


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """What one rank reads for a step: its micro-batches by number, out of so many planned batches.

    next: the cursor after them
    """

    requests: Mapping[int, BatchRequest]
    batches: int
    next: Cursor


def planned_steps(
    plan: BatchPlan, cursor: Cursor, accumulate: int, count: int, rank: int, world: int
) -> Iterator[PlannedStep]:
    """The steps from `cursor` to the end of its epoch as `rank` of `world` reads them.

    accumulate: planned batches a step; count: micro-batches a step, of which each batch gives the same number
    """
    mine, each = owned(count, rank, world), count // accumulate
    batches = plan.batches(cursor)
    while planned := tuple(islice(batches, accumulate)):
        cursors, ids = zip(*planned, strict=True)
        requests = {
            number: BatchRequest(epoch=cursor.epoch, cursor=cursors[number // each], ids=part)
            for number, part in numbered(ids, each).items()
            if number in mine
        }
        yield PlannedStep(requests, len(planned), plan.next_cursor(cursors[-1]))


def children(node: Residues, count: int) -> tuple[Residues, ...]:
    """The nodes whose sums, in this order, add up to that of `node`; none for a single micro-batch."""
    left = count // node.modulus
    prime = next((p for p in range(2, left + 1) if left % p == 0), 1)
    if prime == 1:
        return ()
    return tuple(Residues(node.first + k * node.modulus, node.modulus * prime) for k in range(prime))


def roots(count: int, rank: int, world: int, *, at: Residues = ROOT) -> tuple[Residues, ...]:
    """The largest nodes below `at` of which `rank` owns every micro-batch: what it sums by itself and sends.

    >>> roots(8, 1, 4), roots(6, 0, 3)
    ((Residues(first=1, modulus=4),), (Residues(first=0, modulus=6), Residues(first=3, modulus=6)))
    """
    if at.modulus % world == 0:
        return (at,) if at.first % world == rank else ()
    return tuple(root for child in children(at, count) for root in roots(count, rank, world, at=child))


def tree_sum(count: int, node: Residues, leaf: Callable[[int], T | None], add: Add[T]) -> T | None:
    """The sum over the micro-batches of `node`, depth first: besides the one that `leaf` makes, at most one sum a level
    is alive (log2(count) for a power of two). A leaf of None adds nothing."""
    below = children(node, count)
    if not below:
        return leaf(node.first)
    return _total((tree_sum(count, child, leaf, add) for child in below), add)


def combine(count: int, parts: Mapping[Residues, T], add: Add[T], *, at: Residues = ROOT) -> T | None:
    """The sum over all micro-batches, from the ranks' own sums of their `roots`: the same additions as in one rank."""
    if at in parts:
        return parts[at]
    return _total((combine(count, parts, add, at=child) for child in children(at, count)), add)


def _total(sums: Iterable[T | None], add: Add[T]) -> T | None:
    there = (s for s in sums if s is not None)
    first = next(there, None)
    return None if first is None else reduce(add, there, first)
