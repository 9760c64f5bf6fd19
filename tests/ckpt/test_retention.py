"""Which checkpoints stay."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch

from thawline.ckpt import store
from thawline.ckpt.delta import BaseRef
from thawline.ckpt.load import newest_whole
from thawline.ckpt.retention import Keep, kept, prune
from thawline.ckpt.save import Saver, save_checkpoint

REF = BaseRef.of({"w": torch.zeros(4)})
STEPS = [100, 200, 300, 400, 500, 600]


def save(root: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(root, step=step, delta={"w": torch.ones(4) * step}, optimizer={}, state={}, base=REF)


def steps_in(root: Path) -> list[int]:
    return sorted(int(name.removeprefix("step-")) for name in os.listdir(root))


@pytest.mark.parametrize(
    ("rule", "scores", "stay"),
    [
        (Keep(last=2), {}, {500, 600}),
        (Keep(last=9), {}, set(STEPS)),
        (Keep(last=1, best=1), {100: 0.5, 200: 0.2, 300: 0.3}, {200, 600}),
        (Keep(last=1, best=1, mode="max"), {100: 0.5, 200: 0.2, 300: 0.3}, {100, 600}),
        (Keep(last=1, best=2), {100: 0.2, 200: 0.2, 300: 0.2}, {200, 300, 600}),
        (Keep(last=1, best=1), {100: math.nan, 200: 9.0}, {200, 600}),
        (Keep(last=1, best=1), {50: 0.0, 200: 9.0}, {200, 600}),
        (Keep(last=1, best=1), {}, {600}),
        (Keep(last=1, every=200), {}, {200, 400, 600}),
        (Keep(last=1, best=1, every=300), {100: 1.0}, {100, 300, 600}),
    ],
    ids=["last", "few", "best low", "best high", "ties to the newer", "nan", "gone", "no scores", "every", "all rules"],
)
def test_the_rules_add_up(rule: Keep, scores: dict[int, float], stay: set[int]) -> None:
    assert kept(STEPS, rule, scores=scores) == stay


@pytest.mark.parametrize("bad", [{"last": 0}, {"best": -1}, {"every": -2}])
def test_a_rule_that_keeps_less_than_nothing_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="cannot be meant"):
        Keep(**bad)  # type: ignore[arg-type]


def test_pruning_removes_the_others_and_says_which(tmp_path: Path) -> None:
    save(tmp_path, *STEPS)
    removed = prune(tmp_path, Keep(last=2, best=1), scores={100: 0.1, 200: 0.4})
    assert [path.name for path in removed] == ["step-00000200", "step-00000300", "step-00000400"]
    assert steps_in(tmp_path) == [100, 500, 600]
    assert prune(tmp_path, Keep(last=2, best=1), scores={100: 0.1}) == ()


def test_the_newest_whole_one_stays_even_if_newer_damaged_ones_crowd_it_out(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4)
    for step in (3, 4):  # same size: only the digest shows it
        path = tmp_path / f"step-{step:08d}" / "delta.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    prune(tmp_path, Keep(last=2))
    assert steps_in(tmp_path) == [2, 3, 4]
    assert newest_whole(tmp_path, report=lambda line: None).name == "step-00000002"


def test_damaged_ones_are_neither_counted_nor_removed(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    (tmp_path / "step-00000001" / "state.json").unlink()
    (tmp_path / "step-00000003" / "MANIFEST.json").unlink()
    assert prune(tmp_path, Keep(last=1)) == ()
    assert steps_in(tmp_path) == [1, 2, 3]


def test_nothing_is_removed_if_nothing_whole_would_remain(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    for step in (1, 2):
        path = tmp_path / f"step-{step:08d}" / "delta.safetensors"
        path.write_bytes(bytes(path.stat().st_size))
    assert prune(tmp_path, Keep(last=1)) == ()
    assert steps_in(tmp_path) == [1, 2]


def test_a_saver_prunes_behind_the_training_thread(tmp_path: Path) -> None:
    def after(path: Path) -> None:
        prune(tmp_path, Keep(last=2), trusted=path)

    with Saver(tmp_path, base=REF, after=after) as saver:
        for step in (1, 2, 3, 4):
            saver.save(step=step, delta={"w": torch.ones(4) * step}, optimizer={}, state={})
    assert steps_in(tmp_path) == [3, 4]


def test_a_removal_that_is_interrupted_leaves_no_half_deleted_checkpoint_in_sight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    class DiesRemoving(store.FileSystem):
        def remove(self, path: Path) -> None:
            raise Killed

    save(tmp_path, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(store, "SYSTEM", DiesRemoving())
        with pytest.raises(Killed):
            prune(tmp_path, Keep(last=1))
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == ["step-00000002"]
    save(tmp_path, 3)  # the next writer clears up
    assert steps_in(tmp_path) == [2, 3]
