"""What is kept between runs to save work: indexes of shards, durations, mapped copies of tables.

Whoever finds nothing here does the work again, so everything may be deleted at any moment, and a place that cannot be
written is no error. What is kept appears whole under its name (a temporary sibling, then one rename), so writers may
run beside each other; and it carries the digest of its content, so that what is torn or altered is noticed and not
used.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blake3 import blake3

_PIECE_BYTES = 1 << 20


def folder() -> Path | None:
    """The user's cache folder for this program: `$XDG_CACHE_HOME/thawline`, else `~/.cache/thawline`.

    None where there is neither (a container without a home).
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # the specification says to ignore any other
        return Path(given, "thawline")
    try:
        return Path.home() / ".cache" / "thawline"
    except RuntimeError:
        return None


def name_for(path: object) -> str:
    """A file name that stands for `path`: two lists of one name in different folders must not share what is kept."""
    return str(blake3(str(path).encode("utf-8", "surrogatepass")).hexdigest(16))


@contextmanager
def new_file(home: Path) -> Iterator[Path]:
    """An empty file of its own in `home`, to be written and then renamed (`os.replace`); removed where it was not.

    Raises OSError where that cannot be written.
    """
    home.mkdir(parents=True, exist_ok=True)
    temporary = home / f".{secrets.token_hex(8)}.making"
    # Not tempfile's mode 0600: an index beside a shard is for everybody who may read the shard.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def keep(place: Path, kind: str, value: object) -> bool:
    """Keep a JSON value; whether that was possible. `kind` names its layout and version."""
    body = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    try:
        with new_file(place.parent) as temporary:
            temporary.write_bytes(_seal(kind, body) + b"\n" + body)
            os.replace(temporary, place)
    except OSError:
        return False
    return True


def kept(place: Path, kind: str) -> Any:
    """The value that `keep` left; None where there is none of this kind, or not as it was written."""
    try:
        seal, _, body = place.read_bytes().partition(b"\n")
        return json.loads(body) if seal == _seal(kind, body) else None
    except (OSError, ValueError):
        return None


def file_digest(path: Path) -> str:
    """BLAKE3 of a file's content, 64 hexadecimal digits. Reads it in pieces. Raises OSError."""
    digest = blake3()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return str(digest.hexdigest())


def _seal(kind: str, body: bytes) -> bytes:
    return f"thawline {kind} {blake3(body).hexdigest()}".encode()
