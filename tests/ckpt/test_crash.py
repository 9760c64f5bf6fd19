"""The crash sweep: whatever moment a save is interrupted at, loading gives the whole old or the whole new checkpoint.

Three kinds of interruption, each at every system call of the save:
- the process dies after call k (simulated for all k, and with a real SIGKILL);
- the power fails after call k: writes and directory changes not yet flushed are lost, cut short or done out of order;
- call k fails (disk full, input/output error, quota) or takes only a part of the bytes.

Each check is shown to fail on a planted bug.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from thawline.ckpt import manifest, store
from thawline.ckpt.delta import BaseRef
from thawline.ckpt.load import read_newest
from thawline.ckpt.retention import Keep, prune
from thawline.ckpt.save import save_checkpoint
from thawline.errors import CheckpointError

REF = BaseRef.of({"w": torch.zeros(6000)})
CALLS = (
    "make_dir",
    "create",
    "write",
    "write_at",
    "flush",
    "sync",
    "rename_new",
    "replace",
    "exchange",
    "link",
    "remove",
    "remove_dir",
)
OLD, NEW = 1, 2


def save(root: Path, step: int, version: int) -> None:
    """A checkpoint in which every file says the version."""
    save_checkpoint(
        root,
        step=step,
        delta={"w": torch.full((6000,), float(version))},
        optimizer={"w/exp_avg": torch.full((6000,), float(version))},
        state={"version": version},
        base=REF,
        ema={"w": torch.full((6000,), float(version))},
    )


def version_in(root: Path) -> int:
    """The version of the newest whole checkpoint; fails if its parts are of different versions."""
    found = read_newest(root, report=lambda line: None)
    tensors = (*found.delta.values(), *found.optimizer.values(), *found.ema.values())
    versions = {int(v) for t in tensors for v in t.unique()}
    versions.add(found.state["version"])
    (version,) = versions
    return version


@dataclass(frozen=True)
class Scenario:
    """Something that is done to a directory of checkpoints that holds OLD, after which it holds NEW."""

    name: str
    act: Callable[[Path], None]
    system: type[store.FileSystem] = store.FileSystem


class NoExchange(store.FileSystem):
    """A system that cannot swap two names (a forced replacement then takes two renames)."""

    def exchange(self, one: Path, other: Path) -> None:
        raise OSError(errno.EINVAL, "Invalid argument", str(other))


def next_step(root: Path) -> None:
    save(root, 11, NEW)


def same_step(root: Path) -> None:
    save(root, 10, NEW)


def next_step_and_prune(root: Path) -> None:
    save(root, 11, NEW)
    prune(root, Keep(last=1))


SCENARIOS = [
    Scenario("the next step", next_step),
    Scenario("the same step again", same_step),
    Scenario("the same step again, without exchange", same_step, NoExchange),
    Scenario("the next step, then pruning", next_step_and_prune),
]
scenarios = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)


class Killed(BaseException):
    """The process is dead: nothing after this reaches the disk."""


def shim(
    system: type[store.FileSystem], before: Callable[[int, str], None], after: Callable[[int, str], None]
) -> store.FileSystem:
    """A file system that calls `before(k, name)` and `after(k, name)` around its k-th call, k from 1."""
    counter = itertools.count(1)

    def wrap(name: str) -> Callable[..., object]:
        def call(self: store.FileSystem, *args: object) -> object:
            k = next(counter)
            before(k, name)
            result = getattr(system, name)(self, *args)
            after(k, name)
            return result

        return call

    made: store.FileSystem = type("Shim", (system,), {name: wrap(name) for name in CALLS})()
    return made


def killed_after(limit: int, system: type[store.FileSystem]) -> store.FileSystem:
    def before(k: int, name: str) -> None:
        if k > limit:
            raise Killed

    def after(k: int, name: str) -> None:
        if k == limit:
            raise Killed

    return shim(system, before, after)


def failing_at(broken: Callable[[int], bool], code: int, system: type[store.FileSystem]) -> store.FileSystem:
    def before(k: int, name: str) -> None:
        if broken(k):
            raise OSError(code, os.strerror(code))

    return shim(system, before, lambda k, name: None)


def count_calls(scenario: Scenario, root: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    names: list[str] = []
    fresh(root)
    run_with(
        shim(scenario.system, lambda k, name: names.append(name), lambda k, name: None), scenario, root, monkeypatch
    )
    return len(names)


def fresh(root: Path) -> None:
    shutil.rmtree(root, ignore_errors=True)
    save(root, 10, OLD)


def run_with(system: store.FileSystem, scenario: Scenario, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store, "SYSTEM", system)
        scenario.act(root)


def visible(root: Path) -> list[str]:
    return sorted(name for name in os.listdir(root) if not name.startswith("."))


@pytest.fixture(params=["beside TMPDIR", "another file system than TMPDIR"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A place for checkpoints on each kind of file system."""
    if request.param == "beside TMPDIR":
        yield tmp_path / "checkpoints"
        return
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == Path(tempfile.gettempdir()).stat().st_dev:
        pytest.skip("/dev/shm is not a second file system here")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder) / "checkpoints"


@pytest.fixture
def swift(tmp_path: Path) -> Iterator[Path]:
    """A place in memory where there is one: for sweeps in which the flushes are not real."""
    memory = Path("/dev/shm")
    if os.access(memory, os.W_OK):
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            yield Path(folder)
    else:
        yield tmp_path


@scenarios
def test_a_process_killed_after_any_call_leaves_the_old_or_the_new_one_whole(
    scenario: Scenario, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count_calls(scenario, root, monkeypatch)
    assert calls > 12
    seen = []
    for k in range(calls + 1):
        fresh(root)
        with suppress(Killed):
            run_with(killed_after(k, scenario.system), scenario, root, monkeypatch)
        seen.append(version_in(root))
        save(root, 12, 3)  # the next save works and clears up
        assert version_in(root) == 3
        assert visible(root) == sorted(os.listdir(root))
    assert seen == sorted(seen)  # old up to some call, new from then on
    assert set(seen) == {OLD, NEW}


KILLER = """
    import os, sys, signal
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from thawline.ckpt import store
    from thawline.ckpt.delta import BaseRef
    from thawline.ckpt.save import save_checkpoint

    ref = BaseRef.of({"w": torch.zeros(6000)})
    def save(root, version):
        one = torch.full((6000,), float(version))
        save_checkpoint(root, step=10, delta={"w": one}, optimizer={"w/exp_avg": one},
                        state={"version": version}, base=ref)

    def wrap(name, limit, seen=[0]):
        inner = getattr(store.FileSystem, name)
        def call(self, *args):
            result = inner(self, *args)
            seen[0] += 1
            if seen[0] == limit:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return call

    for k in range(1, int(sys.argv[2]) + 1):
        child = os.fork()
        if child == 0:
            root = Path(sys.argv[1]) / str(k)
            save(root, 1)
            names = "make_dir create write sync rename_new exchange remove remove_dir".split()
            store.SYSTEM = type("Shim", (store.FileSystem,), {n: wrap(n, k) for n in names})()
            save(root, 2)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_real_sigkill_after_any_call_leaves_the_old_or_the_new_one_whole(tmp_path: Path) -> None:
    calls = 28
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLER), str(tmp_path), str(calls)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    codes = [int(line) for line in done.stdout.split()]
    assert codes[-1] == 0  # more kills were asked for than the save has calls
    assert codes.count(-signal.SIGKILL) > 15
    seen = [version_in(tmp_path / str(k)) for k in range(1, calls + 1)]
    assert set(seen) == {OLD, NEW}
    assert seen == sorted(seen)


@scenarios
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=["ENOSPC", "EIO", "EDQUOT"])
@pytest.mark.parametrize("lasting", [False, True], ids=["one call fails", "every call from there on fails"])
def test_a_call_that_fails_leaves_the_old_one_or_the_save_went_through(
    scenario: Scenario, code: int, lasting: bool, swift: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = swift / "checkpoints"
    calls = count_calls(scenario, root, monkeypatch)
    refused = 0
    for k in range(1, calls + 1):
        fresh(root)
        system = failing_at((lambda n, k=k: n >= k) if lasting else (lambda n, k=k: n == k), code, scenario.system)
        try:
            run_with(system, scenario, root, monkeypatch)
            told = 0
        except store.StorageError as exc:
            told = exc.errno
        assert told in (0, code)
        assert version_in(root) in ((OLD, NEW) if told else (NEW,))
        refused += bool(told)
        save(root, 12, 3)
        assert version_in(root) == 3
        assert visible(root) == sorted(os.listdir(root))
    assert refused > 10


def test_a_refused_save_leaves_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "checkpoints"
    for k in range(1, 15):
        fresh(root)
        with pytest.raises(store.StorageError):
            run_with(failing_at(lambda n, k=k: n == k, errno.ENOSPC, store.FileSystem), SCENARIOS[0], root, monkeypatch)
        assert os.listdir(root) in (["step-00000010"], ["step-00000010", "step-00000011"])


def test_short_writes_at_any_call_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(store.FileSystem):
        def write(self, descriptor: int, data: store.Buffer) -> int:
            view = memoryview(data)
            return super().write(descriptor, view[: max(1, len(view) // 3)])

    root = tmp_path / "checkpoints"
    fresh(root)
    run_with(Short(), SCENARIOS[0], root, monkeypatch)
    assert version_in(root) == NEW
    save(tmp_path / "whole", 11, NEW)
    for name in os.listdir(root / "step-00000011"):
        one, other = (folder / "step-00000011" / name for folder in (root, tmp_path / "whole"))
        assert one.read_bytes() == other.read_bytes()


def test_a_tmpdir_that_is_gone_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    save(tmp_path / "checkpoints", 10, OLD)
    assert version_in(tmp_path / "checkpoints") == OLD


FILLER = """
    import sys
    from pathlib import Path
    import torch
    from thawline.ckpt import store
    from thawline.ckpt.delta import BaseRef
    from thawline.ckpt.load import read_newest
    from thawline.ckpt.save import Saver

    ref = BaseRef.of({"w": torch.zeros(20000)})
    root = Path(sys.argv[1])
    store._refuse_without_room = lambda target, need: None  # let the writes themselves meet the full disk
    with Saver(root, base=ref) as saver:
        for step in range(1, 20):
            one = torch.full((20000,), float(step))
            handle = saver.save(step=step, delta={"w": one}, optimizer={"w/m": one}, state={})
            saver.drain()
            if handle.error is not None:
                break
    print(read_newest(root, report=print).step, len(list(root.iterdir())), handle.step, handle.error)
"""


def test_a_real_file_system_that_fills_up_keeps_the_last_whole_one(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    command = (
        f"mount -t tmpfs -o size=640k tmpfs {mount} && exec {sys.executable} -c '{textwrap.dedent(FILLER)}' {mount}"
    )
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("a small tmpfs cannot be mounted here (no private mount namespace)")
    done = subprocess.run(["unshare", "-m", "sh", "-c", command], check=False, capture_output=True, text=True)
    if "mount:" in done.stderr:
        pytest.skip(f"a small tmpfs cannot be mounted here: {done.stderr.strip()}")
    assert done.stderr == ""
    step, entries, failed, *message = done.stdout.split()
    assert int(step) == int(entries) == int(failed) - 1 == 3  # 3 x 162 kB fit into 640 kB, a fourth does not
    assert " ".join(message).startswith(f"{mount}/step-00000004: cannot write: No space left on device (needs 16")


# --- power loss -------------------------------------------------------------------------------------------------------


@dataclass
class Op:
    """One change, in terms of the objects it touches: `inode` is what a flush must be asked for to make it durable."""

    kind: str
    inode: int
    name: str = ""
    other: str = ""
    child: int = -1
    offset: int = 0
    data: bytes = b""


@dataclass
class Disk:
    """Files are byte arrays, directories map names to inode numbers; inode 0 is the directory of checkpoints."""

    nodes: dict[int, bytearray | dict[str, int]] = field(default_factory=dict)

    def apply(self, op: Op) -> None:
        node = self.nodes[op.inode]
        if op.kind == "write":
            assert isinstance(node, bytearray)
            node.extend(bytes(max(0, op.offset + len(op.data) - len(node))))
            node[op.offset : op.offset + len(op.data)] = op.data
            return
        assert isinstance(node, dict)
        if op.kind == "add":
            node[op.name] = op.child
        elif op.kind == "delete":
            node.pop(op.name, None)
        elif op.kind == "exchange" and op.name in node and op.other in node:
            node[op.name], node[op.other] = node[op.other], node[op.name]
        elif op.kind == "rename" and op.name in node:
            node[op.other] = node.pop(op.name)

    def write_out(self, inode: int, place: Path) -> None:
        node = self.nodes[inode]
        if isinstance(node, bytearray):
            place.write_bytes(node)
            return
        place.mkdir()
        for name, child in node.items():
            self.write_out(child, place / name)

    def copy(self) -> Disk:
        return Disk({inode: node.copy() for inode, node in self.nodes.items()})


class Recorder(store.FileSystem):
    """Does every call and keeps a log of what it changed, from which the disk after a power loss can be made."""

    def __init__(self, root: Path, *, lost_syncs: Callable[[Path], bool] = lambda path: False) -> None:
        self.root = root
        self.disk = Disk()
        self.log: list[Op] = []
        self.lost_syncs = lost_syncs
        self._numbers = itertools.count(1)
        self._read_in(root, 0)
        self.start = self.disk.copy()
        self._files: dict[int, int] = {}

    def _read_in(self, path: Path, inode: int) -> None:
        if path.is_file():
            self.disk.nodes[inode] = bytearray(path.read_bytes())
            return
        entries: dict[str, int] = {}
        self.disk.nodes[inode] = entries
        for child in sorted(path.iterdir()):
            entries[child.name] = next(self._numbers)
            self._read_in(child, entries[child.name])

    def _inode(self, path: Path) -> int:
        inode = 0
        for part in path.relative_to(self.root).parts:
            node = self.disk.nodes[inode]
            assert isinstance(node, dict)
            inode = node[part]
        return inode

    def _note(self, op: Op) -> None:
        self.log.append(op)
        if op.kind != "sync":
            self.disk.apply(op)

    def _new(self, path: Path, node: bytearray | dict[str, int]) -> int:
        inode = next(self._numbers)
        self.disk.nodes[inode] = node
        self.start.nodes[inode] = node.copy()
        self._note(Op("add", self._inode(path.parent), name=path.name, child=inode))
        return inode

    def make_dir(self, path: Path) -> None:
        super().make_dir(path)
        self._new(path, {})

    def create(self, path: Path) -> int:
        descriptor = super().create(path)
        self._files[descriptor] = self._new(path, bytearray())
        return descriptor

    def write(self, descriptor: int, data: store.Buffer) -> int:
        offset = os.lseek(descriptor, 0, os.SEEK_CUR)
        taken = super().write(descriptor, memoryview(data)[:9000])  # several writes a file, to lose some of them
        piece = bytes(memoryview(data)[:taken])
        self._note(Op("write", self._files[descriptor], offset=offset, data=piece))
        return taken

    def sync(self, path: Path) -> None:
        if not self.lost_syncs(path):
            self._note(Op("sync", self._inode(path)))

    def rename_new(self, old: Path, new: Path) -> None:
        super().rename_new(old, new)
        self._note(Op("rename", self._inode(old.parent), name=old.name, other=new.name))

    def exchange(self, one: Path, other: Path) -> None:
        super().exchange(one, other)
        self._note(Op("exchange", self._inode(one.parent), name=one.name, other=other.name))

    def remove(self, path: Path) -> None:
        super().remove(path)
        self._note(Op("delete", self._inode(path.parent), name=path.name))

    def remove_dir(self, path: Path) -> None:
        super().remove_dir(path)
        self._note(Op("delete", self._inode(path.parent), name=path.name))


class RecorderNoExchange(Recorder):
    def exchange(self, one: Path, other: Path) -> None:
        raise OSError(errno.EINVAL, "Invalid argument", str(other))


def after_power_loss(recorder: Recorder, k: int, dice: random.Random) -> Iterator[Disk]:
    """Disks that may be found after the power failed when k changes had been asked for.

    What was flushed is there. Of the rest: nothing, all, all but one, one alone, all with the writes cut short or full
    of zeros, and some random choices. So late changes without earlier ones (another order) are among them.
    """
    done = recorder.log[:k]
    synced = [
        any(later.kind == "sync" and later.inode == op.inode for later in done[i + 1 :]) for i, op in enumerate(done)
    ]
    open_ops = [i for i, op in enumerate(done) if op.kind != "sync" and not synced[i]]

    def disk(keep: set[int], spoil: Callable[[Op], Op] = lambda op: op) -> Disk:
        made = recorder.start.copy()
        for i, op in enumerate(done):
            if op.kind == "sync" or (i in open_ops and i not in keep):
                continue
            made.apply(spoil(op) if i in open_ops and op.kind == "write" else op)
        return made

    everything = set(open_ops)
    yield disk(set())
    yield disk(everything)
    yield disk(everything, lambda op: Op("write", op.inode, offset=op.offset, data=op.data[: len(op.data) // 2]))
    yield disk(everything, lambda op: Op("write", op.inode, offset=op.offset, data=bytes(len(op.data))))
    for i in open_ops:
        yield disk(everything - {i})
        yield disk({i})
    for _ in range(4):
        yield disk({i for i in open_ops if dice.random() < 0.5})


def sweep_power_loss(
    scenario: Scenario, folder: Path, monkeypatch: pytest.MonkeyPatch, lost_syncs: Callable[[Path], bool]
) -> tuple[int, list[str]]:
    """How many disks were looked at, and what was wrong with them."""
    root = folder / "checkpoints"
    fresh(root)
    kind = RecorderNoExchange if scenario.system is NoExchange else Recorder
    recorder = kind(root, lost_syncs=lost_syncs)
    run_with(recorder, scenario, root, monkeypatch)
    faults: list[str] = []
    looked = 0
    dice = random.Random(7)
    for k in range(len(recorder.log) + 1):
        for disk in after_power_loss(recorder, k, dice):
            looked += 1
            found = folder / "found"
            disk.write_out(0, found)
            try:
                version = version_in(found)
                if k == len(recorder.log) and version != NEW:
                    faults.append("a save that had returned is lost")
            except CheckpointError as exc:
                faults.append(f"after {k} changes: {exc}")
            shutil.rmtree(found)
    return looked, faults


@scenarios
def test_a_power_loss_at_any_moment_leaves_the_old_or_the_new_one_whole_and_what_was_saved_stays(
    scenario: Scenario, swift: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, faults = sweep_power_loss(scenario, swift, monkeypatch, lambda path: False)
    assert faults == []
    assert looked > 300


PLANTED = {
    "no file is flushed": (SCENARIOS[1], lambda path: path.suffix in (".json", ".safetensors")),
    "the weights are not flushed": (SCENARIOS[1], lambda path: path.name == "delta.safetensors"),
    "the manifest is not flushed": (SCENARIOS[1], lambda path: path.name == manifest.NAME),
    "the new directory is not flushed": (SCENARIOS[1], lambda path: ".tmp-" in path.name),
    "the parent is not flushed": (SCENARIOS[0], lambda path: path.name == "checkpoints"),
    "nothing is flushed": (SCENARIOS[0], lambda path: True),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_the_power_loss_sweep_finds_a_planted_bug(bug: str, swift: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario, lost_syncs = PLANTED[bug]
    _, faults = sweep_power_loss(scenario, swift, monkeypatch, lost_syncs)
    assert faults != []


def test_the_kill_sweep_finds_a_save_that_writes_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug is WeNet's way: the old files are opened and written over."""

    def in_place(target: Path, temporary: Path) -> None:
        for file in sorted(temporary.iterdir()):
            (target / file.name).unlink()
            store.SYSTEM.rename_new(file, target / file.name)

    def swap(temporary: Path, target: Path, *, force: bool) -> None:
        if target.exists():
            in_place(target, temporary)
        else:
            store.SYSTEM.rename_new(temporary, target)

    monkeypatch.setattr(store, "_swap_in", swap)
    root = tmp_path / "checkpoints"
    scenario = SCENARIOS[1]
    lost = 0
    for k in range(count_calls(scenario, root, monkeypatch)):
        fresh(root)
        with suppress(Killed):
            run_with(killed_after(k, scenario.system), scenario, root, monkeypatch)
        try:
            version_in(root)
        except CheckpointError:
            lost += 1
    assert lost > 0


def test_without_digests_a_mixture_of_two_saves_would_be_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why the manifest holds digests: sizes alone cannot tell two versions apart."""
    save(tmp_path, 1, OLD)
    save(tmp_path, 2, NEW)
    shutil.copy(tmp_path / "step-00000001" / "optimizer.safetensors", tmp_path / "step-00000002")
    assert manifest.verify(tmp_path / "step-00000002", digests=False) == ()
    assert manifest.verify(tmp_path / "step-00000002")[0].startswith("optimizer.safetensors: altered")
    assert version_in(tmp_path) == OLD


def test_the_manifest_is_the_last_file_that_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "checkpoints"
    fresh(root)
    recorder = Recorder(root)
    run_with(recorder, SCENARIOS[0], root, monkeypatch)
    created = [op.name for op in recorder.log if op.kind == "add"]
    assert created[-1] == manifest.NAME
    last_write = max(i for i, op in enumerate(recorder.log) if op.kind == "write")
    written = recorder.log[last_write].inode
    assert written == next(op.child for op in recorder.log if op.name == manifest.NAME)
