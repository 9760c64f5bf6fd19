"""The whole law, as far as checkpoints and deltas go: what was saved loads whole or not at all.

One story from a base to a third stage: every tensor is accounted for, the base is recognised, damage and mixtures are
refused, and what is refused leaves model and files as they were.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from thawline.ckpt.average import average
from thawline.ckpt.delta import BaseRef, apply, check_base, delta_of, read_delta, stack, write_delta
from thawline.ckpt.diff import diff
from thawline.ckpt.load import load_strict_, newest_whole, read_checkpoint, read_newest
from thawline.ckpt.retention import Keep, prune
from thawline.ckpt.save import Saver
from thawline.ckpt.source import open_source
from thawline.ckpt.tensors import SourceTensors
from thawline.core.digest import digest_tensor
from thawline.errors import BaseMismatch, CheckpointError


class Recogniser(nn.Module):
    """Small, with what gets lost elsewhere: statistics, an integer buffer, tied weights, a part that is None."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.embed = nn.Embedding(5, 6)
        self.proj = nn.Linear(6, 5, bias=False)
        self.proj.weight = self.embed.weight
        self.register_module("adapter", None)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(self.encoder(x))
        return out


def made(seed: int) -> Recogniser:
    torch.manual_seed(seed)
    return Recogniser()


def bits(model: nn.Module) -> dict[str, str]:
    return {name: digest_tensor(tensor) for name, tensor in model.state_dict().items()}


def train(model: Recogniser, steps: int) -> torch.optim.AdamW:
    model.train()
    optimizer = torch.optim.AdamW(model.proj.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(7, 6)).square().sum().backward()
        optimizer.step()
    return optimizer


def moments(model: Recogniser, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{names[p]}/{key}": value for p, entry in optimizer.state.items() for key, value in entry.items()}


def test_from_a_base_through_a_crash_to_a_third_stage_no_tensor_is_lost(tmp_path: Path) -> None:
    base = BaseRef.of(made(0), path="models/base")
    model = made(0)
    root = tmp_path / "run" / "checkpoints"
    truth: dict[int, dict[str, str]] = {}
    with Saver(root, base=base, after=lambda path: prune(root, Keep(last=2), trusted=path)) as saver:
        for step in (1, 2, 3):
            optimizer = train(model, 1)
            saver.save(step=step, delta=model.state_dict(), optimizer=moments(model, optimizer), state={"step": step})
            truth[step] = bits(model)

    # The frozen linear layer is not in it; the statistics that moved, the counter and both tied names are.
    saved = read_checkpoint(root / "step-00000003")
    assert sorted(saved.delta) == [
        "embed.weight",
        "encoder.1.num_batches_tracked",
        "encoder.1.running_mean",
        "encoder.1.running_var",
        "proj.weight",
    ]
    assert saved.delta["embed.weight"] is saved.delta["proj.weight"]

    # The newest is damaged: the one before is loaded, and says why.
    weights = root / "step-00000003" / "delta.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 8
    weights.write_bytes(content)
    lines: list[str] = []
    found = read_newest(root, report=lines.append)
    assert found.step == 2
    assert "delta.safetensors" in lines[0]

    again = made(0)
    load_strict_(again, apply(again.state_dict(), found.difference), source=str(found.path))
    assert bits(again) == truth[2]

    # Stage 2 is the run's result, stage 3 is made over it; both travel as files and stack.
    write_delta(tmp_path / "stage2", found.difference)
    with torch.no_grad():
        again.encoder[0].bias.add_(1)
    write_delta(tmp_path / "stage3", delta_of(read_delta(tmp_path / "stage2").result, again.state_dict()))
    both = stack([(name, read_delta(tmp_path / name)) for name in ("stage2", "stage3")])
    fresh = made(0)
    load_strict_(fresh, apply(fresh.state_dict(), both), source="stage2 -> stage3")
    assert bits(fresh) == bits(again)
    assert diff(fresh.state_dict(), again.state_dict()).is_same


def test_another_base_is_refused_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = made(0)
    train(model, 2)
    delta = delta_of(BaseRef.of(made(0)), model.state_dict())
    other = made(1)
    before = bits(other)
    with pytest.raises(BaseMismatch, match=r"first: embed\.weight, encoder\.0\.bias"):
        load_strict_(other, apply(other.state_dict(), delta), source="delta")
    assert bits(other) == before
    with pytest.raises(BaseMismatch):
        check_base(delta.base, BaseRef.of(other))


def test_the_mean_of_checkpoints_loads_like_any_model(tmp_path: Path) -> None:
    models = [made(0) for _ in range(3)]
    for count, model in enumerate(models):
        torch.manual_seed(9)
        train(model, count + 1)
    mean = made(0)
    with ExitStack() as opened:
        for n, model in enumerate(models):
            torch.save(model.state_dict(), tmp_path / f"{n}.pt")
        sources = [opened.enter_context(open_source(tmp_path / f"{n}.pt")) for n in range(3)]
        load_strict_(mean, SourceTensors(average(sources)), source="mean of 3")
    assert int(mean.encoder[1].num_batches_tracked) == 2
    assert torch.equal(mean.encoder[0].weight, models[0].encoder[0].weight)  # frozen: the mean of equals is equal


def test_a_run_of_which_nothing_is_whole_is_refused_with_every_reason(tmp_path: Path) -> None:
    base = BaseRef.of(made(0))
    with Saver(tmp_path, base=base) as saver:
        for step in (1, 2):
            saver.save(step=step, delta=made(step).state_dict(), optimizer={}, state={})
    (tmp_path / "step-00000001" / "MANIFEST.json").unlink()
    (tmp_path / "step-00000002" / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        newest_whole(tmp_path, report=lambda line: None)
    assert "step-00000001: MANIFEST.json: missing" in str(caught.value)
    assert "step-00000002: optimizer.safetensors: emptied" in str(caught.value)
