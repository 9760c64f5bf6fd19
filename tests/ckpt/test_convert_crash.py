"""A conversion stopped at any moment, or refused by the storage at any call: DST absent or whole, SRC untouched."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tests.ckpt import foreign
from tests.ckpt.test_convert import tree
from tests.ckpt.test_crash import Killed, failing_at, killed_after, shim

from thawline.ckpt import store
from thawline.ckpt.convert import convert
from thawline.ckpt.verify import verify
from thawline.errors import CheckpointError

TARGETS = ("safetensors", "torch", "hf")
targets = pytest.mark.parametrize("to", TARGETS)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    foreign.huggingface(tmp_path / "source")
    return tmp_path / "source"


def name_of(to: str) -> str:
    return {"safetensors": "m.safetensors", "torch": "m.pt", "hf": "m"}[to]


def count(source: Path, target: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many calls that change the disk a conversion makes."""
    names: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(store, "SYSTEM", shim(store.FileSystem, lambda k, name: names.append(name), lambda k, name: None))
        convert(source, target, to=to)
    assert "write_at" in names
    return len(names)


def attempt(system: store.FileSystem, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store, "SYSTEM", system)
        act()


@targets
def test_killed_after_any_call_the_target_is_absent_or_whole(
    to: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, want = tree(source), verify(source).fingerprint
    calls = count(source, tmp_path / "count" / name_of(to), to, monkeypatch)
    seen = []
    for k in range(calls + 1):
        folder = tmp_path / str(k)
        folder.mkdir()
        target = folder / name_of(to)
        with suppress(Killed):
            attempt(
                killed_after(k, store.FileSystem), lambda target=target: convert(source, target, to=to), monkeypatch
            )
        seen.append(target.exists())
        if target.exists():
            found = verify(target)
            assert found.ok
            assert found.fingerprint == want
        convert(source, target, to=to, force=True)  # the next one works and clears up
        assert os.listdir(folder) == [target.name]
        shutil.rmtree(folder)
    assert seen == sorted(seen)
    assert set(seen) == {False, True}
    assert tree(source) == before


@targets
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=errno.errorcode.get)
def test_refused_at_any_call_the_old_target_stays_and_no_litter(
    to: str, code: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(source)
    calls = count(source, tmp_path / "count" / name_of(to), to, monkeypatch)
    folder = tmp_path / "out"
    foreign.huggingface(tmp_path / "older")
    convert(tmp_path / "older", folder / name_of(to), to=to, dtype="fp16")
    old = tree(folder)
    for k in range(1, calls):
        broken = failing_at(lambda n, k=k: n == k, code, store.FileSystem)
        with suppress(CheckpointError):  # any other error is a failure; one while the old one is removed is none
            attempt(broken, lambda: convert(source, folder / name_of(to), to=to, force=True), monkeypatch)
        if tree(folder) != old:  # renamed, and then the flush of the parent was refused: the new one is whole
            assert verify(folder / name_of(to)).ok
            convert(tmp_path / "older", folder / name_of(to), to=to, dtype="fp16", force=True)
        assert [name for name in os.listdir(folder) if not name.startswith(".")] == [name_of(to)]
    assert tree(source) == before


def test_short_writes_at_any_call_change_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(store.FileSystem):
        def write_at(self, descriptor: int, data: store.Buffer, place: int) -> int:
            return super().write_at(descriptor, memoryview(data)[: max(len(data) // 3, 1)], place)

    convert(source, tmp_path / "whole.safetensors", to="safetensors")
    attempt(Short(), lambda: convert(source, tmp_path / "short.safetensors", to="safetensors"), monkeypatch)
    assert (tmp_path / "short.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


CONVERT = textwrap.dedent("""
    import sys
    from thawline.ckpt.convert import convert
    from thawline.errors import CheckpointError
    print("go", flush=True)
    try:
        convert(sys.argv[1], sys.argv[2], to=sys.argv[3])
    except CheckpointError as error:
        print(error)
        sys.exit(4)
""")


@pytest.mark.storm
def test_a_storm_of_kills_at_random_moments(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    torch.save({f"w{i}": torch.randn(300_000, generator=g) for i in range(60)}, tmp_path / "x.pt")
    before, want = tree(tmp_path / "x.pt"), verify(tmp_path / "x.pt").fingerprint
    draw = random.Random(1)
    killed = whole = 0
    for attempt_number in range(60):
        to = TARGETS[attempt_number % 2]
        folder = tmp_path / "out"
        target = folder / name_of(to)
        command = [sys.executable, "-c", CONVERT, tmp_path / "x.pt", target, to]
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(draw.uniform(0, 0.8))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if target.exists():
            whole += 1
            assert verify(target).fingerprint == want
        else:
            killed += 1
        assert tree(tmp_path / "x.pt") == before
        shutil.rmtree(folder, ignore_errors=True)
    assert killed
    assert whole


@pytest.mark.long
@targets
def test_a_real_file_system_that_fills_up_leaves_nothing_and_says_so(to: str, tmp_path: Path) -> None:
    torch.save({f"w{i}": torch.randn(40_000) for i in range(8)}, tmp_path / "x.pt")
    before = tree(tmp_path / "x.pt")
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("a small tmpfs cannot be mounted here (no private mount namespace)")
    draw = random.Random(0)
    mount = tmp_path / "small"
    mount.mkdir()
    for _ in range(4):
        size = draw.randrange(8_000, 1_200_000)  # the result needs 1.28 MB
        program = CONVERT.replace(
            'print("go", flush=True)',
            "from thawline.ckpt import store\nstore._refuse_without_room = lambda target, need: None",
        )
        (tmp_path / "program.py").write_text(program + "\n")
        command = (
            f"mount -t tmpfs -o size={size} tmpfs {mount} && "
            f"{sys.executable} {tmp_path}/program.py {tmp_path}/x.pt {mount}/{name_of(to)} {to}; "
            f"code=$?; ls -A {mount}; exit $code"
        )
        done = subprocess.run(["unshare", "-m", "sh", "-c", command], check=False, capture_output=True, text=True)
        if "mount:" in done.stderr:
            pytest.skip(f"a small tmpfs cannot be mounted here: {done.stderr.strip()}")
        assert done.returncode == 4, done.stderr
        assert "cannot write: No space left on device" in done.stdout
        assert done.stdout.rstrip().splitlines()[-1].startswith("  fix:")  # and nothing is listed after it
    assert tree(tmp_path / "x.pt") == before
