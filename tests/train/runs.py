"""Runs of the toy task, and what is compared of them."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.train.toy import ToyTask

from thawline.train.loop import Run, train
from thawline.train.recipe import read_recipe
from thawline.train.rundir import read_rows
from thawline.train.task import Task


def run(folder: Path, name: str, overrides: Any = (), *, task: Task | None = None, **options: Any) -> Run:
    """The run of `folder/toy.yaml` in `folder/name`, begun or gone on with."""
    return train(read_recipe(folder / "toy.yaml", overrides), task or ToyTask(), folder / name, **options)


def sums(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("step-*"))


def checkpoint_sums(run_dir: Path) -> dict[str, str]:
    """Digests of the tensors of the newest checkpoint."""
    return {name: digest for name, digest in sums(checkpoints(run_dir)[-1]).items() if name.endswith(".safetensors")}


def bits(run_dir: Path) -> dict[str, str]:
    """Digests of everything that must not depend on when a run was stopped."""
    newest = {f"checkpoint/{name}": digest for name, digest in sums(checkpoints(run_dir)[-1]).items()}
    model = {f"model/{name}": digest for name, digest in sums(run_dir / "model").items()}
    return newest | model | {"metrics": hashlib.sha256((run_dir / "metrics.jsonl").read_bytes()).hexdigest()}


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_rows(run_dir / "events.jsonl") if e["event"] == kind]


class AtStep:
    """A monitor that does something once a step is done: by default what a scheduler would, SIGTERM."""

    def __init__(self, step: int, act: Callable[[], object] = lambda: os.kill(os.getpid(), signal.SIGTERM)) -> None:
        self.last, self.act = step, act

    def begin(self, **_: Any) -> None: ...
    def note(self, text: str) -> None: ...
    def evaluation(self, row: Any) -> None: ...
    def end(self) -> None: ...
    def step(self, row: Any, speed: Any) -> None:
        if row["step"] == self.last:
            self.act()
