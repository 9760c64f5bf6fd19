"""Averages of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from tests.ckpt import foreign
from torch import Tensor

from thawline.ckpt.average import average
from thawline.ckpt.source import open_source
from thawline.ckpt.tensors import SourceTensors
from thawline.errors import CheckpointError

Mean = Callable[..., dict[str, Tensor]]


@pytest.fixture
def mean(tmp_path: Path) -> Mean:
    """The mean of state dicts, each saved as a file epoch_N.pt."""

    def made(*models: dict[str, Tensor]) -> dict[str, Tensor]:
        with ExitStack() as opened:
            sources = []
            for n, model in enumerate(models):
                torch.save(model, tmp_path / f"epoch_{n}.pt")
                sources.append(opened.enter_context(open_source(tmp_path / f"epoch_{n}.pt")))
            return dict(SourceTensors(average(sources)))

    return made


def test_floats_are_summed_in_double_precision_and_rounded_once(mean: Mean) -> None:
    torch.manual_seed(0)
    models = [{"w": torch.randn(50), "h": torch.randn(50).half(), "b": torch.randn(50).bfloat16()} for _ in range(7)]
    found = mean(*models)
    for name in ("w", "h", "b"):
        wide = torch.stack([model[name].double() for model in models])
        exact = torch.tensor([sum(column) / 7 for column in wide.t().tolist()], dtype=torch.float64)
        assert found[name].dtype == models[0][name].dtype
        assert torch.equal(found[name], exact.to(models[0][name].dtype))


def test_what_a_model_loads_is_what_it_would_load_from_wenets_file_and_the_counter_stays_an_integer(mean: Mean) -> None:
    """wenet/bin/average_model.py: `avg[k] += states[k]`, then `torch.true_divide(avg[k], num)`."""
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        net = torch.nn.BatchNorm1d(4)
        for _ in range(seed + 2):
            net(torch.randn(8, 4))
        models.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
    models[2]["num_batches_tracked"] += 2  # 2, 3, 6: the mean is no integer
    theirs = {name: torch.true_divide(sum(model[name] for model in models), 3) for name in models[0]}
    ours = mean(*models)
    assert theirs["num_batches_tracked"].dtype == torch.float32
    assert ours["num_batches_tracked"].dtype == torch.int64
    one, other = torch.nn.BatchNorm1d(4), torch.nn.BatchNorm1d(4)
    one.load_state_dict(theirs)
    other.load_state_dict(ours)
    assert int(one.num_batches_tracked) == int(other.num_batches_tracked) == 3
    torch.testing.assert_close(ours, ours | {n: t for n, t in theirs.items() if n != "num_batches_tracked"})


def test_large_integers_are_exact(mean: Mean) -> None:
    huge = 2**53 + 1
    assert int(mean({"n": torch.tensor(huge)}, {"n": torch.tensor(huge)})["n"]) == huge
    assert int(mean({"n": torch.tensor(-3)}, {"n": torch.tensor(-4)})["n"]) == -3  # toward zero


def test_one_checkpoint_is_its_own_mean_to_the_bit(mean: Mean) -> None:
    model = {"w": torch.randn(5), "zero": torch.tensor([-0.0, 0.0]), "m": torch.tensor([True, False])}
    found = mean(model)
    assert all(torch.equal(found[name], model[name]) for name in model)
    assert torch.signbit(found["zero"]).tolist() == [True, False]


def test_a_tensor_of_several_parts_is_averaged_in_step_with_one_that_lies_in_one_piece(tmp_path: Path) -> None:
    foreign.zero(tmp_path / "run", stage=2, world=3)
    with open_source(tmp_path / "run") as sharded:
        torch.save(dict(SourceTensors(sharded)), tmp_path / "whole.pt")
        with open_source(tmp_path / "whole.pt") as whole:
            found = SourceTensors(average([whole, sharded]))
            for name, tensor in SourceTensors(whole).items():
                assert torch.equal(found[name], tensor), name


def test_sources_that_do_not_belong_together_are_refused_before_anything_comes_out(mean: Mean) -> None:
    with pytest.raises(CheckpointError, match=r"epoch_1.pt: holds other tensors than .*epoch_0.pt: v, w"):
        mean({"w": torch.zeros(1)}, {"v": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"w is F32 \(2,\) here and F32 \(1,\) in .*epoch_0.pt"):
        mean({"w": torch.zeros(1)}, {"w": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="there is no mean"):
        mean({"m": torch.tensor(True)}, {"m": torch.tensor(False)})
    with pytest.raises(CheckpointError, match="nothing to average"):
        mean()
