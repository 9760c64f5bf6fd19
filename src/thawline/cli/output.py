"""Where words go: people's text on standard output, or on standard error where `--json` owns standard output.

File names need not be UTF-8. Text for people then holds the name's own bytes, as `ls` writes them; JSON holds each such
byte as `\\udcXX`, which Python's `json.loads` and `os.fsencode` make that byte again.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from thawline.ckpt.refusal import naming, refused

_STDOUT, _STDERR = Path("standard output"), Path("standard error")
_LONE = re.compile("[\ud800-\udfff]")


def say(text: str, *, as_json: bool = False) -> None:
    """Text for people."""
    with naming(_STDERR if as_json else _STDOUT):
        print(text, file=sys.stderr if as_json else sys.stdout, flush=True)


def give(value: Any, text: str, *, as_json: bool) -> None:
    """The result of a verb: `value` as the one JSON object, or `text` for people."""
    with naming(_STDOUT):
        print(json_text(value) if as_json else text, flush=True)


def refuse_unwritable(*files: Path | str | None, folder: Path | str | None = None) -> None:
    """Raise now, and not after hours of work, the StorageError of files, or a folder, that this user cannot make."""
    asked = [(Path(file), Path(file).absolute().parent) for file in files if file is not None]
    if folder is not None:
        asked.append((Path(folder), Path(folder).absolute()))
    for target, place in asked:
        nearest = next(p for p in (place, *place.parents) if p.exists())
        code = errno.EACCES if nearest.is_dir() else errno.ENOTDIR
        if code == errno.ENOTDIR or not os.access(nearest, os.W_OK | os.X_OK):
            raise refused(OSError(code, os.strerror(code)), target.absolute(), 0, None)


def json_text(value: Any) -> str:
    """One line of JSON that can be encoded whatever file names are in it.

    >>> json_text({"file": "caf\\udce9.wav", "text": "caf\\u00e9"})
    '{"file": "caf\\\\udce9.wav", "text": "caf\\xe9"}'
    """
    text = json.dumps(value, ensure_ascii=False)
    return _LONE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def print_error(
    text: str, exit_code: int, *, as_json: bool, what: str, where: str = "", fix: str = "", label: str = "error: "
) -> None:
    """An error as people read it on standard error, and as a JSON object where that was asked for."""
    with contextlib.suppress(OSError):  # where neither can be written, the exit code says it
        print(f"{label}{text}", file=sys.stderr, flush=True)
    if as_json:
        error = {"what": what, "where": where, "fix": fix, "exit_code": exit_code}
        with contextlib.suppress(OSError):
            print(json_text({"error": error}), flush=True)


def take_any_name() -> None:
    """Let standard output take any text: bytes of a name as they are, and `\\uXXXX` for what its encoding lacks. A
    stream that a caller has put in its place stays as it is."""
    codecs.register_error("thawline", _bytes_or_escapes)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout is sys.__stdout__:
        sys.stdout.reconfigure(errors="thawline")


def _bytes_or_escapes(exc: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(exc)
    except UnicodeError:
        return codecs.lookup_error("backslashreplace")(exc)
