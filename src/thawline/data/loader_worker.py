"""One loader worker: as its parent sees it, and from inside.

Workers are started by a fork server where there is one: a plain fork copies locks and OpenMP pools in whatever state
the threads of a training process left them, and hangs now and then. A worker ignores the signals that stop a run; it
ends when its pipe closes, that is when the loader is closed or forgotten or the parent is gone, however that died.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import Any

from thawline.data.sample_reading import BadSample, Tell, read_batch
from thawline.data.sampler import Cursor
from thawline.data.tensor_pipe import portable, receive, send

_STOP_SIGNALS = [
    getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2") if hasattr(signal, n)
]
_PIPE_BYTES = 32_768  # requests on their way to a busy worker; below what any pipe holds, so a send never blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequest:
    """Which samples make the batch at `cursor`, and the epoch that keys their augmentation."""

    epoch: int
    cursor: Cursor
    ids: tuple[int, ...]


@dataclass
class Job:
    """A request on its way, and what became of it."""

    number: int
    request: BatchRequest
    done: bool = False
    wanted: bool = True
    deaths: int = 0
    batch: Any = None
    bad: tuple[BadSample, ...] = ()
    error: BaseException | None = None


@dataclass(eq=False)
class Worker:
    """A process, its pipe, and the jobs it has; those beyond what the pipe surely holds are kept back.

    cautious: the one before it died. It gets a single job until that is answered: with more, a finished batch whose
              answer was not sent yet when the next one killed the worker would be blamed for it
    """

    samples: Any
    seed: int
    start: str
    jobs: deque[Job] = field(default_factory=deque)
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

    def give(self, job: Job) -> None:
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
        kind, number, body = receive(self.pipe)
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


def dismiss(team: list[Worker], owner: int) -> None:
    """End the workers that process `owner` started."""
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


# --- from inside ------------------------------------------------------------------------------------------------------


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
        failure = portable(exc)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
    while (message := next_message()) is not None:
        number, epoch, ids = pickle.loads(message)
        if failure is not None:
            outbox.put(("error", number, failure))
            continue
        try:
            done = read_batch(samples, seed, epoch, ids, lambda text: outbox.put(("tell", 0, text)))
            outbox.put(("done", number, done))
        except Exception as exc:  # noqa: BLE001  raised again by the parent, in its turn
            outbox.put(("error", number, portable(exc)))
    # Not the interpreter's way out: it would wait for threads of user code, and there is nothing to tidy.
    os._exit(0)


def _send_all(pipe: Any, outbox: queue.SimpleQueue[tuple[str, int, Any] | None]) -> None:
    while (message := outbox.get()) is not None:
        try:
            send(pipe, message)
        except OSError:
            os._exit(0)  # the parent is gone or has closed the pipe
        except Exception as exc:  # noqa: BLE001  a batch that cannot be pickled
            send(pipe, ("error", message[1], portable(exc)))
