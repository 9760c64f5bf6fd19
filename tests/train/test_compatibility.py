"""What may differ when a run goes on: every key of the recipe, the data, and the machine."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train.runs import AtStep, events, run
from tests.train.toy import Points, ToyTask, write_recipe

from thawline.errors import RecipeError, Stopped
from thawline.train.compatibility import environment, judge
from thawline.train.recipe import read_recipe

FREE = {
    "model",
    "data.train",
    "data.valid",
    "data.max_bad",
    "run.workers",
    "run.engine",
    "run.micro_batch",  # what was chosen at the start is in the state
    "run.recompute",
    "run.device",
    "run.time_limit",
    "run.tensorboard",
    "run.checkpoint.every",
    "run.checkpoint.keep",
    "run.checkpoint.keep_every",
    "run.checkpoint.mirror",
    "run.checkpoint.on_error",
    "run.nonfinite.limit",
}
"""What changes nothing that the run computes."""


@pytest.fixture
def now(tmp_path: Path) -> dict[str, Any]:
    recipe = read_recipe(write_recipe(tmp_path), ["run.ema={}"])
    return {
        "recipe": recipe.resolved(),
        "data": {"train": "aa", "valid": "bb"},
        "environment": environment(torch.device("cpu")),
    }


def leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item and f"{prefix}{key}" not in ("plan", "data.conf"):
            yield from leaves(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def changed(now: Mapping[str, Any], dotted: str) -> dict[str, Any]:
    other = copy.deepcopy(dict(now))
    *folders, last = dotted.split(".")
    place = other["recipe"]
    for folder in folders:
        place = place[folder]
    place[last] = "something else"
    return other


def test_every_key_is_refused_by_name_but_those_that_cannot_matter(now: dict[str, Any]) -> None:
    answers = {key: answer(changed(now, key), now) for key in leaves(now["recipe"])}
    assert {key for key, said in answers.items() if said == "EXACT"} == FREE
    assert {"run.ema.decay", "run.micro_batches", "run.nonfinite.then", "optim.schedule.momentum"} <= answers.keys()
    refused = answers.keys() - FREE
    assert all(f"    {key}: 'something else' -> " in answers[key] for key in refused)
    assert all(answers[key].endswith(f"--allow {key}") for key in refused)


def answer(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The grade, or the refusal."""
    try:
        return judge(before, now).grade
    except RecipeError as exc:
        return str(exc)


@pytest.mark.parametrize("key", ["run.checkpoint.every", "run.nonfinite.limit"])
def test_what_decides_where_a_run_goes_back_to_matters_where_it_may_go_back(now: dict[str, Any], key: str) -> None:
    now["recipe"]["run"]["nonfinite"]["then"] = "rewind"
    with pytest.raises(RecipeError, match=f"--allow {key}"):
        judge(changed(now, key), now)


def test_a_key_newer_than_the_record_counts_as_recorded_at_its_default(now: dict[str, Any]) -> None:
    now["recipe"]["run"]["ema"] = None
    old = copy.deepcopy(now)
    del old["recipe"]["run"]["ema"], old["recipe"]["run"]["nonfinite"], old["recipe"]["optim"]["schedule"]["momentum"]
    assert judge(old, now).grade == "EXACT"
    now["recipe"]["run"]["ema"] = {"decay": 0.99, "warmup": True}
    with pytest.raises(RecipeError, match=r"run\.ema: None -> "):
        judge(old, now)


@pytest.mark.parametrize("key", ["torch", "threads", "deterministic", "matmul precision", "cudnn benchmark", "device"])
def test_another_machine_gives_the_same_data_in_other_roundings_and_says_what_differs(
    now: dict[str, Any], key: str
) -> None:
    there = copy.deepcopy(now)
    there["environment"][key] = "another"
    verdict = judge(there, now)
    assert verdict.grade == "SAME-DATA"
    assert verdict.reasons == (f"{key}: 'another' -> {now['environment'][key]!r}",)


def test_kernel_flags_are_part_of_the_machine() -> None:
    before = environment(torch.device("cpu"))
    torch.use_deterministic_algorithms(True)
    torch.set_float32_matmul_precision("medium")
    try:
        after = environment(torch.device("cpu"))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")
    differing = {key for key in before if before[key] != after[key]}
    assert differing == {"deterministic", "matmul precision"}


def test_other_samples_are_refused_and_allowed_by_name(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    with pytest.raises(Stopped):
        run(tmp_path, "run", monitor=AtStep(4))

    class More(ToyTask):
        def samples(self, recipe: Any, model: Any, split: str) -> Points:
            return Points(10 if split == "valid" else 60, noisy=split == "train")

    with pytest.raises(RecipeError, match=r"(?s)data\.train\.content: .*--allow data\.train\.content") as caught:
        run(tmp_path, "run", task=More())
    assert caught.value.exit_code == 2
    run(tmp_path, "run", task=More(), allow=["data.train.content"])
    assert events(tmp_path / "run", "resumed")[-1]["grade"] == "CONTINUES"


def test_the_number_of_threads_is_that_of_the_record(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    with pytest.raises(Stopped):
        run(tmp_path, "run", monitor=AtStep(4))
    torch.set_num_threads(2)
    try:
        run(tmp_path, "run")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)
    assert events(tmp_path / "run", "resumed")[-1]["grade"] == "EXACT"
