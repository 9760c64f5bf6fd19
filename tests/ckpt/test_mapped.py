"""Stretches of files: their checksums from what went by, and files that change while they are read."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thawline.ckpt.formats.checksum import combined, crc32
from thawline.ckpt.formats.mapped import MappedFile, Region
from thawline.ckpt.formats.pieces import Linear, Planned, TensorInfo, chunks
from thawline.errors import CheckpointError


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_the_checksum_of_two_stretches_follows_from_theirs(first: bytes, second: bytes) -> None:
    assert combined(crc32(first), crc32(second), len(second)) == zlib.crc32(first + second)


def test_lengths_that_no_table_holds_are_combined_too() -> None:
    assert combined(zlib.crc32(b"head"), zlib.crc32(bytes(1 << 24)), 1 << 24) == zlib.crc32(b"head" + bytes(1 << 24))


def _region(path: Path, content: bytes, *, crc: int | None = None) -> Region:
    path.write_bytes(content)
    return Region(MappedFile(path), 0, len(content), zlib.crc32(content) if crc is None else crc, "record 'data/0'")


def _tensor(region: Region, offset: int, count: int) -> Planned:
    info = TensorInfo(name="w", dtype="F32", shape=(count,))
    return Planned(info=info, parts=(Linear(region, offset, count),))


class _Counted(Region):
    """Counts the bytes that a check reads."""

    __slots__ = ("read",)

    def stream(self, start: int, stop: int, step: int = 1 << 19):  # type: ignore[no-untyped-def]
        self.read = getattr(self, "read", 0) + stop - start
        return super().stream(start, stop, step)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=6))
def test_a_check_reads_what_did_not_go_by_and_agrees_with_zlib(
    tmp_path_factory: pytest.TempPathFactory, spans: list[tuple[int, int]]
) -> None:
    region = _region(tmp_path_factory.mktemp("r") / "f", os.urandom(240))
    for one, other in spans:
        first, last = min(one, other), max(one, other)
        assert b"".join(chunks(_tensor(region, 4 * first, last - first), 16, note=True)) == bytes(
            region.view(4 * first, 4 * last)
        )
    region.check()


def test_what_went_by_is_not_read_again(tmp_path: Path) -> None:
    content = os.urandom(1 << 20)
    (tmp_path / "f").write_bytes(content)
    region = _Counted(MappedFile(tmp_path / "f"), 0, len(content), zlib.crc32(content), "record 'data/0'")
    half = len(content) // 8
    for offset in (0, len(content) // 2):
        for _ in chunks(_tensor(region, offset, half), note=True):
            pass
    region.read = 0
    region.check()
    assert region.read == 0


@pytest.mark.parametrize("place", [0, 99, 100, 200, 239])
def test_a_flipped_byte_is_found_in_what_went_by_and_between(tmp_path: Path, place: int) -> None:
    content = bytearray(os.urandom(240))
    stated = zlib.crc32(content)
    content[place] ^= 1
    region = _region(tmp_path / "f", bytes(content), crc=stated)
    for offset in (0, 160):
        for _ in chunks(_tensor(region, offset, 20), note=True):
            pass
    with pytest.raises(CheckpointError, match="record 'data/0' is altered: CRC-32"):
        region.check()


def test_a_file_that_another_one_replaced_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(1 << 20))
    file = MappedFile(tmp_path / "f")
    (tmp_path / "g").write_bytes(b"\1" * (1 << 20))
    os.replace(tmp_path / "g", tmp_path / "f")
    with pytest.raises(CheckpointError, match="replaced by another file while it was read"):
        next(file.stream(0, 1 << 20, 1 << 19))


def test_a_file_that_shrinks_while_it_is_read_ends_in_a_message(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(2 << 20))
    pieces = MappedFile(tmp_path / "f").stream(0, 2 << 20, 1 << 19)
    next(pieces)
    os.truncate(tmp_path / "f", 600_000)
    with pytest.raises(CheckpointError, match="shrank from 2097152 to 600000 bytes"):
        list(pieces)


def test_a_disk_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int, buffers: object, place: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    (tmp_path / "f").write_bytes(bytes(1 << 20))
    file = MappedFile(tmp_path / "f")
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error") as caught:
        list(file.stream(0, 1 << 20, 1 << 19))
    assert caught.value.where == str(tmp_path / "f")


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    content = os.urandom(300_000)
    (tmp_path / "f").write_bytes(content)
    monkeypatch.setattr(os, "preadv", lambda d, buffers, place: whole(d, [buffers[0][:1000]], place))
    assert b"".join(map(bytes, MappedFile(tmp_path / "f").stream(0, len(content), 1 << 18))) == content


def test_more_shards_than_open_files_are_usual_are_no_obstacle(tmp_path: Path) -> None:
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from thawline.ckpt.formats.mapped import MappedFile\n"
        "soft, hard, count = map(int, sys.argv[2:])\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))\n"
        "Path(sys.argv[1]).write_bytes(bytes(100))\n"
        "files = [MappedFile(Path(sys.argv[1])) for _ in range(count)]\n"
        "opened = open(sys.argv[1])\n"  # what others open a short while finds room too
        "print(len(files))\n"
    )

    def tried(soft: int, hard: int, count: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, str(tmp_path / "f"), str(soft), str(hard), str(count)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert tried(128, 1000, 600).stdout == "600\n"
    refused = tried(128, 128, 600)
    assert refused.returncode != 0
    assert "raise the limit (ulimit -n)" in refused.stderr


def test_a_file_of_a_checkpoint_is_let_go_of_when_it_is_closed(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(1 << 20))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        file = MappedFile(tmp_path / "f")
        next(file.stream(0, 1 << 20, 1 << 18))  # and no further
        file.close()
    assert len(os.listdir("/proc/self/fd")) == before
