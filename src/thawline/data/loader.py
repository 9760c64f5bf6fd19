"""Requests for batches in, batches out, in order; in this process or in workers, with the same bits.

The loader keeps no position: a request names its samples, and a worker is a function of the request. So the number of
workers, how far they read ahead, how they are started and which of them dies change nothing. Reading in this process
puts the states of the global generators back afterwards.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from typing import Generic, Literal, TypeVar

from thawline.data.loader_worker import BatchRequest, Job, Worker, dismiss
from thawline.data.sample_reading import BadSample, SampleReader, Tell, name_of, own_generators, read_batch
from thawline.errors import DataError

__all__ = ["BadSample", "BatchRequest", "LoadedBatch", "Loader", "SampleReader"]

Sample = TypeVar("Sample")
Batch = TypeVar("Batch")
StartMethod = Literal["forkserver", "spawn", "fork"]

MAX_DEATHS = 3
"""So many workers may die over one batch before it is given up: then it is the batch and not the machine."""


@dataclass(frozen=True, slots=True)
class LoadedBatch(Generic[Batch]):
    """What a request gave; `batch` is None where every sample was bad."""

    request: BatchRequest
    batch: Batch | None
    bad: tuple[BadSample, ...] = ()


class Loader(Generic[Sample, Batch]):
    """Reads batches, ahead of need where there are workers.

    samples:  what is read; with workers it is pickled once to each
    seed:     the run's seed
    workers:  processes; 0 reads in this one, when a batch is asked for
    prefetch: batches per worker that are read ahead
    start:    how workers start; None is forkserver, or spawn where there is none
    stall_s:  after so many seconds without a batch, `tell` is called, and again at doubling intervals
    tell:     where messages go (a stall, a worker that died); None is standard error

    Close it, or use it as a context manager; one that is forgotten is closed by garbage collection.
    """

    def __init__(
        self,
        samples: SampleReader[Sample, Batch],
        *,
        seed: int,
        workers: int = 0,
        prefetch: int = 2,
        start: StartMethod | None = None,
        stall_s: float = 60.0,
        tell: Tell | None = None,
    ) -> None:
        if workers < 0 or prefetch < 1:
            raise ValueError(f"{workers} workers reading {prefetch} batches ahead")
        self._samples = samples
        self._seed = seed
        self._workers = workers
        self._prefetch = prefetch
        self._stall_s = stall_s
        self._tell = tell or _to_stderr
        methods = multiprocessing.get_all_start_methods()
        self._start: str = start or ("forkserver" if "forkserver" in methods else "spawn")
        self._team: list[Worker] = []
        self._jobs = 0
        self._close = weakref.finalize(self, dismiss, self._team, os.getpid())

    def __enter__(self) -> Loader[Sample, Batch]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. The loader may be used again: they are started anew."""
        dismiss(self._team, os.getpid())

    def iterate(self, requests: Iterable[BatchRequest]) -> Iterator[LoadedBatch[Batch]]:
        """The batch of each request, in order. `requests` is drawn only as far as is read ahead, and may be endless.

        May be left at any point; what was read ahead is then forgotten. An exception in `read` or `collate` that is no
        DataError is raised here, in its batch's turn. Raises DataError for a batch over which workers keep dying.
        """
        if self._workers == 0:
            return self._iterate_here(requests)
        return self._iterate_workers(requests)

    def _iterate_here(self, requests: Iterable[BatchRequest]) -> Iterator[LoadedBatch[Batch]]:
        for request in requests:
            with _Watch(self._stall_s, partial(self._tell_late, request)), own_generators():
                batch, bad = read_batch(self._samples, self._seed, request.epoch, request.ids, self._tell)
            yield LoadedBatch(request, batch, bad)

    def _tell_late(self, request: BatchRequest, seconds: float) -> None:
        self._tell(_waiting(request, seconds))

    def _iterate_workers(self, requests: Iterable[BatchRequest]) -> Iterator[LoadedBatch[Batch]]:
        source = iter(requests)
        waiting: deque[Job] = deque()
        more = True
        try:
            while more or waiting:
                while more and len(waiting) < self._workers * self._prefetch:
                    request = next(source, None)
                    if request is None:
                        more = False
                        break
                    waiting.append(self._give(request))
                if not waiting:
                    return
                self._await(waiting[0])
                job = waiting.popleft()
                if job.error is not None:
                    raise job.error
                yield LoadedBatch(job.request, job.batch, job.bad)
        finally:
            for job in waiting:
                job.wanted = False  # their workers finish them; the results are thrown away

    # --- workers

    def _give(self, request: BatchRequest) -> Job:
        self._jobs += 1
        job = Job(self._jobs, request)
        while len(self._team) < self._workers:
            self._team.append(self._hire())
        min(self._team, key=lambda w: len(w.jobs)).give(job)
        return job

    def _hire(self) -> Worker:
        return Worker(self._samples, self._seed, self._start)

    def _await(self, job: Job) -> None:
        """Receive until `job` is done, whatever arrives meanwhile."""
        begin = time.monotonic()
        patience = self._stall_s
        while not job.done:
            by_pipe = {w.pipe: w for w in self._team}
            left = patience - (time.monotonic() - begin)
            ready = connection.wait(list(by_pipe), timeout=max(0.0, left))
            for pipe in ready:
                worker = by_pipe[pipe]
                try:
                    worker.receive(self._tell)
                except (EOFError, OSError):
                    self._replace(worker)
            if not ready and time.monotonic() - begin >= patience:
                self._tell_late(job.request, time.monotonic() - begin)
                patience *= 2

    def _replace(self, worker: Worker) -> None:
        """Start a worker in the place of a dead one, and let it read again what that one had not finished."""
        cause = worker.cause_of_death()
        jobs = [job for job in worker.jobs if job.wanted]
        self._team.remove(worker)
        worker.dismiss()
        if jobs:
            first = jobs[0]
            first.deaths += 1
            if first.deaths >= MAX_DEATHS:
                jobs.pop(0)
                first.done = True
                first.error = DataError(
                    f"{MAX_DEATHS} loader workers in a row died over one batch; the last {cause}",
                    where=f"samples {', '.join(name_of(self._samples, i) for i in first.request.ids[:8])}",
                    fix="signal 9 is often the system out of memory: fewer workers, or smaller batches; "
                    "otherwise read this batch with workers=0 to see what happens",
                )
            else:
                self._tell(f"a loader worker {cause}; its batch {first.request.cursor} is read again")
        successor = self._hire()
        successor.cautious = True
        self._team.append(successor)
        for job in jobs:
            successor.give(job)


def _to_stderr(message: str) -> None:
    print(f"thawline: {message}", file=sys.stderr, flush=True)


def _waiting(request: BatchRequest, seconds: float) -> str:
    return (
        f"waiting for data for {seconds:.0f} s ({request.cursor}, {len(request.ids)} samples): "
        "storage is slow or away, or a sample takes long; the run goes on when it comes"
    )


class _Watch:
    """Calls `late(seconds)` after `after_s`, then at doubling intervals, until left."""

    def __init__(self, after_s: float, late: Callable[[float], None]) -> None:
        self._after_s, self._late = after_s, late

    def __enter__(self) -> None:
        self._over = threading.Event()
        threading.Thread(target=self._run, daemon=True, name="thawline-stall").start()

    def _run(self) -> None:
        waited, pause = 0.0, self._after_s
        while not self._over.wait(pause):
            waited += pause
            self._late(waited)
            pause = waited

    def __exit__(self, *exc: object) -> None:
        self._over.set()
