"""Verbs as a user would type them: each in a process of its own, with what it said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thawline.train.rundir import RunDirectory, read_rows

_KILL_LIMIT_S = 120.0


def thawline(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`thawline WORDS` as a user would run it in `folder`."""
    return subprocess.run(
        [sys.executable, "-m", "thawline", *words],
        cwd=folder,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def kill_at_step(folder: Path, command: Sequence[str], files: RunDirectory, *, step: int) -> int:
    """Start `thawline COMMAND` in `folder`, kill it (SIGKILL) once its log reaches `step`; the exit code it leaves."""
    child = subprocess.Popen(
        [sys.executable, "-m", "thawline", *command],
        cwd=folder,
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + _KILL_LIMIT_S
    try:
        while child.poll() is None and time.monotonic() < deadline:
            if len(read_rows(files.metrics)) >= step:
                break
            time.sleep(0.005)
    finally:
        child.kill()
        child.wait()
    return child.returncode


def said(done: subprocess.CompletedProcess[str], *, lines: int = 3) -> str:
    """The last lines of what a verb told people."""
    text = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return "\n".join(text[-lines:])


def object_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The one JSON object that a verb printed; empty where it printed none."""
    try:
        value: Any = json.loads(done.stdout)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _environment() -> dict[str, str]:
    """The surroundings of a child: one thread for it, as here."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
