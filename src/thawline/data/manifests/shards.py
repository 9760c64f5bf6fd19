"""WeNet's shards: lists of tar files of KEY.wav and KEY.txt, here or behind network addresses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from thawline.data.manifests.rows import Placed, Rows, absolute, lines_of, missing, nfc
from thawline.data.manifests.tar_index import TarEntry, tar_index
from thawline.data.utterance import TarRef, Utterance, is_url
from thawline.errors import DataError

_AT_ONCE = 16  # remote shards
_PARTNER = "write the shard again with both members, KEY.wav and KEY.txt"


def shards(rows: Rows, path: Path) -> Iterator[Placed]:
    """The utterances of a list of tar files, or of one."""
    if path.suffix.lower() == ".tar":
        yield from _rows_of(rows, path, tar_index(path, cache=rows.cache))
        return
    lines = [(f"{path}:{number}", line) for number, line in lines_of(path) if line]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            # A scan waits for the network once a member, so remote shards are scanned beside each other.
            asked = {tar: pool.submit(tar_index, tar, cache=rows.cache) for _, tar in lines if _is_remote(tar)}
            for where, line in lines:
                try:
                    if line in asked:
                        yield from _rows_of(rows, line, asked[line].result())
                    else:
                        tar = _local(line, path, where)
                        yield from _rows_of(rows, tar, tar_index(tar, cache=rows.cache))
                except DataError as error:
                    rows.refuse(error)
        finally:
            pool.shutdown(cancel_futures=True)


def _is_remote(line: str) -> bool:
    return is_url(line) and not line.startswith("file://")


def _local(line: str, path: Path, where: str) -> Path:
    tar = Path(absolute(line, path.parent, where))
    if not tar.is_file():
        error = missing(tar)
        raise DataError(error.what, where=where, fix=error.fix)
    return tar


def _rows_of(rows: Rows, tar: Path | str, entries: Sequence[TarEntry]) -> Iterator[Placed]:
    for entry in entries:
        at = f"{tar}!/{entry.member or entry.key}"
        if not entry.member:
            rows.refuse(
                DataError(f"the text {entry.key}.txt has no audio of the same name in the tar", where=at, fix=_PARTNER)
            )
        elif entry.txt is None and rows.text_required:
            rows.refuse(DataError(f"no text: there is no {entry.key}.txt in the tar", where=at, fix=_PARTNER))
        else:
            ref = TarRef(str(tar), entry.member, entry.offset, entry.size)
            yield at, Utterance(key=nfc(entry.key), wav=str(ref), txt=nfc(entry.txt or ""))
