"""The plan in transformers' Trainer and in Lightning, against the real packages."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from thawline.errors import RecipeError
from thawline.freeze.callbacks import lightning_callback, trainer_callback
from thawline.freeze.plan import FreezePlan

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None or importlib.util.find_spec("accelerate") is None,
    reason="transformers with accelerate is not installed",
)
needs_lightning = pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")

needs_finetuning_scheduler = pytest.mark.skipif(
    importlib.util.find_spec("finetuning_scheduler") is None, reason="finetuning-scheduler is not installed"
)

PLAN = {
    "train": "head",
    "thaw": [
        {"after": "1 epoch", "train": "body[1]", "lr": 0.5},
        {"after": "2 epochs", "freeze": "head"},
        {"after": "3 epochs", "train": "head"},
    ],
}
PER_EPOCH, EPOCHS = 3, 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        for layer in self.body:
            x = layer(x).tanh()
        y = self.head(self.norm(x))
        loss = (y - labels).square().mean() if labels is not None else y.sum()
        return {"loss": loss, "logits": y}


class Rows(Dataset):
    def __len__(self) -> int:
        return 4 * PER_EPOCH

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(i)
        return {"x": torch.randn(4, generator=g), "labels": torch.randn(2, generator=g)}


def by_hand() -> dict[str, torch.Tensor]:
    """The same three-phase schedule in plain PyTorch, without any of our code."""
    model = Net()
    parts = [["head"], ["head", "body.1"], ["body.1"], ["head", "body.1"]]
    optimizer, state = None, {}
    batches = [torch.utils.data.default_collate([Rows()[i] for i in range(k, k + 4)]) for k in range(0, 12, 4)]
    for epoch in range(EPOCHS):
        for name, p in model.named_parameters():
            p.requires_grad_(any(name.startswith(part) for part in parts[epoch]))
            p.grad = None
        if optimizer is not None:
            state.update(optimizer.state)
        groups = [
            {"params": list(model.get_submodule(part).parameters()), "lr": 0.05 if part == "body.1" else 0.1}
            for part in parts[epoch]
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p in state:
                    optimizer.state[p] = state[p]
        model.train()
        model.norm.eval()
        for batch in batches:
            optimizer.zero_grad()
            model(**batch)["loss"].backward()
            optimizer.step()
    return model.state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def trainer(folder: Path, **more):
    from transformers import Trainer, TrainingArguments

    model = Net()
    frozen = FreezePlan(**PLAN).apply(model)
    optimizer = frozen.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.01)
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=4,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        save_strategy="steps",
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
        **more,
    )
    from torch.utils.data import SequentialSampler

    class Plain(Trainer):
        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

    run = Plain(
        model, arguments, train_dataset=Rows(), optimizers=(optimizer, None), callbacks=[trainer_callback(frozen)]
    )
    return run, model, frozen


@needs_transformers
@pytest.mark.long
def test_transformers_trainer_thaws_as_the_plan_says_and_as_by_hand(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run, model, frozen = trainer(tmp_path)
        run.train()
    frozen.audit().raise_if_broken()
    assert frozen.phase == 3
    assert same(model.state_dict(), by_hand())


@needs_transformers
@pytest.mark.long
def test_transformers_trainer_resumes_in_the_right_phase_wherever_it_stopped(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(tmp_path)[0].train()
        for stop in (2, 4, 7, 10):
            run, model, frozen = trainer(tmp_path)
            run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
            assert frozen.phase == 3
            assert same(model.state_dict(), by_hand()), stop
            frozen.audit().raise_if_broken()


@needs_transformers
@pytest.mark.long
def test_transformers_trainer_with_an_optimizer_of_its_own_is_refused(tmp_path: Path):
    from transformers import Trainer, TrainingArguments

    model = Net()
    frozen = FreezePlan(**PLAN).apply(model)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = Trainer(model, arguments, train_dataset=Rows(), callbacks=[trainer_callback(frozen)])
        with pytest.raises(RecipeError, match="not made by this plan"):
            run.train()


def lightning_run(folder: Path, *, epochs: int = EPOCHS, resume: str | None = None):
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch, index):
            return self.net(**batch)["loss"]

        def configure_optimizers(self):
            return frozen.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.01)

    module = Module()
    frozen = FreezePlan(**PLAN).apply(module.net)
    run = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        callbacks=[
            lightning_callback(frozen),
            pl.callbacks.ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_top_k=-1, filename="{step}"),
        ],
    )
    run.fit(module, DataLoader(Rows(), batch_size=4), ckpt_path=resume)
    return module.net, frozen


@needs_lightning
@pytest.mark.long
def test_lightning_thaws_as_the_plan_says_and_as_by_hand(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, frozen = lightning_run(tmp_path)
    frozen.audit().raise_if_broken()
    assert frozen.phase == 3
    assert same(model.state_dict(), by_hand())


@needs_lightning
@pytest.mark.long
def test_lightning_resumes_in_the_right_phase_wherever_it_stopped(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lightning_run(tmp_path)
        # At the end of an epoch: in the middle of one Lightning itself reads other data than it would have.
        for stop in (3, 6, 9):
            model, frozen = lightning_run(tmp_path, resume=str(tmp_path / f"step={stop}.ckpt"))
            assert frozen.phase == 3
            assert same(model.state_dict(), by_hand()), stop
            frozen.audit().raise_if_broken()
        model, frozen = lightning_run(tmp_path, resume=str(tmp_path / "step=7.ckpt"))
        assert frozen.phase == 3
        frozen.audit().raise_if_broken()


@needs_lightning
@needs_finetuning_scheduler
@pytest.mark.long
def test_a_three_phase_thaw_equals_that_of_finetuning_scheduler_bit_for_bit(tmp_path: Path):
    parts, rates = ["head", "body.1", "body.0"], [0.1, 0.05, 0.02]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = _by_finetuning_scheduler(tmp_path, parts, rates)
    thaw = [
        {"after": f"{i} epochs", "train": part, "lr": rate / rates[0]}
        for i, (part, rate) in enumerate(zip(parts, rates, strict=True))
    ][1:]
    model = Net()
    frozen = FreezePlan(train="head", thaw=thaw).apply(model)
    optimizer = frozen.optimizer(torch.optim.AdamW, lr=rates[0], weight_decay=0.01)
    model.train()
    for epoch in range(3):
        frozen.advance(epoch=epoch)
        for batch in DataLoader(Rows(), batch_size=4):
            optimizer.zero_grad()
            model(**batch)["loss"].backward()
            optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def _by_finetuning_scheduler(folder: Path, parts: list[str], rates: list[float]) -> dict[str, torch.Tensor]:
    import finetuning_scheduler
    import lightning.pytorch as pl
    import yaml

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch, index):
            self.net.norm.eval()  # its own policies let the statistics move, or normalise by the batch
            return self.net(**batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=rates[0], weight_decay=0.01)

    schedule = {
        i: {
            "params": [f"net.{part}.*".replace(".", r"\.").replace(r"\.*", ".*")],
            "lr": rate,
            "max_transition_epoch": i + 1,
        }
        for i, (part, rate) in enumerate(zip(parts, rates, strict=True))
    }
    path = folder / "schedule.yaml"
    path.write_text(yaml.safe_dump(schedule), encoding="utf-8")
    callback = finetuning_scheduler.FinetuningScheduler(
        ft_schedule=str(path), epoch_transitions_only=True, restore_best=False
    )
    module = Module()
    run = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        callbacks=[callback],
    )
    run.fit(module, DataLoader(Rows(), batch_size=4))
    return module.net.state_dict()
