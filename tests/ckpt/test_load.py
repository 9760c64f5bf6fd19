"""Reading back: damaged checkpoints are passed over with a reason, and models are filled whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from thawline.ckpt.delta import BaseRef, apply
from thawline.ckpt.load import checkpoints, load_strict_, newest_whole, read_checkpoint, read_newest
from thawline.ckpt.save import save_checkpoint
from thawline.core.digest import digest_tensor
from thawline.errors import CheckpointError

BASE = {"w": torch.zeros(100), "b": torch.zeros(3)}
REF = BaseRef.of(BASE)


def save(root: Path, step: int) -> Path:
    return save_checkpoint(
        root,
        step=step,
        delta={"w": torch.full((100,), float(step))},
        optimizer={"w/exp_avg": torch.full((100,), step / 2)},
        state={"step": step},
        base=REF,
        ema={"w": torch.full((100,), step / 4)},
    )


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def bits(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: digest_tensor(tensor) for name, tensor in tensors.items()}


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "torn: no manifest": (lambda c: (c / "MANIFEST.json").unlink(), "MANIFEST.json"),
    "truncated weights": (lambda c: os.truncate(c / "delta.safetensors", 100), "delta.safetensors"),
    "truncated optimizer": (lambda c: os.truncate(c / "optimizer.safetensors", 500), "optimizer.safetensors"),
    "truncated manifest": (lambda c: os.truncate(c / "MANIFEST.json", 100), "MANIFEST.json"),
    "flipped weight": (lambda c: flip(c / "delta.safetensors", -9), "delta.safetensors"),
    "flipped header": (lambda c: flip(c / "delta.safetensors", 30), "delta.safetensors"),
    "flipped length": (lambda c: flip(c / "delta.safetensors", 4), "delta.safetensors"),
    "flipped moment": (lambda c: flip(c / "optimizer.safetensors", -1), "optimizer.safetensors"),
    "flipped average": (lambda c: flip(c / "ema.safetensors", -1), "ema.safetensors"),
    "averages deleted": (lambda c: (c / "ema.safetensors").unlink(), "ema.safetensors"),
    "flipped state": (lambda c: flip(c / "state.json", 3), "state.json"),
    "flipped manifest": (lambda c: flip(c / "MANIFEST.json", 40), "MANIFEST.json"),
    "emptied weights": (lambda c: os.truncate(c / "delta.safetensors", 0), "delta.safetensors"),
    "emptied manifest": (lambda c: os.truncate(c / "MANIFEST.json", 0), "MANIFEST.json"),
    "emptied directory": (lambda c: [p.unlink() for p in c.iterdir()], "MANIFEST.json"),
    "half deleted": (lambda c: (c / "optimizer.safetensors").unlink(), "optimizer.safetensors"),
    "another step's optimizer": (
        lambda c: shutil.copy(c.parent / "step-00000002" / "optimizer.safetensors", c),
        "optimizer.safetensors",
    ),
    "renamed": (lambda c: (shutil.rmtree(c), shutil.copytree(c.parent / "step-00000001", c)), "step 1"),
    "a file in its place": (lambda c: (shutil.rmtree(c), c.touch()), "not a directory"),
    "a pipe in place of a file": (
        lambda c: ((c / "state.json").unlink(), os.mkfifo(c / "state.json")),
        "state.json",
    ),
}


def test_what_was_saved_is_read_back_to_the_bit(tmp_path: Path) -> None:
    back = read_checkpoint(save(tmp_path, 3))
    assert (back.step, back.state, back.base) == (3, {"step": 3}, REF)
    assert bits(dict(back.delta)) == bits({"w": torch.full((100,), 3.0)})
    assert bits(dict(back.optimizer)) == bits({"w/exp_avg": torch.full((100,), 1.5)})
    assert bits(dict(apply(BASE, back.difference))) == bits({"w": torch.full((100,), 3.0), "b": BASE["b"]})


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over_to_the_newest_whole_one(tmp_path: Path, name: str) -> None:
    damage, named = DAMAGE[name]
    for step in (1, 2, 3):
        save(tmp_path, step)
    damage(tmp_path / "step-00000003")
    lines: list[str] = []
    assert newest_whole(tmp_path, report=lines.append) == tmp_path / "step-00000002"
    assert len(lines) == 1
    assert "step-00000003" in lines[0]
    assert named in lines[0]
    assert lines[0].endswith("; this checkpoint is passed over")
    again: list[str] = []
    assert read_newest(tmp_path, report=again.append).step == 2
    assert len(again) == 1
    assert "step-00000003" in again[0]
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "step-00000003")


def test_every_bit_of_every_file_counts(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for file in sorted(path.iterdir()):
        good = file.read_bytes()
        for position in range(0, len(good), 29):
            flip(file, position)
            with pytest.raises(CheckpointError):
                read_checkpoint(path)
            file.write_bytes(good)
    assert read_checkpoint(path).step == 1


def test_one_that_this_user_may_not_read_is_passed_over_too() -> None:
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for step in (1, 2, 3):
            save(root, step)
        root.chmod(0o755)
        (root / "step-00000003").chmod(0o000)
        (root / "step-00000002" / "optimizer.safetensors").chmod(0o000)
        lines: list[str] = []
        was_root = os.geteuid() == 0
        if was_root:
            os.seteuid(65534)
        try:
            assert newest_whole(root, report=lines.append).name == "step-00000001"
            assert read_newest(root, report=lines.append).step == 1
        finally:
            if was_root:
                os.seteuid(0)
            (root / "step-00000003").chmod(0o755)
    assert ["Permission denied" in line for line in lines] == [True] * 4


def test_when_none_is_whole_the_refusal_names_each_with_its_fault(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step-00000001" / "state.json").unlink()
    os.truncate(tmp_path / "step-00000002" / "delta.safetensors", 0)
    with pytest.raises(CheckpointError) as caught:
        newest_whole(tmp_path, report=lambda line: None)
    assert str(caught.value).startswith(
        f"{tmp_path}: no checkpoint is whole:\n  step-00000002: delta.safetensors: emptied: 0 bytes instead of "
    )
    assert "  step-00000001: state.json: missing\n  fix: restore one from a copy" in str(caught.value)


@pytest.mark.parametrize("make", [True, False])
def test_a_run_without_checkpoints_says_so(tmp_path: Path, make: bool) -> None:
    root = tmp_path / "checkpoints"
    if make:
        root.mkdir()
        (root / ".step-00000001.tmp-1-00000000").mkdir()  # a leftover is no checkpoint
        (root / "notes").touch()
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        newest_whole(root, report=lambda line: None)
    assert checkpoints(root) == []


def test_reading_removes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".step-00000002.tmp-1-00000000").mkdir()
    newest_whole(tmp_path, report=lambda line: None)
    assert len(os.listdir(tmp_path)) == 2


def test_steps_are_numbers_not_names(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step)
    assert newest_whole(tmp_path, report=lambda line: None).name == "step-100000000"


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.proj = nn.Linear(3, 4, bias=False)
        self.proj.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)
        self.register_module("adapter", None)


def test_a_model_is_filled_and_the_report_says_how() -> None:
    net = Tied()
    source = {name: torch.ones_like(tensor) for name, tensor in net.state_dict().items()}
    del source["proj.weight"]
    report = load_strict_(net, source.items(), source="x.pt")
    assert report.tied == ("proj.weight",)
    assert set(report.loaded) == set(source)
    assert all(bool((tensor == 1).all()) for tensor in net.state_dict().values())
    assert str(report) == "x.pt: 6 tensors loaded\n  1 through a tied name: proj.weight"


def test_everything_that_does_not_fit_is_named_with_the_remedy_and_nothing_is_loaded() -> None:
    net = Tied()
    before = bits(net.state_dict())
    source = {name: torch.ones_like(tensor) for name, tensor in net.state_dict().items()}
    del source["norm.running_mean"]
    source["norm.weight"] = torch.ones(5)
    source["norm.bias"] = torch.ones(3, dtype=torch.float16)
    source["adapter.down.weight"] = torch.ones(2)
    source["head.weight"] = torch.ones(2)
    source["proj.weight"] = torch.zeros(4, 3)
    with pytest.raises(CheckpointError) as caught:
        load_strict_(net, source, source="exp/final.pt")
    assert str(caught.value) == (
        "exp/final.pt: does not fit the model of 7 tensors; nothing was loaded\n"
        "  1 missing in it: norm.running_mean\n"
        "  1 unknown to the model: head.weight\n"
        "  1 of a part that this model has not (it is None there): adapter.down.weight\n"
        "  1 of another shape: norm.weight (5,) in the file, (3,) in the model\n"
        "  1 of another element type: norm.bias torch.float16, torch.float32 in the model\n"
        "  1 tied in the model but different in it: proj.weight and embed.weight\n"
        "  fix: is it the right file, or a delta that needs its base (--base)?; "
        "build the model that the file was saved from; "
        "build the model with that part; torch would drop them silently; "
        "build the model with the file's sizes; "
        "convert the file (--dtype), or allow the cast; "
        "untie them in the model's configuration"
    )
    assert bits(net.state_dict()) == before


def test_torch_itself_swallows_the_keys_of_a_part_that_is_none() -> None:
    """Why we compare the names ourselves."""
    net = Tied()
    source = dict(net.state_dict()) | {"adapter.down.weight": torch.ones(2)}
    net.load_state_dict(source, strict=True)
    with pytest.raises(CheckpointError, match=r"it is None there\): adapter\.down\.weight"):
        load_strict_(net, source, source="x")


def test_what_may_differ_is_listed_and_reported() -> None:
    net = Tied()
    source = {name: torch.ones_like(tensor) for name, tensor in net.state_dict().items()}
    del source["norm.running_mean"], source["norm.num_batches_tracked"]
    source |= {"head.weight": torch.ones(1), "head.bias": torch.ones(1)}
    source["norm.bias"] = source["norm.bias"].half()
    report = load_strict_(
        net,
        source,
        source="x",
        allow_missing=["norm.running_mean", "*.num_batches_tracked"],
        allow_unexpected=["head.*"],
        allow_cast=True,
    )
    assert report.missing == ("norm.running_mean", "norm.num_batches_tracked")
    assert report.unexpected == ("head.weight", "head.bias")
    assert report.cast == ("norm.bias",)
    assert net.norm.bias.dtype == torch.float32
    assert bool((net.norm.bias == 1).all())


def test_an_allowance_covers_only_what_it_names() -> None:
    net = Tied()
    source = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith("norm.")}
    with pytest.raises(CheckpointError, match=r"4 missing in it: norm\.weight, norm\.bias"):
        load_strict_(net, source, source="x", allow_missing=["norm.running_mean"])


def test_a_model_without_memory_is_refused_rather_than_filled_in_vain() -> None:
    with torch.device("meta"):
        net = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"without memory \(on the meta device\): weight, bias"):
        load_strict_(net, {"weight": torch.ones(2, 2), "bias": torch.ones(2)}, source="x")
