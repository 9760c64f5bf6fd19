"""One life of a trainer, from the inside: how it is born, and how it may be told to end.

    python -m tests.contracts.storm_life nursery        a life for each line of JSON on standard input
    python -m tests.contracts.storm_life LIFE           one life in this process, told by JSON

Importing torch, transformers and the audio libraries takes seconds; a life takes tenths of one. The nursery imports
everything once and forks each life from there. That is a process like any other: it has its own memory, descriptors,
locks, threads and loader workers, and SIGKILL takes all of them at once; what it shares with the nursery is code that
was imported. The nursery runs no torch operation and has one thread (it makes sure), so nothing is half copied.

One thing a fork would hide: its generators start where the nursery's are, so a draw that is not keyed could come out
equal in every life. Each life therefore begins with all three generators at a random place.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import select
import signal
import sys
import threading
import traceback
from dataclasses import asdict, dataclass
from typing import Any, Literal

PRELOADED = (
    "thawline.tasks.asr",
    "thawline.tasks.vision",
    "thawline.models.whisper",
    "transformers.models.whisper.modeling_whisper",
    "kaldi_native_fbank",
    "soundfile",
    "soxr",
    "tests.tasks.vision_cases",
)
DISK_CALLS = (
    "make_dir", "create", "write", "sync", "rename_new", "replace", "exchange", "link", "remove", "remove_dir"
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Moment:
    """When a life ends by SIGKILL.

    clock: `at` seconds after birth, killed from outside
    step:  `after_s` seconds after the end of its `at`-th step
    call:  directly after its `at`-th system call that changes the disk, so mostly inside a save
    """

    kind: Literal["clock", "step", "call"]
    at: float
    after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Life:
    """Train `recipe` in `run`, or go on with it there, until the end or the moment; what it says goes to `log`."""

    recipe: str
    run: str
    log: str
    overrides: tuple[str, ...] = ()
    moment: Moment | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Life:
        data = json.loads(text)
        moment = None if data["moment"] is None else Moment(**data["moment"])
        return cls(data["recipe"], data["run"], data["log"], tuple(data["overrides"]), moment)


def live(life: Life) -> int:
    """Be that trainer; the exit code, where it comes to that."""
    log = os.open(life.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    import torch

    from thawline.tasks.runs import train
    from thawline.train.seeding import seed_all

    torch.set_num_threads(1)
    seed_all(int.from_bytes(os.urandom(7)))
    try:
        train(life.recipe, list(life.overrides), run=life.run, monitor=_Watcher(_arm(life.moment)))
    except Exception:  # noqa: BLE001  whatever it is, the storm reads it in the log
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(moment: Moment | None) -> Moment | None:
    """Put the shim under the store for a death at a system call; gives the moment back to whom it concerns."""
    if moment is None or moment.kind != "call":
        return moment
    from thawline.ckpt import store

    calls = itertools.count(1)

    def wrap(name: str) -> Any:
        def call(self: store.FileSystem, *args: Any) -> Any:
            result = getattr(store.FileSystem, name)(self, *args)
            if next(calls) == moment.at:
                _die()
            return result

        return call

    store.SYSTEM = type("Deadly", (store.FileSystem,), {name: wrap(name) for name in DISK_CALLS})()
    return None


class _Watcher:
    """Told of every step; ends the life after the one it is armed for."""

    def __init__(self, moment: Moment | None) -> None:
        self._moment = moment if moment is not None and moment.kind == "step" else None
        self._steps = itertools.count(1)

    def begin(self, **_: Any) -> None: ...
    def note(self, text: str) -> None: ...
    def evaluation(self, row: Any) -> None: ...
    def end(self) -> None: ...
    def step(self, row: Any, speed: Any) -> None:
        if self._moment is not None and next(self._steps) == self._moment.at:
            timer = threading.Timer(self._moment.after_s, _die)
            timer.daemon = True
            timer.start()


def nursery() -> None:
    """Say "ready", then answer each life on standard input with how it ended: its exit code, or minus the signal."""
    for name in PRELOADED:
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: what is forked from here would be half a process"
    print("ready", flush=True)
    for line in sys.stdin:
        life = Life.from_json(line)
        child = os.fork()
        if child == 0:
            os._exit(live(life))  # whatever happened: never back into the loop of the nursery
        print(_end_of(child, life.moment), flush=True)


def _end_of(child: int, moment: Moment | None) -> int:
    """Wait for a child, and kill it where its moment is a clock's; by a descriptor, as a number may be used again."""
    handle = os.pidfd_open(child)
    if moment is not None and moment.kind == "clock" and not select.select([handle], [], [], moment.at)[0]:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    os.close(handle)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    if sys.argv[1] == "nursery":
        nursery()
    else:
        sys.exit(live(Life.from_json(sys.argv[1])))
