"""Writing checkpoints, at once and behind the training thread."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tests.ckpt.test_crash import Killed, killed_after
from torch import Tensor, nn

from thawline.ckpt import manifest, store
from thawline.ckpt.delta import BaseRef, delta_of
from thawline.ckpt.load import read_checkpoint, read_newest
from thawline.ckpt.manifest import verify
from thawline.ckpt.save import OPTIMIZER, PARKED, Saver, Staging, save_checkpoint
from thawline.errors import CheckpointError

BASE = {"encoder.weight": torch.ones(64, 64), "decoder.weight": torch.ones(64, 64), "decoder.steps": torch.tensor(0)}
REF = BaseRef.of(BASE, path="models/base")
STATE = {"step": 1200, "history": [{"step": 1000, "valid/loss": 0.1 + 0.2}], "phase": 1, "scale": None}


def trained(scale: float = 2.0) -> dict[str, Tensor]:
    return {"decoder.weight": BASE["decoder.weight"] * scale, "decoder.steps": torch.tensor(7)}


def optimizer() -> dict[str, Tensor]:
    return {"decoder.weight/exp_avg": torch.rand(64, 64), "decoder.weight/step": torch.tensor(7.0)}


def shas(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


class Blocked(store.FileSystem):
    """Waits in the first write until released; then fails with `code` if one is given."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.reached = threading.Event()
        self.released = threading.Event()

    def write(self, descriptor: int, data: store.Buffer) -> int:
        self.reached.set()
        assert self.released.wait(10)
        if self.code:
            raise OSError(self.code, os.strerror(self.code))
        return super().write(descriptor, data)


def test_a_checkpoint_is_four_files_named_for_its_step(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "c", step=1200, delta=trained(), optimizer=optimizer(), state=STATE, base=REF)
    assert path == tmp_path / "c" / "step-00001200"
    assert sorted(shas(path)) == ["MANIFEST.json", "delta.safetensors", "optimizer.safetensors", "state.json"]
    assert verify(path) == ()
    assert json.loads((path / "state.json").read_bytes()) == STATE
    assert sorted(safetensors.torch.load_file(path / "delta.safetensors")) == ["decoder.steps", "decoder.weight"]
    assert os.listdir(tmp_path / "c") == ["step-00001200"]


def test_averages_are_a_file_of_their_own_and_tied_names_lead_to_one_tensor(tmp_path: Path) -> None:
    average = torch.rand(64, 64)
    ema = {"decoder.weight": average, "again.weight": average}
    path = save_checkpoint(tmp_path, step=1, delta=trained(), optimizer={}, state={}, base=REF, ema=ema)
    assert sorted(safetensors.torch.load_file(path / "ema.safetensors")) == ["again.weight"]
    found = read_checkpoint(path).ema
    assert found.keys() == ema.keys()
    assert all(torch.equal(t, average) for t in found.values())
    with Saver(tmp_path / "behind", base=REF) as saver:
        behind = saver.save(step=1, delta=trained(), optimizer={}, state={}, ema=ema).wait()
    assert shas(behind) == shas(path)


def test_the_same_state_gives_the_same_files(tmp_path: Path) -> None:
    opt = optimizer()
    one = save_checkpoint(tmp_path / "a", step=3, delta=trained(), optimizer=opt, state=STATE, base=REF)
    backwards = dict(reversed(trained().items())), dict(reversed(opt.items())), dict(reversed(STATE.items()))
    two = save_checkpoint(
        tmp_path / "b", step=3, delta=backwards[0], optimizer=backwards[1], state=backwards[2], base=REF
    )
    with Saver(tmp_path / "c", base=REF) as saver:
        three = saver.save(step=3, delta=trained(), optimizer=opt, state=STATE).wait()
    assert shas(one) == shas(two) == shas(three)


def test_unchanged_candidates_are_not_written(tmp_path: Path) -> None:
    everything = BASE | trained()
    path = save_checkpoint(tmp_path, step=1, delta=everything, optimizer={}, state={}, base=REF)
    assert sorted(safetensors.torch.load_file(path / "delta.safetensors")) == ["decoder.steps", "decoder.weight"]


def test_a_checkpoint_costs_what_trains_and_its_optimizer_state_within_one_percent(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(256, 256) for _ in range(16)))
    base = BaseRef.of(net)
    net[:12].requires_grad_(False)
    trains = [p for p in net.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trains)
    net(torch.randn(4, 256)).sum().backward()
    adam.step()
    state = {
        f"{name}/{key}": value
        for name, p in net.named_parameters()
        for key, value in (adam.state[p].items() if p in adam.state else ())
    }
    path = save_checkpoint(
        tmp_path, step=1, delta=delta_of(base, net.state_dict()), optimizer=state, state=STATE, base=base
    )
    size = sum(p.stat().st_size for p in path.iterdir())
    need = sum(t.numel() * t.element_size() for t in [*trains, *state.values()])
    assert need <= size <= 1.01 * need


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"a": {"b": [1, torch.tensor(2)]}}, "state.a.b[1]"),
        ({"a": {3: 4}}, "state.a"),
        ({"a": {1, 2}}, "state.a"),
    ],
)
def test_a_state_that_would_come_back_as_something_else_is_refused_by_place(
    tmp_path: Path, state: dict[str, object], where: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(tmp_path, step=1, delta={}, optimizer={}, state=state, base=REF)
    assert caught.value.where == where
    assert os.listdir(tmp_path) == []


def test_a_delta_over_another_base_is_not_written_under_this_one(tmp_path: Path) -> None:
    other = delta_of(BaseRef.of({"x": torch.zeros(1)}), {"x": torch.ones(1)})
    with pytest.raises(CheckpointError, match="the delta was made over"):
        save_checkpoint(tmp_path, step=1, delta=other, optimizer={}, state={}, base=REF)


def test_saving_a_step_again_replaces_it_whole(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, step=1, delta=trained(2), optimizer=optimizer(), state=STATE, base=REF)
    path = save_checkpoint(tmp_path, step=1, delta=trained(3), optimizer={}, state={}, base=REF)
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert read_checkpoint(path).delta["decoder.weight"][0, 0] == 3


def test_training_may_change_the_tensors_while_the_files_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = Blocked()
    monkeypatch.setattr(store, "SYSTEM", system)
    weights, opt = trained(2), optimizer()
    before = {name: tensor.clone() for name, tensor in opt.items()}
    with Saver(tmp_path, base=REF) as saver:
        handle = saver.save(step=1, delta=weights, optimizer=opt, state=STATE)
        assert system.reached.wait(10)
        assert not handle.done
        for tensor in (*weights.values(), *opt.values()):
            tensor.zero_()
        system.released.set()
        path = handle.wait()
    back = read_checkpoint(path)
    assert torch.equal(back.delta["decoder.weight"], torch.full((64, 64), 2.0))
    assert all(torch.equal(back.optimizer[name], before[name]) for name in before)


def test_at_most_one_save_is_under_way_and_a_second_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = Blocked()
    monkeypatch.setattr(store, "SYSTEM", system)
    with Saver(tmp_path, base=REF) as saver:
        first = saver.save(step=1, delta=trained(2), optimizer={}, state={})
        threading.Timer(0.2, system.released.set).start()
        second = saver.save(step=2, delta=trained(3), optimizer={}, state={})
        assert first.done
        assert second.waited_s > 0.05
    assert read_checkpoint(first.wait()).delta["decoder.weight"][0, 0] == 2
    assert read_checkpoint(second.wait()).delta["decoder.weight"][0, 0] == 3


def test_a_failed_save_is_reported_the_last_good_one_stays_and_the_next_goes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    with Saver(tmp_path, base=REF, report=lines.append) as saver:
        good = saver.save(step=1, delta=trained(2), optimizer={}, state={}).wait()
        system = Blocked(code=errno.ENOSPC)
        system.released.set()
        with monkeypatch.context() as patch:
            patch.setattr(store, "SYSTEM", system)
            handle = saver.save(step=2, delta=trained(3), optimizer={}, state={})
            saver.drain()
        assert isinstance(handle.error, store.StorageError)
        assert handle.error.errno == errno.ENOSPC
        assert len(lines) == 1
        assert lines[0].startswith(
            f"checkpoint of step 2 was not written: {tmp_path / 'step-00000002'}: "
            "cannot write: No space left on device (needs "
        )
        with pytest.raises(store.StorageError):
            handle.wait()
        assert verify(good) == ()
        assert saver.save(step=3, delta=trained(4), optimizer={}, state={}).wait().name == "step-00000003"
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000003"]


def test_a_fault_of_the_program_in_the_writing_thread_is_not_swallowed(tmp_path: Path) -> None:
    def broken(path: Path) -> None:
        raise ZeroDivisionError

    saver = Saver(tmp_path, base=REF, after=broken)
    saver.save(step=1, delta=trained(), optimizer={}, state={})
    with pytest.raises(ZeroDivisionError):
        saver.close()


def test_what_comes_after_a_save_may_fail_without_unmaking_it(tmp_path: Path) -> None:
    def full(path: Path) -> None:
        raise CheckpointError("cannot remove")

    lines: list[str] = []
    with Saver(tmp_path, base=REF, after=full, report=lines.append) as saver:
        handle = saver.save(step=1, delta=trained(), optimizer={}, state={})
    assert verify(handle.wait()) == ()
    assert lines == ["after the checkpoint of step 1: cannot remove"]


def test_staging_reuses_its_memory_and_keeps_ties_and_odd_layouts() -> None:
    staging = Staging()
    tied = torch.randn(5, 3)
    tensors = {"a": tied, "b": tied, "t": torch.randn(4, 6).t(), "i": torch.tensor(3), "e": torch.empty(0, 2)}
    tensors["h"] = torch.randn(3).bfloat16()
    first = staging.copy({"g": tensors})["g"]
    assert all(torch.equal(first[name], tensors[name]) for name in tensors)
    assert first["a"].data_ptr() == first["b"].data_ptr() != tied.data_ptr()
    places = {name: tensor.data_ptr() for name, tensor in first.items()}
    second = staging.copy({"g": {name: tensor + 1 for name, tensor in tensors.items() if name != "b"}})["g"]
    assert second["a"].data_ptr() == places["a"]
    assert torch.equal(second["t"], tensors["t"] + 1)


def test_no_pickle_is_written(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, step=1, delta=trained(), optimizer=optimizer(), state=STATE, base=REF)
    assert {p.suffix for p in path.iterdir()} == {".json", ".safetensors"}
    for name in ("delta", "optimizer"):
        safetensors.torch.load_file(path / f"{name}.safetensors")  # an independent reader takes them


# --- what rests ---

RESTING = {"v/exp_avg": torch.arange(500.0), "v/step": torch.tensor(3.0)}


def save_resting(root: Path, step: int, resting: dict[str, torch.Tensor] = RESTING) -> Path:
    moving = {"w/exp_avg": torch.full((6,), float(step))}
    return save_checkpoint(
        root, step=step, delta={}, optimizer=moving | resting, state={}, base=BaseRef.of({}), parked=set(resting)
    )


def test_parked_moments_are_one_file_under_many_names_until_they_change(tmp_path: Path) -> None:
    one, two = save_resting(tmp_path, 1), save_resting(tmp_path, 2)
    inodes = {(path / PARKED).stat().st_ino for path in (one, two)}
    assert len(inodes) == 1
    assert (one / OPTIMIZER).stat().st_ino != (two / OPTIMIZER).stat().st_ino
    three = save_resting(tmp_path, 3, {"v/exp_avg": torch.ones(500)})
    assert (three / PARKED).stat().st_nlink == 1
    store.retire(one)
    found = read_checkpoint(two)
    assert found.optimizer["w/exp_avg"].tolist() == [2.0] * 6
    assert torch.equal(found.optimizer["v/exp_avg"], RESTING["v/exp_avg"])
    assert manifest.verify(two) == ()


def test_a_damaged_file_is_not_given_a_second_name(tmp_path: Path) -> None:
    one = save_resting(tmp_path, 1)
    data = bytearray((one / PARKED).read_bytes())
    data[-1] ^= 1
    (one / PARKED).write_bytes(data)
    two = save_resting(tmp_path, 2)
    assert [problem.partition(" digest")[0] for problem in manifest.verify(one)] == [f"{PARKED}: altered:"]
    assert manifest.verify(two) == ()


def test_where_there_are_no_second_names_the_file_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain(store.FileSystem):
        def link(self, old: Path, new: Path) -> None:
            raise OSError(errno.EPERM, "Operation not permitted", str(new))

    monkeypatch.setattr(store, "SYSTEM", Plain())
    paths = [save_resting(tmp_path, step) for step in (1, 2)]
    assert [(path / PARKED).stat().st_nlink for path in paths] == [1, 1]
    assert all(manifest.verify(path) == () for path in paths)


def test_killed_after_any_call_of_a_save_with_a_second_name_the_old_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for k in range(1, 20):
        root = tmp_path / str(k)
        save_resting(root, 1)
        with monkeypatch.context() as patch:
            patch.setattr(store, "SYSTEM", killed_after(k, store.FileSystem))
            with suppress(Killed):
                save_resting(root, 2)
        found = read_newest(root, report=lambda line: None)
        assert torch.equal(found.optimizer["v/exp_avg"], RESTING["v/exp_avg"])
    assert found.step == 2
