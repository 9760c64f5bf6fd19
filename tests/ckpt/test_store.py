"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from blake3 import blake3

from thawline.ckpt import store
from thawline.errors import CheckpointError


class Recorder(store.FileSystem):
    """Notes the calls by name and the paths they touch, and does them."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Path]] = []

    def make_dir(self, path: Path) -> None:
        self.calls.append(("make_dir", path))
        super().make_dir(path)

    def create(self, path: Path) -> int:
        self.calls.append(("create", path))
        return super().create(path)

    def sync(self, path: Path) -> None:
        self.calls.append(("sync", path))
        super().sync(path)

    def rename_new(self, old: Path, new: Path) -> None:
        self.calls.append(("rename_new", new))
        super().rename_new(old, new)

    def exchange(self, one: Path, other: Path) -> None:
        self.calls.append(("exchange", other))
        super().exchange(one, other)


class NoExchange(store.FileSystem):
    """A system that cannot swap two names."""

    def exchange(self, one: Path, other: Path) -> None:
        raise OSError(errno.EINVAL, "Invalid argument", str(other))


class FullDisk(store.FileSystem):
    """Takes `room` bytes, the last write only in part, then says that the disk is full."""

    def __init__(self, room: int, code: int = errno.ENOSPC) -> None:
        self.room = room
        self.code = code

    def write(self, descriptor: int, data: store.Buffer) -> int:
        if self.room == 0:
            raise OSError(self.code, os.strerror(self.code))
        taken = super().write(descriptor, memoryview(data)[: self.room])
        self.room -= taken
        return taken


class ShortWrites(store.FileSystem):
    """Takes at most 7 bytes at a time."""

    def write(self, descriptor: int, data: store.Buffer) -> int:
        return super().write(descriptor, memoryview(data)[:7])


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder anybody may enter, while this process has no rights beyond an ordinary user's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        if os.geteuid() != 0:
            yield folder
            return
        os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(0)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_directory_appears_with_everything_in_it_and_no_litter_beside_it(tmp_path: Path) -> None:
    with store.atomic_dir(tmp_path / "out") as folder:
        assert folder.parent == tmp_path
        assert not (tmp_path / "out").exists()
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_bytes(b"one")
    assert tree(tmp_path) == {"out/sub/a": b"one"}
    assert os.listdir(tmp_path) == ["out"]


def test_the_order_is_files_then_directories_then_rename_then_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(store, "SYSTEM", recorder)
    with store.atomic_dir(tmp_path / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_bytes(b"one")
        (folder / "b").write_bytes(b"two")
    assert recorder.calls == [
        ("make_dir", folder),
        ("sync", folder / "b"),
        ("sync", folder / "sub" / "a"),
        ("sync", folder / "sub"),
        ("sync", folder),
        ("rename_new", tmp_path / "out"),
        ("sync", tmp_path),
    ]


def test_missing_parents_are_made_and_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(store, "SYSTEM", recorder)
    with store.atomic_file(tmp_path / "a" / "b" / "file") as file:
        file.write(b"x")
    assert recorder.calls[:4] == [
        ("make_dir", tmp_path / "a"),
        ("sync", tmp_path),
        ("make_dir", tmp_path / "a" / "b"),
        ("sync", tmp_path / "a"),
    ]
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"x"


def test_an_error_inside_leaves_no_trace_and_passes_unchanged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), store.atomic_dir(tmp_path / "out") as folder:  # noqa: PT012 - a body
        (folder / "a").write_bytes(b"one")
        raise ValueError("mine")
    assert os.listdir(tmp_path) == []


def test_a_file_of_the_callers_that_is_missing_elsewhere_is_not_blamed_on_the_storage(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), store.atomic_dir(tmp_path / "out"):
        (tmp_path / "absent").read_bytes()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("what", ["dir", "empty dir", "file", "dangling link"])
def test_an_existing_target_is_refused_before_anything_is_written(tmp_path: Path, what: str) -> None:
    target = tmp_path / "out"
    if what == "file":
        target.write_bytes(b"old")
    elif what == "dangling link":
        target.symlink_to("nowhere")
    else:
        target.mkdir()
        if what == "dir":
            (target / "a").write_bytes(b"old")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError) as caught, store.atomic_dir(target):
        pytest.fail("the body must not run")
    assert str(caught.value) == (
        f"{target}: exists already\n  fix: choose another name, or say that it may be replaced (--force)"
    )
    assert tree(tmp_path) == before


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    refusal = pytest.raises(CheckpointError, match="exists already")
    with refusal, store.atomic_dir(tmp_path / "out") as folder:
        (folder / "a").write_bytes(b"mine")
        (tmp_path / "out").mkdir()  # empty: rename(2) alone would replace it
    with refusal, store.atomic_file(tmp_path / "file") as file:
        file.write(b"mine")
        (tmp_path / "file").write_bytes(b"theirs")
    assert tree(tmp_path) == {"file": b"theirs"}


@pytest.mark.parametrize("system", [store.FileSystem(), NoExchange()], ids=["exchange", "two renames"])
def test_force_replaces_a_directory_and_keeps_nothing_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: store.FileSystem
) -> None:
    monkeypatch.setattr(store, "SYSTEM", system)
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_bytes(b"old")
    with store.atomic_dir(target, force=True) as folder:
        (folder / "new").write_bytes(b"new")
        assert tree(target) == {"old": b"old"}
    assert os.listdir(tmp_path) == ["out"]
    assert tree(target) == {"new": b"new"}


def test_force_replaces_a_file_and_a_link_but_not_what_the_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "out").symlink_to("precious")
    with store.atomic_file(tmp_path / "out", force=True) as file:
        file.write(b"new")
    assert tree(tmp_path) == {"out": b"new", "precious": b"precious"}
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    with store.atomic_dir(tmp_path / "link", force=True) as folder:
        (folder / "x").write_bytes(b"x")
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "out", "precious"]
    assert not (tmp_path / "link").is_symlink()


def test_a_file_is_never_put_in_place_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists already"), store.atomic_file(tmp_path / "out", force=True):
        pass
    assert (tmp_path / "out").is_dir()


def test_a_file_can_be_filled_out_of_order_and_by_descriptor(tmp_path: Path) -> None:
    with store.atomic_file(tmp_path / "out") as file:
        file.write(b"....body")
        file.seek(0)
        file.write(b"head")
        file.flush()
        os.pwrite(file.fileno(), b"!", 8)
    assert (tmp_path / "out").read_bytes() == b"headbody!"


def test_new_files_and_folders_have_the_users_usual_permissions(tmp_path: Path) -> None:
    with store.atomic_dir(tmp_path / "out"), store.atomic_file(tmp_path / "file"):
        pass
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain file").touch()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain file").stat().st_mode


def test_write_file_gives_size_and_digest_of_what_is_on_disk_also_after_short_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SYSTEM", ShortWrites())
    pieces = [b"abc", bytearray(b""), memoryview(bytes(range(256)) * 20), b"end"]
    size, digest = store.write_file(tmp_path / "f", pieces)
    content = (tmp_path / "f").read_bytes()
    assert content == b"".join(bytes(p) for p in pieces)
    assert (size, digest) == (len(content), blake3(content).hexdigest())


def test_large_pieces_between_small_ones_stay_in_order(tmp_path: Path) -> None:
    pieces = [b"a" * 3, b"b" * (9 << 20), b"c", b"d" * (1 << 20), b"e"]
    size, digest = store.write_file(tmp_path / "f", pieces)
    content = (tmp_path / "f").read_bytes()
    assert content == b"".join(pieces)
    assert (size, digest) == (len(content), blake3(content).hexdigest())


@pytest.mark.parametrize(
    ("code", "fix"),
    [
        (errno.ENOSPC, "free space on this file system"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "the device reports a fault"),
        (errno.EFBIG, "file-size limit"),
    ],
)
def test_a_disk_that_fills_up_is_named_with_what_was_needed_and_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, fix: str
) -> None:
    monkeypatch.setattr(store, "SYSTEM", FullDisk(room=1000, code=code))
    target = tmp_path / "out"
    with (
        pytest.raises(store.StorageError) as caught,
        store.atomic_dir(target, need_bytes=5000) as folder,
    ):
        store.write_file(folder / "a", [b"x" * 5000])
    error = caught.value
    assert str(error).startswith(f"{target}: cannot write: {os.strerror(code)} (needs 5.0 kB, ")
    assert "what was there before is untouched" in str(error)
    assert fix in error.fix
    assert (error.exit_code, error.errno, error.needed_bytes) == (4, code, 5000)
    assert isinstance(error.__cause__, OSError)
    assert error.__cause__.errno == code
    assert os.listdir(tmp_path) == []


def test_what_cannot_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with (
        pytest.raises(store.StorageError, match="No space left") as caught,
        store.atomic_dir(tmp_path / "out", need_bytes=1 << 60),
    ):
        pytest.fail("the body must not run")
    assert caught.value.free_bytes == pytest.approx(store.free_bytes(tmp_path), rel=0.05)  # others write meanwhile
    assert os.listdir(tmp_path) == []


def test_a_folder_without_write_permission_is_named_with_the_fix(as_nobody: Path) -> None:
    folder = as_nobody / "closed"
    os.seteuid(0) if os.getuid() == 0 else None
    folder.mkdir(mode=0o555)
    os.seteuid(65534) if os.getuid() == 0 else None
    with pytest.raises(store.StorageError) as caught, store.atomic_file(folder / "out"):
        pytest.fail("the body must not run")
    assert str(caught.value).startswith(f"{folder / 'out'}: cannot write: Permission denied")
    assert caught.value.fix == "let this user write to the directory, or write elsewhere"


def test_a_file_size_limit_is_met_like_a_full_disk(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(store.StorageError, match="File too large"), store.atomic_file(tmp_path / "out") as file:
            file.write(b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_what_a_killed_writer_left_is_removed_by_the_next_writer_of_that_target(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from thawline.ckpt import store\n"
        "with store.atomic_dir(Path(sys.argv[1])) as f:\n"
        "    (f / 'half').write_bytes(b'half'); os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], check=False)
    assert done.returncode == -9
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".out.tmp-")
    with store.atomic_dir(tmp_path / "other"):
        assert left in os.listdir(tmp_path)  # another target's leftovers are not this writer's business
    with store.atomic_dir(tmp_path / "out"):
        assert left not in os.listdir(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_a_temporary_in_use_is_never_taken_for_a_leftover(tmp_path: Path) -> None:
    with store.atomic_dir(tmp_path / "out") as folder, store.atomic_file(tmp_path / "file") as file:
        file.write(b"x")
        assert store.clean_leftovers(tmp_path) == ()
        assert folder.is_dir()
    assert sorted(os.listdir(tmp_path)) == ["file", "out"]


def test_a_temporary_that_a_cleaner_was_quicker_to_lock_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = fcntl.flock
    calls: list[int] = []

    def flock(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            raise BlockingIOError(errno.EWOULDBLOCK, "Resource temporarily unavailable")
        honest(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with store.atomic_file(tmp_path / "out") as file:
        (given_up,) = {path for path in tmp_path.iterdir() if path != Path(file.name)}
        given_up.unlink()  # as the cleaner does that holds it
        file.write(b"x")
    assert (tmp_path / "out").read_bytes() == b"x"


def test_files_that_merely_look_similar_are_left_alone(tmp_path: Path) -> None:
    for name in (".out.tmp", ".out.tmp-12", "out.tmp-12-deadbeef", ".out.tmp-12-deadbeef.bak"):
        (tmp_path / name).touch()
    assert store.clean_leftovers(tmp_path) == ()
    assert len(os.listdir(tmp_path)) == 4


def test_where_there_are_no_locks_only_old_leftovers_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    for name, age_s in ((".out.tmp-1-00000001", 60), (".out.tmp-1-00000002", 2 * 24 * 3600)):
        (tmp_path / name).touch()
        then = (tmp_path / name).stat().st_mtime - age_s
        os.utime(tmp_path / name, (then, then))
    with store.atomic_file(tmp_path / "out") as file:
        file.write(b"works without locks")
    assert sorted(os.listdir(tmp_path)) == [".out.tmp-1-00000001", "out"]


def test_an_old_version_moved_aside_by_a_writer_that_died_is_given_back(tmp_path: Path) -> None:
    (tmp_path / ".out.old-1-00000001").mkdir()
    (tmp_path / ".out.old-1-00000001" / "a").write_bytes(b"old")
    assert store.clean_leftovers(tmp_path) == ()
    assert tree(tmp_path) == {"out/a": b"old"}


def test_retire_hides_before_it_deletes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_bytes(b"x")
    recorder = Recorder()
    monkeypatch.setattr(store, "SYSTEM", recorder)
    store.retire(tmp_path / "out")
    assert [name for name, _ in recorder.calls] == ["rename_new", "sync"]
    assert os.listdir(tmp_path) == []


def test_writers_beside_each_other_do_not_disturb_each_other(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for turn in range(10):
            with store.atomic_file(tmp_path / "same", force=True) as file:
                file.write(b"%d" % number * 1000)
            with store.atomic_dir(tmp_path / f"{number}-{turn}") as folder:
                (folder / "a").write_bytes(b"x")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(os.listdir(tmp_path)) == 41
    assert len(set((tmp_path / "same").read_bytes())) == 1


def test_a_name_of_the_greatest_length_works(tmp_path: Path) -> None:
    name = "ü" * 127
    with store.atomic_file(tmp_path / name) as file:
        file.write(b"x")
    assert os.listdir(tmp_path) == [name]


def test_a_forked_child_can_write_and_hash_large_files_too(tmp_path: Path) -> None:
    """The threads that share the hashing do not exist in the child; waiting for them would never end."""
    script = (
        "import os, signal, sys; from pathlib import Path; from thawline.ckpt import store\n"
        "data = bytes(4 << 20)\n"
        "_, digest = store.write_file(Path(sys.argv[1]) / 'parent', [data])\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(20)\n"
        "    same = store.write_file(Path(sys.argv[1]) / 'child', [data])[1] == digest\n"
        "    os._exit(0 if same else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
