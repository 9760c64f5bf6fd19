"""A WeNet experiment directory as something to go on with: where its training stood, and what it did not write down.

What WeNet leaves at a checkpoint (wenet/bin/train.py, utils/executor.py, utils/train_utils.py `save_model`): TAG.yaml
with the settings, `step`, `epoch` and `lrs`; and TAG.pt with the weights, or with DeepSpeed and `save_states:
model+optimizer` the folder TAG/ with weights and moments. Nothing is trained or written here.

Its counters count from 0. epoch_N is written after the last update of epoch N was counted: `step` updates are done.
step_N is written after update number N and before it is counted: N + 1 are done. The rate of the next update is that of
WarmupLR at the number of updates done, and stands in `lrs`. WeNet itself, taken up from there, gives its next update
the first rate of the warm-up, since set_step moves the counter and not the optimizer's rate; and after epoch_N it
counts one step too many, which moves the whole schedule.

Before 2024 an epoch's files are N.pt and N.yaml, and N.yaml holds no settings but `epoch`, `lr` (the rate that the
epoch began with), `cv_loss` and `step`, which counts from -1: step + 1 updates are done. The settings are in
train.yaml.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thawline.core.config import near_names, read_yaml
from thawline.core.span import Span
from thawline.errors import CheckpointError
from thawline.models.family import home_of
from thawline.train.recipe import ScheduleSettings
from thawline.train.schedule import lr_factor

NEWEST = "newest"

_DEFAULTS: Mapping[str, Any] = {
    "accum_grad": 1,
    "grad_clip": 50.0,
    "max_epoch": 100,
    "scheduler_conf": {"warmup_steps": 25000},
}
"""What WeNet does where a train.yaml says nothing."""

_TAG = re.compile(r"(?:(epoch|step)_)?(\d+)")


@dataclass(frozen=True, slots=True)
class WenetRun:
    """A WeNet training at one of its checkpoints.

    weights:  TAG.pt, or DeepSpeed's folder TAG/
    settings: what TAG.yaml says, WeNet's defaults filled in
    step:     updates done
    epoch:    whole passes done; None in step mode, which has one endless pass
    """

    tag: str
    weights: Path
    settings: Mapping[str, Any]
    step: int
    epoch: int | None

    @classmethod
    def open(cls, folder: Path, tag: str = NEWEST) -> WenetRun:
        """The training in `folder` at the checkpoint `tag`, or at its newest.

        Raises CheckpointError naming what is there, where it is not such a folder or has no such checkpoint.
        """
        found = {run.tag: run for run in map(cls._at, sorted(folder.glob("*.yaml"))) if run is not None}
        if not found:
            raise CheckpointError(
                "no checkpoint of a WeNet training is here",
                where=str(folder),
                fix="it would be epoch_N.yaml, step_N.yaml, or (before 2024) N.yaml with a train.yaml, and beside it "
                "the same with .pt or DeepSpeed's folder",
            )
        if tag == NEWEST:
            return max(found.values(), key=lambda run: (run.step, run.epoch is not None))
        if tag not in found:
            near = near_names(tag, list(found))
            raise CheckpointError(
                f"has no checkpoint {tag!r}",
                where=str(folder),
                fix=(f"did you mean {near[0]}? " if near else "") + f"there are {', '.join(found)}",
            )
        return found[tag]

    @classmethod
    def _at(cls, sidecar: Path) -> WenetRun | None:
        """What a sidecar says, where it is one and its weights are there."""
        name = _TAG.fullmatch(sidecar.stem)
        places = (sidecar.with_suffix(".pt"), sidecar.with_suffix(""))
        weights = next((p for p in places if p.is_file() or (p.is_dir() and home_of(p) != p)), None)
        if name is None or weights is None:
            return None
        written: Any = read_yaml(sidecar).data
        if name[1] is None:
            common = sidecar.with_name("train.yaml")
            if not isinstance(written, Mapping) or not {"step", "epoch"} <= written.keys() or not common.is_file():
                return None
            written = {**read_yaml(common).data, **written}  # its `lr` is not the next one: there are no `lrs`
        settings = {**_DEFAULTS, **written}
        return cls(
            tag=sidecar.stem,
            weights=weights,
            settings=settings,
            step=int(settings["step"]) + (0 if name[1] == "epoch" else 1),
            epoch=None if name[1] == "step" else int(settings["epoch"]) + 1,
        )

    @property
    def moments(self) -> Path | None:
        """What holds the moments of its optimizer, if anything does."""
        return self.weights if self.weights.is_dir() else None

    def terms(self) -> list[str]:
        """On what terms a run goes on from here: what is taken up, and what is not there to be taken up."""
        said = [f"updates done: {self.step}"]
        if self.epoch is None:
            said.append("its place in the pass is not recorded in step mode: it follows from the steps and the data")
        else:
            limit = int(self.settings["max_epoch"])
            over = f" (max_epoch {limit} is reached; run.epochs is one more)" if self.epoch >= limit else ""
            said.append(f"epochs done: {self.epoch}; the next begins at its beginning{over}")
        said.append(self._rate())
        if self.moments is None:
            said.append("the optimizer's moments are not in it (WeNet saves the weights alone): they begin at zero")
        else:
            said.append(f"the optimizer's moments are taken from {self.moments}")
        said.append("random state is not in it: order, augmentation and dropout are from run.seed from here on")
        said.append("the number of devices is not in it: with W of them, run.accumulate is W x accum_grad")
        if self.settings.get("use_amp") or self.settings.get("dtype") == "fp16":
            said.append("it was trained with half precision and a gradient scaler, which is not in it; here in fp32")
        if self.settings.get("lora_conf"):
            said.append(
                "its LoRA factors become part of the weights, and every weight trains; plan.lora is for adapters"
            )
        return said

    def _rate(self) -> str:
        kind = str(self.settings.get("scheduler", "warmuplr"))
        if "lrs" not in self.settings:
            said = "WeNet before 2024 records the rate that an epoch began with, not the next one"
            if kind.lower() != "warmuplr":
                return f"{said}; the schedule here is the nearest that there is to {kind}"
            return f"the next learning rate is {self._warmup_rate():.6g} by its settings ({said})"
        recorded = float(self.settings["lrs"][-1])
        if kind.lower() != "warmuplr":
            return f"WeNet's next learning rate is {recorded:.6g}, by {kind}; the schedule here is the nearest there is"
        ours = self._warmup_rate()
        if math.isclose(recorded, ours, rel_tol=1e-9):
            return f"the next learning rate is {recorded:.6g}, as WeNet recorded it"
        return f"the next learning rate is {ours:.6g} by its settings, though WeNet recorded {recorded:.6g}"

    def _warmup_rate(self) -> float:
        """The rate of the next update by WarmupLR; of the last group, where there are several."""
        rate, warmup = self.settings["optim_conf"]["lr"], self.settings["scheduler_conf"]["warmup_steps"]
        steps = int(warmup[-1] if isinstance(warmup, list) else warmup)
        settings = ScheduleSettings(name="warmuplr", warmup=Span(steps, "steps"))
        factor = lr_factor(settings, self.step, total_steps=0, steps_per_epoch=0)
        return float(rate[-1] if isinstance(rate, list) else rate) * factor
