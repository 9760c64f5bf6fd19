"""The loader: the same bits in order whatever the workers, and no way to lose, repeat or wait in silence."""

from __future__ import annotations

import errno
import gc
import importlib.util
import itertools
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from thawline.data.loader import BatchRequest, LoadedBatch, Loader
from thawline.data.sampler import Batching, BatchPlan, Cursor
from thawline.errors import DataError

HERE = Path(__file__).parent


def _readers() -> ModuleType:
    """The readers under a name that workers can import too (they get this process's path)."""
    if "thawline_test_reading" not in sys.modules:
        spec = importlib.util.spec_from_file_location("reading", HERE / "reading.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["reading"] = module
        spec.loader.exec_module(module)
        sys.modules["thawline_test_reading"] = module
    return sys.modules["thawline_test_reading"]


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(HERE))
    return _readers()


def requests(n: int = 30, size: int = 3, epoch: int = 0) -> Iterator[BatchRequest]:
    plan = BatchPlan(n, seed=3, batching=Batching(size=size), length=None)
    for cursor, ids in plan.batches(Cursor(epoch)):
        yield BatchRequest(epoch=epoch, cursor=cursor, ids=ids)


def content(batch: LoadedBatch[Any]) -> tuple[object, ...]:
    """Everything of a batch but where it was read, in a form that compares bit for bit."""
    b = batch.batch
    if b is None:
        return batch.request, None, batch.bad
    assert b["x"].is_contiguous()
    return (
        batch.request, b["x"].numpy().tobytes(), b["half"].view(torch.int16).numpy().tobytes(), b["half"].dtype,
        b["ids"].tobytes(), b["draw"], tuple(b["empty"].shape), batch.bad,
    )  # fmt: skip


def load(reader: object, *, workers: int, epoch: int = 0, **kwargs: Any) -> list[tuple[object, ...]]:
    with Loader(reader, seed=7, workers=workers, **kwargs) as loader:  # type: ignore[var-annotated, arg-type]
        return [content(b) for b in loader.iterate(requests(epoch=epoch))]


def gone(pids: set[int], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        alive = {p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE}
        if not alive:
            return True
        time.sleep(0.02)
    return False


def test_workers_prefetch_and_start_method_do_not_change_a_bit(reading: ModuleType):
    want = load(reading.Drawing(), workers=0)
    assert len(want) == 10
    assert load(reading.Drawing(), workers=1, prefetch=1) == want
    assert load(reading.Drawing(), workers=3, prefetch=4) == want
    assert load(reading.Drawing(), workers=2, start="spawn") == want
    assert load(reading.Drawing(), workers=2, start="fork") == want


def test_seed_epoch_and_sample_key_the_draws(reading: ModuleType):
    def draws(seed: int, epoch: int) -> dict[int, tuple[float, ...]]:
        loader = Loader(reading.Drawing(), seed=seed)  # type: ignore[var-annotated]
        batches = [b.batch["x"] for b in loader.iterate(requests(epoch=epoch))]
        return {int(row[0]): tuple(row[2:].tolist()) for x in batches for row in x}

    one = draws(1, 0)
    assert draws(1, 0) == one
    # Other batches in another epoch, other draws for every sample; and all samples differ from each other.
    for other in (draws(1, 1), draws(2, 0)):
        assert other.keys() == one.keys()
        assert all(a != b for k in one for a, b in zip(one[k], other[k], strict=True))
    assert len({v for row in one.values() for v in row}) == 27 * 5


def test_a_sample_draws_the_same_in_whatever_batch_it_stands(reading: ModuleType):
    loader = Loader(reading.Drawing(), seed=1)  # type: ignore[var-annotated]
    rows: dict[int, set[tuple[float, ...]]] = {}
    for size in (1, 4, 30):
        for b in loader.iterate(requests(size=size)):
            for row in b.batch["x"] if b.batch else []:
                rows.setdefault(int(row[0]), set()).add(tuple(row.tolist()))
    assert all(len(v) == 1 for v in rows.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_the_generators_and_threads_of_this_process_are_left_alone(reading: ModuleType, workers: int):
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    threads = torch.get_num_threads()
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    load(reading.Drawing(), workers=workers)
    assert (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()) == before
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_costs_one_sample_and_is_listed(reading: ModuleType, workers: int):
    with Loader(reading.Drawing(), seed=7, workers=workers) as loader:  # type: ignore[var-annotated]
        asked = [BatchRequest(epoch=0, cursor=Cursor(), ids=ids) for ids in ((6, 7, 8), (17, 27), (1,))]
        got = list(loader.iterate(asked))
    assert got[0].batch["ids"].tolist() == [6, 8]
    assert [(b.id, b.key, b.reason) for b in got[0].bad] == [(7, "utt7", "utt7.wav: it is cut short")]
    assert got[1].batch is None
    assert [b.id for b in got[1].bad] == [17, 27]
    assert got[2].bad == ()


def test_what_arrives_from_a_worker_may_be_written_to(reading: ModuleType):
    with Loader(reading.Drawing(), seed=7, workers=1) as loader:  # type: ignore[var-annotated]
        batch = next(loader.iterate(requests())).batch
    batch["x"].add_(1)
    batch["ids"] += 1


def test_an_endless_stream_of_requests_is_drawn_only_as_far_as_is_read_ahead(reading: ModuleType):
    drawn = itertools.count()

    def endless() -> Iterator[BatchRequest]:
        for i in drawn:
            yield BatchRequest(epoch=i, cursor=Cursor(i), ids=(1, 2))

    with Loader(reading.Drawing(), seed=7, workers=2, prefetch=2) as loader:  # type: ignore[var-annotated]
        batches = loader.iterate(endless())
        assert [next(batches).request.epoch for _ in range(5)] == [0, 1, 2, 3, 4]
    assert next(drawn) <= 5 + 4


def test_an_iteration_may_be_left_and_another_begun(reading: ModuleType):
    want = load(reading.Drawing(), workers=0, epoch=1)
    with Loader(reading.Drawing(), seed=7, workers=2, prefetch=3) as loader:  # type: ignore[var-annotated]
        for _ in range(3):
            half = loader.iterate(requests())
            next(half)
            next(half)
            half.close()
            assert [content(b) for b in loader.iterate(requests(epoch=1))] == want
        two = zip(loader.iterate(requests(epoch=1)), loader.iterate(requests(epoch=1)), strict=True)
        assert all(content(a) == content(b) for a, b in two)


def test_batches_larger_than_a_pipe_are_read_ahead_too(reading: ModuleType):
    with Loader(reading.Large(), seed=7, workers=1, prefetch=3) as loader:  # type: ignore[var-annotated]
        firsts = [
            float(b.batch["x"][-1])
            for b in loader.iterate(BatchRequest(epoch=0, cursor=Cursor(), ids=(i,)) for i in (4, 5, 6, 8))
        ]
    assert firsts == [4, 5, 6, 8]


def test_requests_larger_than_a_pipe_do_not_block(reading: ModuleType):
    many = (10**12,) * 8000  # 9 bytes each
    with Loader(reading.Large(), seed=7, workers=1, prefetch=4) as loader:  # type: ignore[var-annotated]
        asked = (BatchRequest(epoch=0, cursor=Cursor(), ids=many) for _ in range(3))
        assert [float(b.batch["x"][0]) for b in loader.iterate(asked)] == [float(np.float32(1e12))] * 3


# --- death ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["forkserver", "fork"])
def test_a_killed_worker_is_replaced_and_its_batch_read_again(reading: ModuleType, tmp_path: Path, start: str):
    said: list[str] = []
    got = load(reading.Deadly(tmp_path, 11), workers=2, tell=said.append, start=start)
    assert got == load(reading.Drawing(), workers=0)
    assert len(said) == 1
    assert "a loader worker was killed by signal 9; its batch Cursor(epoch=0" in said[0]


def test_workers_killed_from_outside_at_any_moment_change_nothing(reading: ModuleType):
    want = load(reading.Drawing(), workers=0)
    with Loader(reading.Drawing(), seed=7, workers=2, tell=lambda _: None) as loader:  # type: ignore[var-annotated]
        got = []
        for i, batch in enumerate(loader.iterate(requests())):
            got.append(content(batch))
            if i in (1, 4, 5):
                os.kill(loader._team[i % 2].process.pid or 0, signal.SIGKILL)
    assert got == want


def test_a_batch_that_always_kills_is_given_up_with_its_samples_named(reading: ModuleType, tmp_path: Path):
    with pytest.raises(DataError) as caught:
        load(reading.Deadly(tmp_path, 11, always=True), workers=1, tell=lambda _: None)
    assert "3 loader workers in a row died over one batch; the last was killed by signal 9" in str(caught.value)
    assert "utt11" in caught.value.where
    assert "out of memory" in caught.value.fix


@pytest.mark.parametrize("how", ["close", "forget", "leave"])
def test_workers_end_with_their_loader(reading: ModuleType, how: str):
    loader = Loader(reading.Slow(0.05), seed=7, workers=2)  # type: ignore[var-annotated]
    batches = loader.iterate(requests())
    next(batches)
    pids = {w.process.pid or 0 for w in loader._team}
    assert not gone(pids, 0)
    if how == "close":
        loader.close()
    elif how == "leave":
        batches.close()
        loader.close()
    del batches, loader
    gc.collect()
    assert gone(pids)


def script(tmp_path: Path, body: str) -> Path:
    path = tmp_path / "script.py"
    path.write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import os, signal, threading, time\nfrom pathlib import Path\nimport reading\n"
        "from thawline.data.loader import *\nfrom thawline.data.sampler import Cursor\n"
        "ask = lambda n: (BatchRequest(epoch=0, cursor=Cursor(0, i), ids=(i % 7,)) for i in range(n))\n"
        + textwrap.dedent(body)
    )
    return path


def test_a_script_without_a_main_guard_is_not_run_again_by_workers(tmp_path: Path):
    path = script(
        tmp_path,
        f"""
        open({str(tmp_path / "runs")!r}, "a").write("x")
        with Loader(reading.Drawing(), seed=1, workers=2) as loader:
            print(sum(1 for _ in loader.iterate(ask(6))))
        """,
    )
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "6\n", "")
    assert (tmp_path / "runs").read_text() == "x"


def test_a_reader_defined_in_the_script_itself_works(tmp_path: Path):
    path = script(
        tmp_path,
        """
        class Mine:
            def read(self, id, epoch): return id
            def collate(self, samples): return sum(samples)
        if __name__ == "__main__":
            with Loader(Mine(), seed=1, workers=1) as loader:
                print(*[b.batch for b in loader.iterate(ask(4))])
        """,
    )
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 1 2 3\n", "")


@pytest.mark.parametrize("start", ["forkserver", "fork", "spawn"])
def test_workers_end_when_the_parent_is_killed(tmp_path: Path, start: str):
    path = script(
        tmp_path,
        f"""
        if __name__ == "__main__":
            loader = Loader(reading.Slow(0.05), seed=1, workers=2, start={start!r})
            batches = loader.iterate(ask(1000))
            next(batches)
            print(*[w.process.pid for w in loader._team], flush=True)
            time.sleep(60)
        """,
    )
    parent = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = {int(p) for p in parent.stdout.readline().split()}
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(pids)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_reaches_only_the_handler_of_the_parent(tmp_path: Path, number: signal.Signals):
    path = script(
        tmp_path,
        f"""
        seen = []
        signal.signal({int(number)}, lambda *a: seen.append(1))
        loader = Loader(reading.Slow(0.01), seed=1, workers=2, tell=lambda m: print("TOLD", m))
        batches = loader.iterate(ask(60))
        next(batches)
        before = [w.process.pid for w in loader._team]
        print("ready", flush=True)
        got = 1 + sum(1 for _ in batches)
        deadline = time.monotonic() + 20
        while not seen and time.monotonic() < deadline:
            time.sleep(0.01)
        got += sum(1 for _ in loader.iterate(ask(4)))
        print(got, len(seen), before == [w.process.pid for w in loader._team], flush=True)
        loader.close()
        """,
    )
    run = subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "ready\n"
    os.killpg(run.pid, number)
    out, err = run.communicate(timeout=60)
    assert (out, err) == ("64 1 True\n", "")


def test_forking_workers_beside_busy_torch_threads_does_not_hang(tmp_path: Path):
    path = script(
        tmp_path,
        """
        import torch
        torch.set_num_threads(2)
        stop = threading.Event()
        def busy():
            x = torch.rand(300, 300)
            while not stop.is_set():
                x = (x @ x).softmax(0)
        thread = threading.Thread(target=busy); thread.start()
        for _ in range(3):
            with Loader(reading.Drawing(), seed=1, workers=2) as loader:
                assert sum(1 for _ in loader.iterate(ask(8))) == 8
        stop.set(); thread.join()
        print("done")
        """,
    )
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=90, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


# --- trouble ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_slow_storage_is_waited_for_with_a_message(reading: ModuleType, workers: int):
    said: list[str] = []
    with Loader(reading.Slow(0.5), seed=7, workers=workers, stall_s=0.15, tell=said.append) as loader:  # type: ignore[var-annotated]
        got = list(loader.iterate([BatchRequest(epoch=0, cursor=Cursor(0, 2, 1), ids=(1, 2))]))
    assert got[0].batch["ids"].tolist() == [1, 2]
    assert 2 <= len(said) <= 10  # at 0.15, 0.3, 0.6 seconds, and so on while a worker starts
    assert said[0].startswith("waiting for data for 0 s (Cursor(epoch=0, window=2, batch=1), 2 samples)")


@pytest.mark.parametrize("workers", [0, 1])
def test_storage_that_is_away_is_waited_for_and_loses_no_sample(reading: ModuleType, tmp_path: Path, workers: int):
    said: list[str] = []
    with Loader(reading.Away(tmp_path, 2), seed=7, workers=workers, tell=said.append) as loader:  # type: ignore[var-annotated]
        got = content(next(loader.iterate(requests())))
    assert got == load(reading.Drawing(), workers=0)[0]
    assert len(said) == 6
    assert "waiting for storage for 0 s: [Errno 116] Stale file handle: 'utt" in said[0]


def test_a_bad_block_is_tried_again_and_then_costs_one_sample(reading: ModuleType, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(time, "sleep", lambda s: None)
    loader = Loader(reading.Away(tmp_path, 99, errno.EIO), seed=7, tell=lambda _: None)  # type: ignore[var-annotated]
    got = next(loader.iterate([BatchRequest(epoch=0, cursor=Cursor(), ids=(3,))]))
    assert got.batch is None
    assert "Input/output error" in got.bad[0].reason
    assert len((tmp_path / "3").read_bytes()) == 5


def test_a_file_that_is_not_there_costs_one_sample(reading: ModuleType, tmp_path: Path):
    loader = Loader(reading.Away(tmp_path, 99, errno.ENOENT), seed=7)  # type: ignore[var-annotated]
    got = next(loader.iterate([BatchRequest(epoch=0, cursor=Cursor(), ids=(3,))]))
    assert "No such file or directory" in got.bad[0].reason


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mistake_in_user_code_is_raised_in_its_turn_and_not_skipped(reading: ModuleType, workers: int):
    asked = [BatchRequest(epoch=0, cursor=Cursor(), ids=(i,)) for i in (1, 2, 5, 6)]
    with Loader(reading.Faulty(KeyError("mine")), seed=7, workers=workers) as loader:  # type: ignore[var-annotated]
        batches = loader.iterate(asked)
        assert [next(batches).request.ids for _ in range(2)] == [(1,), (2,)]
        with pytest.raises(KeyError, match="mine") as caught:
            next(batches)
        assert sum(1 for _ in loader.iterate(asked[:2])) == 2
    if workers:
        assert "reading.py" in str(caught.value.__cause__)  # where it happened, in the worker


def test_an_error_that_cannot_travel_is_told(reading: ModuleType):
    with (
        Loader(reading.Untellable(), seed=7, workers=1) as loader,  # type: ignore[var-annotated]
        pytest.raises(RuntimeError, match="Unpicklable: 1 and 2"),
    ):
        list(loader.iterate([BatchRequest(epoch=0, cursor=Cursor(), ids=(5,))]))


def test_a_reader_that_cannot_be_unpickled_says_why(reading: ModuleType):
    with Loader(reading.Stubborn(), seed=7, workers=1) as loader, pytest.raises(RuntimeError, match="not here"):  # type: ignore[var-annotated]
        list(loader.iterate(requests()))


def test_seeding_costs_little_per_sample(reading: ModuleType):
    from thawline.data.sample_reading import seed_sample

    best = min(_time(lambda: [seed_sample(1, 0, i) for i in range(200)]) for _ in range(5)) / 200
    assert best < 200e-6  # about 30 microseconds here


def _time(f: Any) -> float:
    begin = time.perf_counter()
    f()
    return time.perf_counter() - begin


def test_no_thread_is_left_behind(reading: ModuleType):
    before = threading.active_count()
    load(reading.Drawing(), workers=0)
    load(reading.Drawing(), workers=1)
    time.sleep(0.05)
    assert threading.active_count() <= before
