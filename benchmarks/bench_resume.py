"""Is a run that was stopped and taken up the run that was not? Ours beside the peers. Writes results/resume.md.

    python benchmarks/bench_resume.py [--out benchmarks/results/resume.md]

Every loop trains the same net (Linear, BatchNorm, ReLU, Dropout, Linear; AdamW with a falling rate) on the same 80
points in shuffled batches of 4 for three epochs, as its documentation says, with its own checkpoints. One process
trains to the end and saves on the way; others take it up after the third and the seventeenth of the twenty batches of
the second epoch. "Augmented" points draw noise from the global generators of Python, numpy and torch, as users do.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

BATCH, BATCHES, EPOCHS = 4, 20, 3
POINTS = BATCH * BATCHES
STEPS = BATCHES * EPOCHS
STOPS = {"early": BATCHES + 3, "late": BATCHES + 17}
SEED = 5


class Points(Dataset[dict[str, Tensor]]):
    """Points by number, shaken where they are augmented."""

    def __init__(self, augmented: bool) -> None:
        self.augmented = augmented

    def __len__(self) -> int:
        return POINTS

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        x = torch.randn(8, generator=torch.Generator().manual_seed(i))
        y = x.sum().reshape(1)
        if self.augmented:
            x = x + 0.1 * torch.randn(8) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return {"x": x, "y": y, "ids": torch.tensor(i)}


class Net(nn.Module):
    """Notes the points and the loss of every training pass in `seen`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(16, 1)
        self.seen: list[tuple[list[int], str]] = []

    def forward(self, x: Tensor, y: Tensor, ids: Tensor) -> dict[str, Tensor]:
        loss = (self.head(self.body(x)) - y).square().mean()
        if self.training:
            self.seen.append((ids.tolist(), loss.item().hex()))
        return {"loss": loss}


@dataclass(frozen=True)
class Job:
    """One process: a loop from the beginning (`stop` 0), saving at every stop, or from one of the stops."""

    folder: Path
    workers: int
    augmented: bool
    stop: int

    @property
    def loader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(Points(self.augmented), batch_size=BATCH, shuffle=True, num_workers=self.workers)


def _optimizer(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)


# --- the loops --------------------------------------------------------------------------------------------------------


def accelerate(job: Job, *, seedable: bool = False) -> Net:
    from accelerate import Accelerator, DataLoaderConfiguration

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=seedable))
    net = Net()
    model, optimizer, scheduler, loader = accelerator.prepare(net, *_optimizer(net), job.loader)
    if job.stop:
        accelerator.load_state(str(job.folder / str(job.stop)))
    done = job.stop
    for epoch in range(done // BATCHES, EPOCHS):
        loader.set_epoch(epoch)
        begun = job.stop and epoch == job.stop // BATCHES
        for batch in accelerator.skip_first_batches(loader, done % BATCHES) if begun else loader:
            optimizer.zero_grad()
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            scheduler.step()
            done += 1
            if not job.stop and done in STOPS.values():
                accelerator.save_state(str(job.folder / str(done)))
    return net


def accelerate_seedable(job: Job) -> Net:
    return accelerate(job, seedable=True)


def lightning(job: Job) -> Net:
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            loss: Tensor = self.net(**batch)["loss"]
            return loss

        def configure_optimizers(self) -> Any:
            optimizer, scheduler = _optimizer(self)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step in STOPS.values():
                trainer.save_checkpoint(job.folder / f"{trainer.global_step}.ckpt")

    L.seed_everything(SEED, workers=True, verbose=False)
    module = Module()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[] if job.stop else [Save()],
    )
    trainer.fit(module, job.loader, ckpt_path=str(job.folder / f"{job.stop}.ckpt") if job.stop else None)
    return module.net


def transformers(job: Job) -> Net:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Save(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save = state.global_step in STOPS.values()

    arguments = TrainingArguments(
        output_dir=str(job.folder),
        per_device_train_batch_size=BATCH,
        num_train_epochs=EPOCHS,
        save_strategy="no",
        report_to=[],
        logging_strategy="no",
        dataloader_num_workers=job.workers,
        seed=SEED,
        remove_unused_columns=False,
        use_cpu=True,
        learning_rate=1e-2,
        disable_tqdm=True,
    )
    net = Net()
    trainer = Trainer(net, arguments, train_dataset=Points(job.augmented), callbacks=[Save()])
    trainer.train(resume_from_checkpoint=str(job.folder / f"checkpoint-{job.stop}") if job.stop else None)
    return net


def thawline(job: Job) -> Net:
    from thawline.tasks import runs

    runs.TASKS["points"] = "__main__:PointsTask"
    if job.stop:
        runs.resume(job.folder / "run", step=job.stop, fork=job.folder / f"from-{job.stop}")
    else:
        recipe = job.folder / "recipe.yaml"
        recipe.write_text(_RECIPE.format(workers=job.workers, augmented=str(job.augmented).lower()), encoding="utf-8")
        runs.train(recipe, run=job.folder / "run")
    assert PointsTask.net is not None
    return PointsTask.net


_RECIPE = f"""\
task: points
model: nothing
data: {{{{train: nothing, batch: {{{{size: {BATCH}}}}}}}}}
plan: {{{{train: ["**"]}}}}
optim: {{{{name: adamw, lr: 1e-2, schedule: {{{{name: linear, floor: 0.1}}}}}}}}
run: {{{{epochs: {EPOCHS}, seed: {SEED}, workers: {{workers}}, checkpoint: {{{{every: 1 steps, keep: 100}}}}}}}}
options: {{{{augmented: {{augmented}}}}}}
"""


class PointsBatch:
    def __init__(self, samples: Sequence[dict[str, Tensor]]) -> None:
        self.tensors = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        self.keys = tuple(str(int(i)) for i in self.tensors["ids"])

    def to(self, device: Any) -> PointsBatch:
        return self


class PointsSamples(Points):
    """The same points, as Thawline asks for them."""

    fingerprint = "points"
    left_out = ()

    def read(self, id: int, epoch: int) -> dict[str, Tensor]:
        return self[id]

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> PointsBatch:
        return PointsBatch(samples)

    def length(self, id: int) -> float:
        return 1.0


class PointsTask:
    name = "points"
    net: Net | None = None

    def build(self, recipe: Any) -> nn.Module:
        torch.manual_seed(SEED)
        PointsTask.net = Net()
        return PointsTask.net

    def samples(self, recipe: Any, model: nn.Module, split: str) -> PointsSamples:
        return PointsSamples(recipe.options["augmented"])

    def weights(self, model: nn.Module, batch: PointsBatch) -> Mapping[str, float]:
        return {"points": float(len(batch.keys))}

    def loss(self, model: nn.Module, batch: PointsBatch) -> Any:
        from thawline.train.task import PlainSums, SumTerm

        return PlainSums({"square": SumTerm(model(**batch.tensors)["loss"] * len(batch.keys), "points")}, {})

    def evaluate(self, model: nn.Module, samples: Any, batches: Iterator[Any]) -> Any:
        raise AssertionError("nothing is held back")

    def export(self, model: nn.Module, folder: Path) -> None:
        torch.save(model.state_dict(), folder / "model.pt")


LOOPS: dict[str, tuple[str, Callable[[Job], Net]]] = {
    "thawline": ("thawline", thawline),
    "transformers Trainer": ("transformers", transformers),
    "accelerate": ("accelerate", accelerate),
    "accelerate, use_seedable_sampler": ("accelerate", accelerate_seedable),
    "Lightning": ("lightning", lightning),
}
"""Name in the table -> the package, and its loop."""


# --- one process ------------------------------------------------------------------------------------------------------


def act(loop: str, job: Job) -> None:
    """Train, and leave what was seen and what came out."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(SEED)
    net = LOOPS[loop][1](job)
    tensors = {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in net.state_dict().items()}
    (job.folder / f"{job.stop}.json").write_text(json.dumps({"seen": net.seen, "tensors": tensors}))


def run(loop: str, job: Job) -> dict[str, Any]:
    """The same in a process of its own."""
    argv = [loop, str(job.folder), str(job.workers), str(int(job.augmented)), str(job.stop)]
    done = subprocess.run(
        [sys.executable, __file__, "act", *argv],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(f"{loop} failed:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads((job.folder / f"{job.stop}.json").read_text())
    return answer


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What a resumed run did otherwise.

    repeated, lost: batches' worth of points of the epoch in which it was stopped, seen twice or never
    differing, tensors: of the final weights and buffers
    exact: those, and every loss since the stop, are the same bits
    """

    repeated: float
    lost: float
    differing: int
    tensors: int
    exact: bool


def judge(whole: Mapping[str, Any], resumed: Mapping[str, Any], stop: int) -> Verdict:
    begin = stop // BATCHES * BATCHES
    before = {i for ids, _ in whole["seen"][begin:stop] for i in ids}
    rest = BATCHES - stop % BATCHES
    # A loop that begins the epoch anew takes more batches until its end than were left of it.
    extra = len(resumed["seen"]) - (STEPS - stop)
    after = {i for ids, _ in resumed["seen"][: rest + extra] for i in ids}
    differing = sum(resumed["tensors"][name] != digest for name, digest in whole["tensors"].items())
    return Verdict(
        repeated=len(before & after) / BATCH,
        lost=(POINTS - len(before | after)) / BATCH,
        differing=differing,
        tensors=len(whole["tensors"]),
        exact=differing == 0 and resumed["seen"] == whole["seen"][stop:],
    )


def table(folder: Path) -> list[str]:
    lines = []
    for loop in LOOPS:
        for augmented in (False, True):
            for workers in (0, 2):
                place = folder / f"{list(LOOPS).index(loop)}-{augmented}-{workers}"
                place.mkdir()
                whole = run(loop, Job(place, workers, augmented, 0))
                for name, stop in STOPS.items():
                    v = judge(whole, run(loop, Job(place, workers, augmented, stop)), stop)
                    lines.append(
                        f"| {loop} | {'yes' if augmented else 'no'} | {workers} | {name} | {v.repeated:g} | {v.lost:g} "
                        f"| {v.differing} of {v.tensors} | {'**yes**' if v.exact else 'no'} |"
                    )
                    print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "resume.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-resume-") as folder:
        body = table(Path(folder))
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in dict.fromkeys(p for p, _ in LOOPS.values()))
    machine = f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, {versions}"
    early, late = (stop % BATCHES for stop in STOPS.values())
    stopped = (
        f"{EPOCHS} epochs of {BATCHES} batches, stopped in the second: early after batch {early}, late after {late}."
    )
    text = [
        "# Stopped and taken up again",
        "",
        f"`python benchmarks/bench_resume.py`, {date.today().isoformat()}; {machine}.",
        "",
        stopped,
        "Repeated and lost count points of that epoch that were seen twice or never, in batches.",
        "Exact: the final weights and buffers, and every loss since the stop, have the bits of the undisturbed run.",
        "",
        "| loop | augmented | workers | stopped | repeated | lost | tensors that differ | exact |",
        "|---|---|---|---|---|---|---|---|",
        *body,
        "",
    ]
    options.out.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["act", loop, folder, workers, augmented, stop]:
            act(loop, Job(Path(folder), int(workers), augmented == "1", int(stop)))
        case _:
            main()
