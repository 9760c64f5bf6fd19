"""Reading the samples of one batch, in whatever process: each a function of (seed, epoch, id) and nothing else.

Each read is preceded by seeding the global generators (random, numpy, torch on the CPU) from (seed, "sample", epoch,
id), which covers user code that draws from them. A read waits for storage that is away; a sample that cannot be used is
left out and named.
"""

from __future__ import annotations

import errno
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from thawline.core.rng import derive
from thawline.errors import DataError

Sample = TypeVar("Sample")
Read = TypeVar("Read", covariant=True)
Tell = Callable[[str], None]

_AWAY = frozenset(
    getattr(errno, n)
    for n in ("ESTALE", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENOTCONN", "ECONNRESET",
              "ECONNREFUSED", "ECONNABORTED", "EREMOTEIO", "EAGAIN", "EINTR", "ENOLINK")
    if hasattr(errno, n)
)  # fmt: skip
_GONE = frozenset((errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG))
_EIO_TRIES = 5  # a bad block stays bad; a controller that was reset comes back
_MAX_PAUSE_S = 30.0


class SampleReader(Protocol[Sample, Read]):
    """What can be read. `read` is a pure function of (id, epoch) and the global generators seeded for it.

    Raises DataError for a sample that cannot be used. A method `key(id) -> str` may name samples in reports.
    """

    def read(self, id: int, epoch: int) -> Sample: ...
    def collate(self, samples: list[Sample]) -> Read: ...


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that was left out of its batch, and why."""

    id: int
    key: str
    reason: str


def name_of(samples: Any, id: int) -> str:
    """What a sample is called in reports."""
    key = getattr(samples, "key", None)
    return str(key(id)) if callable(key) else str(id)


def seed_sample(seed: int, epoch: int, id: int) -> None:
    """Seed the global generators for one read. Torch's only where torch is loaded, and only the one of the CPU.

    About 20 microseconds (numpy's and torch's Mersenne twisters are the larger part).
    """
    key = derive(seed, "sample", epoch, id)
    random.seed(key)
    np.random.seed(key & 0xFFFF_FFFF)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.manual_seed(key)


def read_batch(
    samples: SampleReader[Any, Any], seed: int, epoch: int, ids: Sequence[int], tell: Tell
) -> tuple[Any, tuple[BadSample, ...]]:
    """The collated batch, None where every sample is bad, and the bad samples. `tell` hears of waits for storage."""
    good: list[Any] = []
    bad: list[BadSample] = []
    for id in ids:
        try:
            good.append(_read(samples, seed, epoch, id, tell))
        except DataError as error:
            bad.append(BadSample(id, name_of(samples, id), str(error)))
    if not good:
        return None, tuple(bad)
    # Collating may draw too (mixing, for one); it is keyed by the batch's first sample.
    seed_sample(seed, epoch, -1 - ids[0])
    return samples.collate(good), tuple(bad)


def _read(samples: SampleReader[Any, Any], seed: int, epoch: int, id: int, tell: Tell) -> Any:
    """One sample. Waits for storage that is away; raises DataError for a sample that is."""
    tries, pause_s, begin = 0, 0.1, time.monotonic()
    while True:
        had_torch = "torch" in sys.modules
        seed_sample(seed, epoch, id)
        try:
            sample = samples.read(id, epoch)
        except OSError as exc:
            tries += 1
            where = f"sample {name_of(samples, id)}"
            if exc.errno in _GONE or (exc.errno == errno.EIO and tries >= _EIO_TRIES):
                raise DataError(f"cannot be read: {exc}", where=where) from exc
            if exc.errno not in _AWAY and exc.errno != errno.EIO:
                raise
            tell(f"waiting for storage for {time.monotonic() - begin:.0f} s: {exc} ({where})")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)
            continue
        if not had_torch and "torch" in sys.modules:
            continue  # this read loaded torch, whose generator was not yet seeded: once more, as every later read is
        return sample


@contextmanager
def own_generators() -> Iterator[None]:
    """Leave the global generators of this process, and torch's number of threads, as they were.

    One thread, because a sum over two may differ in its last bit from the same in a worker, which has one.
    """
    torch = sys.modules.get("torch")
    states = random.getstate(), np.random.get_state(), torch.get_rng_state() if torch else None
    threads = torch.get_num_threads() if torch else 1
    if torch and threads != 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        if torch:
            torch.set_rng_state(states[2])
            if threads != 1:
                torch.set_num_threads(threads)
