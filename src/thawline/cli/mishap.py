"""What the system throws at a verb where no room below has turned it into an error of ours: one sentence, no traceback.

A full disk, a missing permission, a device that fails, memory that runs out, a reader of the output that has left.
"""

from __future__ import annotations

import errno
import os
import select
import sys
from collections.abc import Iterable
from typing import TextIO

from thawline.errors import ThawlineError

READER_LEFT = 141
"""The exit code where nobody reads the output any more: that of a program which SIGPIPE ends, as in `ls | head -1`."""

_FIXES = {
    errno.ENOSPC: "free space on this file system, or write elsewhere",
    errno.EDQUOT: "this user's quota is used up: delete files, ask for more, or write elsewhere",
    errno.EFBIG: "a file-size limit is in force (ulimit -f, or the file system's own): raise it or write elsewhere",
    errno.EACCES: "give this user the permission, or name another place",
    errno.EPERM: "give this user the permission, or name another place",
    errno.EROFS: "the file system is mounted read-only: write elsewhere",
    errno.EIO: "the device reports a fault: check it (dmesg) before trusting what it holds",
    errno.EMFILE: "this process may not open more files: raise the limit (ulimit -n)",
    errno.ENFILE: "this machine has no room for more open files",
    errno.ENOENT: "check the path; it is relative to the working directory",
    errno.EISDIR: "it is a folder: name a file",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.ENAMETOOLONG: "take a shorter name",
    errno.ELOOP: "its links lead in a circle",
    errno.EADDRINUSE: "something listens there already: take another --port",
}
_WHERE_FROM = "`thawline --traceback VERB ...` shows where in the code it arose"


def error_of(exc: BaseException) -> ThawlineError | None:
    """`exc` as an error of ours; None for one that only a mistake in the program can have raised.

    An OSError of the system says its reason, the file, and what helps; one that a library made up, its own words.
    """
    if isinstance(exc, ThawlineError):
        return exc
    if isinstance(exc, OSError):
        names = [os.fsdecode(n) for n in (exc.filename, exc.filename2) if isinstance(n, (str, bytes, os.PathLike))]
        reason = exc.strerror or str(exc) or type(exc).__name__
        what = f"the system refuses: {reason}" if exc.errno else reason
        return ThawlineError(what, where=" -> ".join(names), fix=_FIXES.get(exc.errno or 0, _WHERE_FROM))
    if _is_out_of_memory(exc):
        return ThawlineError(
            "memory ran out",
            fix="end other programs, or give it less at once: smaller batches, shorter recordings, a smaller model",
        )
    return None


def reader_left(streams: Iterable[TextIO] | None = None) -> bool:
    """Whether the other end of a pipe that standard output or standard error leads to is closed.

    An EPIPE alone does not tell: it may come from a pipe to a process of our own that died, which is an error.
    """
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr) if streams is None else streams:
        if (number := _descriptor(stream)) is not None:
            poll.register(number, 0)  # errors are told whether asked for or not
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def open_standard_streams() -> None:
    """Lead each of descriptors 0, 1 and 2 that is closed (`>&-`, as daemons start programs) nowhere.

    The next files to be opened would get their numbers, and what a library says on standard error would be written
    into a checkpoint or a lock; and Python's `print` with no standard error writes to standard output, which `--json`
    owns.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one, as those below are open
            os.set_inheritable(opened, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115


def silence_what_is_stuck() -> None:
    """Lead standard output and standard error nowhere where they can no longer be written, so that what lies in their
    buffers does not raise once more as the process ends."""
    for stream in (sys.stderr, sys.stdout):
        try:
            stream.flush()
        except OSError:
            if (number := _descriptor(stream)) is not None:
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def _descriptor(stream: TextIO | None) -> int | None:
    try:
        return None if stream is None else stream.fileno()
    except (OSError, ValueError):  # a stream in memory, or closed
        return None


def _is_out_of_memory(exc: BaseException) -> bool:
    if isinstance(exc, MemoryError):
        return True
    if "torch" not in sys.modules:
        return False
    from thawline.train.memory import is_out_of_memory

    return is_out_of_memory(exc)
