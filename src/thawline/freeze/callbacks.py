"""The plan in other people's loops: callbacks for transformers' Trainer and for Lightning.

Both tell a `Frozen` how far the run is and what was measured; the optimizer must be one that is attached
(`frozen.optimizer(...)`), so that its groups follow the phases, and a resume lands in the right one.

    frozen = plan.apply(model)
    optimizer = frozen.optimizer(torch.optim.AdamW, lr=1e-4)
    Trainer(model, ..., optimizers=(optimizer, None), callbacks=[trainer_callback(frozen)])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from thawline.core.extras import need
from thawline.errors import RecipeError
from thawline.freeze.frozen import Frozen


def trainer_callback(frozen: Frozen) -> Any:
    """A `transformers.TrainerCallback` that carries the phases of `frozen`, also through a resume.

    Metrics are known to the plan's conditions as the Trainer names them (`eval_loss`) and as `valid/loss`. Raises
    RecipeError when training begins with an optimizer that cannot follow the phases.
    """
    transformers = need("transformers", extra="hf")

    class PlanCallback(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _require_attached(frozen, kwargs.get("optimizer"), "optimizers=(frozen.optimizer(...), None)")
            whole_epochs = args.max_steps <= 0 and float(args.num_train_epochs).is_integer()
            per_epoch = round(state.max_steps / args.num_train_epochs) if whole_epochs else 0
            self._told(state, total_steps=state.max_steps, steps_per_epoch=per_epoch)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._told(state)

        def on_evaluate(
            self, args: Any, state: Any, control: Any, metrics: Mapping[str, Any] | None = None, **kwargs: Any
        ) -> None:
            self._told(state, metrics=_numbers(metrics or {}, "eval_"))

        def _told(self, state: Any, **more: Any) -> None:
            frozen.advance(step=state.global_step, epoch=float(state.epoch or 0.0), **more)

    return PlanCallback()


def lightning_callback(frozen: Frozen) -> Any:
    """A Lightning `Callback` that carries the phases of `frozen`, also through a resume.

    `configure_optimizers` must return an optimizer made by `frozen.optimizer(...)`. Works with the packages
    `lightning` and `pytorch_lightning`; raises MissingExtra where neither is installed.
    """
    lightning = need("lightning.pytorch", extra="lightning")

    class PlanCallback(lightning.Callback):  # type: ignore[misc,name-defined]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            for optimizer in trainer.optimizers:
                _require_attached(frozen, optimizer, "return frozen.optimizer(...) from configure_optimizers")
            per_epoch = int(trainer.num_training_batches) // max(trainer.accumulate_grad_batches, 1)
            self._told(trainer, steps_per_epoch=per_epoch)

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self._told(trainer)

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                self._told(trainer, metrics=_numbers(trainer.callback_metrics, "val_"))

        def _told(self, trainer: Any, **more: Any) -> None:
            total = trainer.estimated_stepping_batches
            total = int(total) if total != float("inf") else 0
            frozen.advance(step=trainer.global_step, total_steps=total, **more)

    return PlanCallback()


def _require_attached(frozen: Frozen, optimizer: Any, how: str) -> None:
    inner = optimizer
    while not isinstance(inner, torch.optim.Optimizer) or hasattr(inner, "optimizer"):
        # accelerate and Lightning put a wrapper around the optimizer they are given.
        deeper = getattr(inner, "optimizer", None)
        if deeper is None:
            break
        inner = deeper
    if not frozen.follows(inner):
        raise RecipeError(
            "the trainer's optimizer was not made by this plan, so it cannot follow its phases",
            fix=how,
        )


def _numbers(metrics: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Metrics as numbers, under their own names and as `valid/...`."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1):
            number = float(value)
            if name not in ("epoch", "step"):
                found[name] = number
            if name.startswith(prefix):
                found[f"valid/{name.removeprefix(prefix)}"] = number
    return found
