"""Shards from strangers: what a tar can be made to say, each with its message; nothing is lost in silence."""

from __future__ import annotations

import io
import os
import struct
import tarfile
from pathlib import Path

import pytest

from thawline.data.audio import read_audio
from thawline.data.manifest import read_manifest
from thawline.data.manifests.tar_index import tar_index
from thawline.data.tar_member import read_member
from thawline.data.utterance import TarRef
from thawline.errors import DataError

PAIRS = {"a.wav": b"A" * 700, "a.txt": b"one", "b.wav": b"B" * 300, "b.txt": b"two", "c.wav": b"C", "c.txt": b"three"}


def member(name: str, body: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(body)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, body


def tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], *, format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for info, body in members:
            archive.addfile(info, io.BytesIO(body))
    return path


def pairs(path: Path, *, format: int = tarfile.PAX_FORMAT) -> Path:
    return tar(path, [member(name, body) for name, body in PAIRS.items()], format=format)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_is_indexed_and_its_members_are_read_by_offset(tmp_path: Path, format: int):
    path = pairs(tmp_path / "s.tar", format=format)
    bodies = {e.member: read_member(TarRef(str(path), e.member, e.offset, e.size)) for e in tar_index(path)}
    assert bodies == {name: body for name, body in PAIRS.items() if name.endswith(".wav")}


@pytest.mark.parametrize("name", ["d" * 90 + "/" + "n" * 80 + ".wav", "语音/一.wav", "./dot.wav", "with space é.wav"])
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_are_found_again(tmp_path: Path, name: str, format: int):
    path = tar(tmp_path / "s.tar", [member(name, b"sound"), member(f"{name[:-4]}.txt", b"x")], format=format)
    (row,) = read_manifest(path)
    ref = TarRef.parse(row.wav)
    assert ref is not None
    assert read_member(ref) == b"sound"


HOSTILE = [
    ("../../etc/a.wav", {}, "this member names a path outside the tar"),
    ("x/../../a.wav", {}, "this member names a path outside the tar"),
    ("/etc/a.wav", {}, "this member names a path outside the tar"),
    ("a.wav", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "this member is a link or a special file"),
    ("a.wav", {"type": tarfile.LNKTYPE, "linkname": "b.wav"}, "this member is a link or a special file"),
    ("a.wav", {"type": tarfile.FIFOTYPE}, "this member is a link or a special file"),
    ("a.wav", {"type": tarfile.CHRTYPE}, "this member is a link or a special file"),
]


@pytest.mark.parametrize(("name", "fields", "message"), HOSTILE)
def test_members_that_lead_elsewhere_are_refused(tmp_path: Path, name: str, fields: dict[str, object], message: str):
    path = tar(tmp_path / "s.tar", [member("b.wav", b"B"), member("b.txt", b"x"), member(name, **fields)])
    with pytest.raises(DataError) as caught:
        tar_index(path)
    assert message in str(caught.value)
    assert caught.value.where == f"{path}!/{name}"


@pytest.mark.parametrize(
    ("again", "message"),
    [("a.wav", "the key 'a' has two audio members"), ("a.flac", "two audio members"), ("a.txt", "has two texts")],
)
def test_a_name_that_is_there_twice_is_refused(tmp_path: Path, again: str, message: str):
    path = tar(tmp_path / "s.tar", [*(member(n, b) for n, b in PAIRS.items()), member(again, b"other")])
    with pytest.raises(DataError, match=message):
        tar_index(path)


def test_a_sparse_member_is_refused_and_not_blown_up(tmp_path: Path):
    sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.wav"}
    info, _ = member("a.wav", pax_headers={**sparse, "GNU.sparse.realsize": str(1 << 50)})
    body = b"1\n0\n1\n".ljust(512, b"\0") + b"x"
    info.size = len(body)
    path = tar(tmp_path / "s.tar", [(info, body)])
    with pytest.raises(DataError, match="this member is a link or a special file"):
        tar_index(path)


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def test_a_header_or_a_text_of_gigabytes_is_not_read_into_memory(tmp_path: Path):
    path = tmp_path / "s.tar"
    for name, kind in (("./@PaxHeader", b"x"), ("././@LongLink", b"L")):
        path.write_bytes(header(name, 8 << 30, kind))
        os.truncate(path, 9 << 30)  # a hole: takes no room on the disk
        with pytest.raises(DataError, match="a header or text of 8589934592 bytes at byte 512"):
            tar_index(path)
    path.write_bytes(header("a.txt", 8 << 30))
    os.truncate(path, 9 << 30)
    with pytest.raises(DataError, match=r"a text of 8589934592 bytes\n  fix: this is no transcript"):
        tar_index(path)


def test_a_member_that_leads_back_does_not_go_round_for_ever(tmp_path: Path):
    body = bytearray(header("a.wav", 0))
    body[124:136] = b"\xff" * 8 + struct.pack(">i", -1024)  # a negative size, in base 256
    body[148:156] = b" " * 8
    body[148:156] = b"%06o\0 " % sum(body)
    path = tmp_path / "s.tar"
    path.write_bytes(header("b.wav", 0) + bytes(body) + b"\0" * 10240)
    with pytest.raises(DataError, match="this tar is damaged"):
        tar_index(path)


def test_a_long_chain_of_long_names_is_damage_and_no_overflow(tmp_path: Path):
    link = header("././@LongLink", 2, b"L") + b"a\0".ljust(512, b"\0")
    path = tmp_path / "s.tar"
    path.write_bytes(link * 5000 + header("a.wav", 0) + b"\0" * 1024)
    with pytest.raises(DataError, match="this tar is damaged"):
        tar_index(path)


def test_a_tar_cut_anywhere_is_noticed(tmp_path: Path):
    whole = pairs(tmp_path / "whole.tar").read_bytes()
    end = whole.rindex(b"three") + 512  # what follows is the end mark and padding
    path = tmp_path / "s.tar"
    for cut in range(1, end, 97):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"cut short|damaged"):
            tar_index(path)
    path.write_bytes(whole[:end])
    with pytest.raises(DataError, match="this tar is cut short: it has no end mark"):
        tar_index(path)
    path.write_bytes(whole[: end + 512])
    assert len(tar_index(path)) == 3


def test_a_damaged_header_in_the_middle_loses_no_member_in_silence(tmp_path: Path):
    path = pairs(tmp_path / "s.tar")
    body = bytearray(path.read_bytes())
    at = body.index(b"b.wav")
    body[at + 3] ^= 1
    path.write_bytes(body)
    with pytest.raises(DataError, match=rf"the header at byte {at} cannot be read, and the members after it are lost"):
        tar_index(path)


def test_two_tars_written_one_after_the_other_are_refused(tmp_path: Path):
    body = pairs(tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(body + body)
    with pytest.raises(
        DataError, match=r"something follows the end of this tar .*\n  fix: join archives with `tar --c"
    ):
        tar_index(tmp_path / "s.tar")


def test_a_shard_written_again_after_it_was_indexed_is_not_decoded_as_another_utterance(tmp_path: Path):
    path = pairs(tmp_path / "s.tar")
    rows = list(read_manifest(path))
    tar(path, [member(n, b) for n, b in reversed(PAIRS.items())])
    for row in rows:
        with pytest.raises(DataError, match="lies"):
            read_audio(row.wav)
    same_sizes = {**PAIRS, "x.wav": b"X" * 700, "x.txt": b"one"}
    del same_sizes["a.wav"], same_sizes["a.txt"]
    tar(path, [member(n, b) for n, b in [("x.wav", b"X" * 700), *PAIRS.items()]])
    with pytest.raises(DataError, match=r"another member lies here: 'x.wav' of 700 bytes\n  fix: the tar changed"):
        read_audio(rows[0].wav)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("@5+10", "no tar member begins at byte 5"),
        ("@512+999999999999999", "the tar ends inside this member: 9728 of 999999999999999 bytes"),
        ("@1024+10", "no member's header lies before this place in the tar"),
    ],
)
def test_a_reference_that_somebody_made_up_is_refused(tmp_path: Path, place: str, message: str):
    path = pairs(tmp_path / "s.tar")
    with pytest.raises(DataError) as caught:
        read_audio(f"{path}!/a.wav{place}")
    assert message in str(caught.value)
