"""Requests for batches in, batches out, in order; in this process or in workers, with the same bits.

The loader keeps no position: a request names its samples, and a worker is a function of the request. So the number of
workers, how far they read ahead, how they are started and which of them dies change nothing. Each read is preceded by
seeding the global generators (random, numpy, torch on the CPU) from (seed, "sample", epoch, id), which covers user code
that draws from them; reading in this process puts their states back afterwards.

Workers are started by a fork server where there is one: a plain fork copies locks and OpenMP pools in whatever state
the threads of a training process left them, and hangs now and then. A worker ignores the signals that stop a run; it
ends when its pipe closes, that is when the loader is closed or forgotten or the parent is gone, however that died.
"""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import pickle
import queue
import random
import signal
import sys
import threading
import time
import traceback
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import connection
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np

from thawline.core.rng import derive
from thawline.data.sampler import Cursor
from thawline.errors import DataError

Sample = TypeVar("Sample")
Batch = TypeVar("Batch")
Read = TypeVar("Read", covariant=True)
StartMethod = Literal["forkserver", "spawn", "fork"]
Tell = Callable[[str], None]

MAX_DEATHS = 3
"""So many workers may die over one batch before it is given up: then it is the batch and not the machine."""

_STOP_SIGNALS = [
    getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, n)
]
_AWAY = frozenset(
    getattr(errno, n)
    for n in ("ESTALE", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENOTCONN", "ECONNRESET",
              "ECONNREFUSED", "ECONNABORTED", "EREMOTEIO", "EAGAIN", "EINTR", "ENOLINK")
    if hasattr(errno, n)
)  # fmt: skip
_GONE = frozenset((errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG))
_EIO_TRIES = 5  # a bad block stays bad; a controller that was reset comes back
_MAX_PAUSE_S = 30.0
_PIPE_BYTES = 32_768  # requests on their way to a busy worker; below what any pipe holds, so a send never blocks


class SampleReader(Protocol[Sample, Read]):
    """What can be read. `read` is a pure function of (id, epoch) and the global generators seeded for it.

    Raises DataError for a sample that cannot be used. A method `key(id) -> str` may name samples in reports.
    """

    def read(self, id: int, epoch: int) -> Sample: ...
    def collate(self, samples: list[Sample]) -> Read: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequest:
    """Which samples make the batch at `cursor`, and the epoch that keys their augmentation."""

    epoch: int
    cursor: Cursor
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that was left out of its batch, and why."""

    id: int
    key: str
    reason: str


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
        self._team: list[_Worker] = []
        self._jobs = 0
        self._close = weakref.finalize(self, _dismiss, self._team, os.getpid())

    def __enter__(self) -> Loader[Sample, Batch]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers. The loader may be used again: they are started anew."""
        _dismiss(self._team, os.getpid())

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
            with _Watch(self._stall_s, partial(self._tell_late, request)), _own_generators():
                batch, bad = _load(self._samples, self._seed, request.epoch, request.ids, self._tell)
            yield LoadedBatch(request, batch, bad)

    def _tell_late(self, request: BatchRequest, seconds: float) -> None:
        self._tell(_waiting(request, seconds))

    def _iterate_workers(self, requests: Iterable[BatchRequest]) -> Iterator[LoadedBatch[Batch]]:
        source = iter(requests)
        waiting: deque[_Job] = deque()
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

    def _give(self, request: BatchRequest) -> _Job:
        self._jobs += 1
        job = _Job(self._jobs, request)
        while len(self._team) < self._workers:
            self._team.append(self._hire())
        min(self._team, key=lambda w: len(w.jobs)).give(job)
        return job

    def _hire(self) -> _Worker:
        return _Worker(self._samples, self._seed, self._start)

    def _await(self, job: _Job) -> None:
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

    def _replace(self, worker: _Worker) -> None:
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
                    where=f"samples {', '.join(_name(self._samples, i) for i in first.request.ids[:8])}",
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


def _name(samples: Any, id: int) -> str:
    key = getattr(samples, "key", None)
    return str(key(id)) if callable(key) else str(id)


# --- reading, in whatever process -------------------------------------------------------------------------------------


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


def _load(
    samples: SampleReader[Any, Any], seed: int, epoch: int, ids: Sequence[int], tell: Tell
) -> tuple[Any, tuple[BadSample, ...]]:
    good: list[Any] = []
    bad: list[BadSample] = []
    for id in ids:
        try:
            good.append(_read(samples, seed, epoch, id, tell))
        except DataError as error:
            bad.append(BadSample(id, _name(samples, id), str(error)))
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
            where = f"sample {_name(samples, id)}"
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
def _own_generators() -> Iterator[None]:
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


# --- one worker, seen from the parent ---------------------------------------------------------------------------------


@dataclass
class _Job:
    number: int
    request: BatchRequest
    done: bool = False
    wanted: bool = True
    deaths: int = 0
    batch: Any = None
    bad: tuple[BadSample, ...] = ()
    error: BaseException | None = None


@dataclass(eq=False)
class _Worker:
    """A process, its pipe, and the jobs it has; those beyond what the pipe surely holds are kept back.

    cautious: the one before it died. It gets a single job until that is answered: with more, a finished batch whose
              answer was not sent yet when the next one killed the worker would be blamed for it
    """

    samples: Any
    seed: int
    start: str
    jobs: deque[_Job] = field(default_factory=deque)
    cautious: bool = False

    def __post_init__(self) -> None:
        context: Any = multiprocessing.get_context(self.start)
        payload = pickle.dumps((self.samples, self.seed), protocol=5)
        if self.start == "forkserver":
            # What every worker would import is imported once, by the server, before it forks. Torch by name: the
            # server of Python 3.11 and 3.12 does not know the parent's sys.path, and may miss a user's own module.
            loaded = ["torch"] if "torch" in sys.modules else []
            context.set_forkserver_preload([*loaded, __name__, type(self.samples).__module__])
        self.pipe, theirs = context.Pipe(duplex=True)
        self.process = context.Process(target=_work, args=(theirs, self.start), daemon=True, name="thawline-loader")
        self.sent: deque[int] = deque()
        with _quiet_birth(needs_main=b"__main__" in payload):
            self.process.start()
        theirs.close()
        with suppress(OSError):  # it died at birth: the next receive says so
            self.pipe.send_bytes(payload)

    def give(self, job: _Job) -> None:
        self.jobs.append(job)
        self._send()

    def _send(self) -> None:
        while len(self.sent) < (min(1, len(self.jobs)) if self.cautious else len(self.jobs)):
            job = self.jobs[len(self.sent)]
            order = pickle.dumps((job.number, job.request.epoch, job.request.ids), protocol=5)
            if self.sent and sum(self.sent) + len(order) > _PIPE_BYTES:
                return
            try:
                self.pipe.send_bytes(order)
            except OSError:
                return  # dead: found out, and put right, when its answer is awaited
            self.sent.append(len(order))

    def receive(self, tell: Tell) -> None:
        """One message: a finished job, or something to tell. Raises EOFError or OSError where the worker is gone."""
        kind, number, body = _receive(self.pipe)
        if kind == "tell":
            tell(body)
            return
        job = self.jobs.popleft()
        self.sent.popleft()
        assert job.number == number  # a worker answers in the order in which it was asked
        job.done = True
        self.cautious = False
        if kind == "error":
            job.error = body
        elif job.wanted:
            job.batch, job.bad = body
        self._send()

    def cause_of_death(self) -> str:
        self.process.join(timeout=5)
        code = self.process.exitcode
        if code is None:
            return "closed its pipe"
        return f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"

    def dismiss(self) -> None:
        self.pipe.close()
        if self.process.is_alive():
            self.process.kill()  # it holds nothing that could be lost
        self.process.join(timeout=5)


def _dismiss(team: list[_Worker], owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked copy of the parent is going away; the workers are not its own
    for worker in team:
        worker.dismiss()
    team.clear()


@contextmanager
def _quiet_birth(*, needs_main: bool) -> Iterator[None]:
    """Start a process that no stop signal reaches, and that does not run the user's script again.

    The signals are blocked while it starts (and the fork server with it, if this is its first), which both inherit.
    multiprocessing tells a new process to import the parent's main script, for classes defined there; where the samples
    need none of those it is hidden, so that a script without `if __name__ == "__main__"` works.
    """
    main = sys.modules["__main__"]
    if not needs_main:
        sys.modules["__main__"] = types.ModuleType("__main__")
    masked = hasattr(signal, "pthread_sigmask")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS) if masked else set()
    try:
        yield
    finally:
        if masked:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        sys.modules["__main__"] = main


# --- one worker, from inside ------------------------------------------------------------------------------------------


def _work(pipe: Any, start: str) -> None:
    """The life of a worker: samples first, then orders, until the pipe closes."""
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None  # this runs in a child only
    # Sent by a thread, so that a large batch that nobody has asked for yet does not keep the next from being read.
    outbox: queue.SimpleQueue[tuple[str, int, Any] | None] = queue.SimpleQueue()
    sender = threading.Thread(target=_send_all, args=(pipe, outbox), daemon=True)
    sender.start()

    def next_message() -> bytes | None:
        # A forked sibling may hold the other end of this pipe, so the parent itself is watched too.
        if pipe not in connection.wait([pipe, parent.sentinel]):
            return None
        try:
            return bytes(pipe.recv_bytes())
        except (EOFError, OSError):
            return None

    first = next_message()
    if first is None:
        return
    samples: Any = None
    failure: BaseException | None = None
    try:
        samples, seed = pickle.loads(first)
    except Exception as exc:  # noqa: BLE001  whatever unpickling the user's reader raises is reported where it can be seen
        failure = _portable(exc)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
    while (message := next_message()) is not None:
        number, epoch, ids = pickle.loads(message)
        if failure is not None:
            outbox.put(("error", number, failure))
            continue
        try:
            done = _load(samples, seed, epoch, ids, lambda text: outbox.put(("tell", 0, text)))
            outbox.put(("done", number, done))
        except Exception as exc:  # noqa: BLE001  raised again by the parent, in its turn
            outbox.put(("error", number, _portable(exc)))
    # Not the interpreter's way out: it would wait for threads of user code, and there is nothing to tidy.
    os._exit(0)


def _send_all(pipe: Any, outbox: queue.SimpleQueue[tuple[str, int, Any] | None]) -> None:
    while (message := outbox.get()) is not None:
        try:
            _send(pipe, message)
        except OSError:
            os._exit(0)  # the parent is gone or has closed the pipe
        except Exception as exc:  # noqa: BLE001  a batch that cannot be pickled
            _send(pipe, ("error", message[1], _portable(exc)))


class _Raised(Exception):
    """The traceback of a worker, as the cause of the exception that the parent raises."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _portable(exc: BaseException) -> BaseException:
    """`exc` with its traceback as text, fit to travel; one that cannot be pickled is told as a RuntimeError."""
    text = "".join(traceback.format_exception(exc))
    try:
        copy: BaseException = pickle.loads(pickle.dumps(exc))
    except Exception:  # noqa: BLE001  any class may fail here in its own way
        copy = RuntimeError(f"{type(exc).__name__}: {exc}")
    return _with_cause(copy, text)


def _with_cause(exc: BaseException, text: str) -> BaseException:
    exc.__cause__ = _Raised(text)
    return exc


# --- what travels -----------------------------------------------------------------------------------------------------


class _Pickler(pickle.Pickler):
    """Tensors as bare buffers: torch's own way goes through shared memory files, of which a system has few."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, BaseException) and isinstance(obj.__cause__, _Raised):
            return _with_cause, (_bare(obj), obj.__cause__.args[0])
        torch = sys.modules.get("torch")
        if torch is None or type(obj) is not torch.Tensor or obj.device.type != "cpu" or obj.layout != torch.strided:
            return NotImplemented
        if obj.requires_grad or obj.is_quantized or obj.is_conj() or obj.is_neg() or obj.numel() == 0:
            return NotImplemented
        flat = obj.contiguous().view(-1).view(torch.uint8).numpy()
        return _tensor, (pickle.PickleBuffer(flat), str(obj.dtype).removeprefix("torch."), tuple(obj.shape))


def _bare(exc: BaseException) -> BaseException:
    copy: BaseException = pickle.loads(pickle.dumps(exc))  # the default leaves __cause__ behind
    return copy


def _tensor(buffer: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    import torch

    return torch.frombuffer(buffer, dtype=torch.uint8).view(getattr(torch, dtype)).view(shape)


def _send(pipe: Any, message: object) -> None:
    buffers: list[pickle.PickleBuffer] = []
    head = io.BytesIO()
    _Pickler(head, protocol=5, buffer_callback=buffers.append).dump(message)
    raw = [b.raw() for b in buffers]
    pipe.send_bytes(pickle.dumps(([len(r) for r in raw], head.getvalue()), protocol=5))
    for r in raw:
        if len(r):
            pipe.send_bytes(r)


def _receive(pipe: Any) -> tuple[str, int, Any]:
    sizes, head = pickle.loads(pipe.recv_bytes())
    buffers = []
    for size in sizes:
        buffer = bytearray(size)  # writable, so that what is made of it is
        if size:
            pipe.recv_bytes_into(buffer)
        buffers.append(buffer)
    message: tuple[str, int, Any] = pickle.loads(head, buffers=buffers)
    return message
