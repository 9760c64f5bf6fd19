"""The recipe: everything a run is a function of, as one frozen value.

The recipe names files and numbers; it builds nothing. Task-specific settings (`data.conf`, `options`) stay plain here
and are bound by the task that owns them, with the same file:line errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from thawline.core.config import Document, Strict, bind, override, read_yaml
from thawline.core.span import Span
from thawline.data.sampler import Batching
from thawline.errors import RecipeError
from thawline.freeze.plan import FreezePlan

SpanField = Annotated[Span, BeforeValidator(Span.parse), PlainSerializer(str, return_type=str)]
"""A field written as `500 steps`, `2 epochs`, `10 minutes` or `20%`."""


class DataSettings(Strict):
    """What the model learns from and is judged by."""

    train: str
    """A list, table or folder of training samples; relative to the recipe."""
    valid: str | None = None
    """Held-back samples; without them nothing is evaluated and no best checkpoint is known."""
    batch: Batching = Batching(size=8)
    """`{size: 8}` samples, or `{frames: 12000}` padded frames a micro-batch."""
    conf: dict[str, Any] = {}
    """The task's own settings (for speech, WeNet's dataset_conf names)."""
    max_bad: float = Field(default=0.01, ge=0, le=1)
    """Share of training samples that may turn out unreadable before the run stops with exit code 3."""


class ScheduleSettings(Strict):
    """The learning rate as a function of the step; see `thawline.train.schedule`."""

    name: Literal["constant", "linear", "cosine", "wsd", "noam", "warmuplr", "onecycle"] = "constant"
    warmup: SpanField = Span(0, "steps")
    """Steps over which the rate rises from near zero. `warmuplr` and `noam` need it above zero."""
    decay: SpanField = Span(0.2, "fraction")
    """wsd only: the length of the final decay."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """linear, cosine, wsd, onecycle: the last rate as a share of the highest."""
    d_model: int = Field(default=256, gt=0)
    """noam only: the model width of its formula."""


class OptimSettings(Strict):
    """The optimizer. Rates per layer belong to the plan (`plan.lr`)."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """sgd only."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest allowed norm of the gradient of what trains; null leaves it alone."""
    schedule: ScheduleSettings = ScheduleSettings()


class CheckpointSettings(Strict):
    """When checkpoints are written and which are kept."""

    every: SpanField = Span(500, "steps")
    """Besides this, one is written at each evaluation, at the end and when the run is told to stop."""
    keep: int = Field(default=3, ge=1)
    """The newest so many stay."""
    best: str | None = None
    """A metric such as `valid/wer`: its best checkpoint stays too, and is what the run exports."""
    mode: Literal["min", "max", "auto"] = "auto"
    """Which direction is better; auto takes the larger accuracy and the smaller anything else."""


class RunSettings(Strict):
    """How the recipe is executed."""

    epochs: int = Field(default=3, ge=1)
    steps: int | None = Field(default=None, ge=1)
    """Stop after so many steps even if the epochs are not over."""
    seed: int = 7
    precision: Literal["fp32", "bf16"] = "fp32"
    accumulate: int = Field(default=1, ge=1)
    """Micro-batches a step: the global batch is that many batches."""
    workers: int = Field(default=2, ge=0)
    """Loader processes; changes nothing but speed."""
    evaluate: SpanField = Span(1, "epochs")
    checkpoint: CheckpointSettings = CheckpointSettings()
    engine: Literal["auto", "single"] = "auto"
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    time_limit: SpanField | None = None
    """Minutes after which the run checkpoints and stops with exit code 75."""
    nonfinite_limit: int = Field(default=5, ge=1)
    """So many steps in a row with a loss or gradient that is not finite stop the run."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too (needs the extra `tensorboard`)."""


class Recipe(Strict):
    """One fine-tuning run."""

    task: str
    """speech"""
    model: str
    """The base: a WeNet directory, a Hugging Face directory, a run directory, or a weights file."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random: take the shape of the model only and draw the weights from the seed."""
    data: DataSettings
    plan: FreezePlan
    optim: OptimSettings = OptimSettings()
    run: RunSettings = RunSettings()
    options: dict[str, Any] = {}
    """Settings of the task itself, e.g. the language that a Whisper model is prompted with."""

    @model_validator(mode="after")
    def _best_needs_valid(self) -> Recipe:
        if self.run.checkpoint.best is not None and self.data.valid is None:
            raise ValueError("run.checkpoint.best needs data.valid: nothing would be evaluated")
        return self

    def path(self, *field: str) -> Path:
        """The file or folder written at `field`, absolute: relative to the recipe, or for overrides to the
        working directory."""
        value: Any = self
        for name in field:
            value = getattr(value, name)
        return (self.folder(*field) / Path(str(value)).expanduser()).absolute()

    def bind_part(self, cls: type[Any], *field: str) -> Any:
        """A task-specific part (`data.conf`, `options`) as a value of type `cls`, with located errors."""
        if self._document is None:
            value: Any = self
            for name in field:
                value = getattr(value, name)
            return bind(cls, Document(value, ".".join(field)))
        if not _holds(self._document.data, field):
            return cls()
        return bind(cls, self._document, (*self._path, *field))

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default written out and every path absolute: what the run directory keeps."""
        data: dict[str, Any] = self.model_dump(mode="json", exclude={"plan"})
        data["plan"] = self.plan.to_dict()
        data["model"] = str(self.path("model"))
        data["data"]["train"] = str(self.path("data", "train"))
        if self.data.valid is not None:
            data["data"]["valid"] = str(self.path("data", "valid"))
        return data


def read_recipe(path: Path | str, overrides: Any = ()) -> Recipe:
    """The recipe at `path` with overrides (`["optim.lr=3e-4"]` or a mapping). Raises RecipeError with the place."""
    document = read_yaml(path)
    if not isinstance(document.data, dict):
        raise RecipeError("a recipe is a mapping of keys", where=document.where(), fix="see `thawline init`")
    return bind(Recipe, override(document, overrides))


def _holds(data: Any, path: tuple[str, ...]) -> bool:
    for key in path:
        if not isinstance(data, dict) or data.get(key) is None:
            return False
        data = data[key]
    return True
