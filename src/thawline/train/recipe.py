"""The recipe: everything a run is a function of, as one frozen value.

The recipe names files and numbers; it builds nothing. Task-specific settings (`data.conf`, `options`) stay plain here
and are bound by the task that owns them, with the same file:line errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, field_validator, model_validator

from thawline.core.config import Document, Strict, bind, override, read_yaml
from thawline.core.span import Span
from thawline.data.sampler import Batching
from thawline.errors import RecipeError
from thawline.freeze.plan import FreezePlan


def _span(text: str | int | Span) -> Span:
    try:
        return Span.parse(text)
    except RecipeError as exc:  # pydantic knows the place of a ValueError only
        raise ValueError(f"{exc.what}: {exc.fix}") from exc


def _some(span: Span) -> Span:
    if not span.amount:
        raise ValueError("must be more than nothing, e.g. 1 steps")
    return span


def _clock(span: Span) -> Span:
    if span.unit != "minutes":
        raise ValueError("a limit of time is given in minutes or hours, e.g. '90 minutes'")
    return span


SpanField = Annotated[Span, BeforeValidator(_span), PlainSerializer(str, return_type=str)]
"""A field written as `500 steps`, `2 epochs`, `10 minutes` or `20%`."""
Every = Annotated[SpanField, AfterValidator(_some)]
"""How often something is done."""


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
    momentum: tuple[float, float] | None = (0.85, 0.95)
    """onecycle only: the least momentum (Adam: first beta), at the highest rate, and the greatest; null leaves it."""


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

    every: Every = Span(500, "steps")
    """Besides this, one is written at each evaluation, at the end and when the run is told to stop."""
    keep: int = Field(default=3, ge=1)
    """The newest so many stay."""
    keep_every: int | None = Field(default=None, ge=1)
    """Those whose step is a multiple of this stay too, as milestones to go back to."""
    best: str | None = None
    """A metric such as `valid/wer`: its best checkpoint stays too, and is what the run exports."""
    mode: Literal["min", "max", "auto"] = "auto"
    """Which direction is better; auto takes the larger accuracy and the smaller anything else."""
    mirror: str | None = None
    """A URL (s3://bucket/run) to which checkpoints are sent behind the training, and at the end the result; `thawline
    resume URL` goes on from there on another machine. Needs the extra `remote`."""
    on_error: Literal["continue", "stop"] = "continue"
    """Where the storage refuses one (full, over quota, not permitted): report it and go on with the last good one, or
    stop with exit code 75. The last save of a run, and that of one that was told to stop, always end in 75."""

    @field_validator("mirror")
    @classmethod
    def _a_url(cls, place: str | None) -> str | None:
        if place is not None and "://" not in place:
            raise ValueError(f"{place!r} is not a URL: write s3://bucket/run, or file:///path for a folder")
        return place


class EmaSettings(Strict):
    """An exponential moving average of what trains. Evaluations, the best checkpoint and the exported model are the
    average's; checkpoints hold both. See `thawline.train.ema`."""

    decay: float = Field(default=0.999, ge=0, lt=1)
    warmup: bool = True
    """At most (1 + n) / (10 + n) at step n, so that an early average is not still the base."""

    def at(self, step: int) -> float:
        """The decay of the update that follows `step` finished ones."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay


class NonfiniteSettings(Strict):
    """What happens after steps whose loss or gradient is not finite. Each is skipped: no update, and it is recorded."""

    limit: int = Field(default=5, ge=1)
    """So many in a row are too many."""
    then: Literal["stop", "rewind"] = "stop"
    """rewind: go back to the last whole checkpoint before them, and pass over every batch read since then. Steps are
    functions of weights and batches: to repeat the good ones among them would lead to the same place. Stops where that
    did not help."""


class RunSettings(Strict):
    """How the recipe is executed."""

    epochs: int = Field(default=3, ge=1)
    steps: int | None = Field(default=None, ge=1)
    """Stop after so many steps even if the epochs are not over."""
    seed: int = 7
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the forward pass; weights, gradients and update are fp32 throughout. fp16 scales the loss, as GradScaler
    does: a step whose scaled gradient overflows is skipped, and the scale halved."""
    accumulate: int = Field(default=1, ge=1)
    """Micro-batches a step: the global batch is that many batches."""
    micro_batches: int | None = Field(default=None, ge=1)
    """Cut the global batch into so many, and sum them in an order that is the same for every world size dividing it:
    the run's bits then do not depend on the world size. A multiple of `accumulate`. Costs a gradient buffer for each
    factor of two."""
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Most samples that go through the model at once; micro-batches of more are cut, and the gradient stays theirs.
    auto: as many as fit, found by trying before the first step. Where memory runs out, pieces are halved anyhow."""
    recompute: bool = False
    """Keep only the inputs of the model's blocks for the backward pass, and compute the rest again there: less memory
    and about a third more time, the same bits."""
    workers: int = Field(default=2, ge=0)
    """Loader processes; changes nothing but speed."""
    evaluate: Every = Span(1, "epochs")
    """Steps, epochs or a share of the run: what depends on evaluations must not depend on the clock."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    engine: Literal["auto", "single"] = "auto"
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    time_limit: Annotated[SpanField, AfterValidator(_clock)] | None = None
    """Minutes or hours after which the run checkpoints and stops with exit code 75."""
    nonfinite: NonfiniteSettings = NonfiniteSettings()
    ema: EmaSettings | None = None
    tensorboard: bool = False
    """Write the metrics for TensorBoard too (needs the extra `tensorboard`)."""

    @field_validator("evaluate")
    @classmethod
    def _no_clock(cls, every: Span) -> Span:
        if every.unit == "minutes":
            raise ValueError("phases and the best checkpoint depend on evaluations: give steps, epochs or %")
        return every

    @model_validator(mode="after")
    def _a_place_to_go_back_to(self) -> RunSettings:
        if self.nonfinite.then == "rewind" and self.checkpoint.every.unit == "minutes":
            raise ValueError(
                "to go back to a checkpoint that the clock decided on is not reproducible: "
                "nonfinite.then: rewind needs checkpoint.every in steps, epochs or %"
            )
        return self

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> RunSettings:
        if self.micro_batches is not None and self.micro_batches % self.accumulate:
            raise ValueError(f"micro_batches must be a multiple of accumulate ({self.accumulate}): each batch is cut")
        return self


class StartSettings(Strict):
    """Where another program's training left off, for a run that goes on with it; `thawline init --continue` writes it.

    `model` then gives the weights of that moment. See `thawline.train.start`.
    """

    step: int = Field(ge=0)
    """Updates taken so far: schedules, and the run's own steps, go on from there."""
    epoch: int | None = Field(default=None, ge=0)
    """Whole passes over the data so far. Empty where that is not known: as many as `step` steps of this recipe make,
    and reading then begins in the middle of one."""
    optimizer: str | None = None
    """A DeepSpeed checkpoint with the moments of its optimizer; empty begins without moments."""


class Recipe(Strict):
    """One fine-tuning run."""

    task: str
    """speech"""
    model: str
    """The base: a WeNet directory, a Hugging Face directory, a run directory, or a weights file."""
    init: Literal["pretrained", "random"] = "pretrained"
    """random: take the shape of the model only and draw the weights from the seed."""
    start: StartSettings | None = None
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

    @model_validator(mode="after")
    def _something_is_left(self) -> Recipe:
        if self.start is not None and (self.start.epoch or 0) >= self.run.epochs:
            raise ValueError(
                f"start.epoch {self.start.epoch} of run.epochs {self.run.epochs}: nothing is left; raise run.epochs"
            )
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
        if self.start is None:
            del data["start"]
        elif self.start.optimizer is not None:
            data["start"]["optimizer"] = str(self.path("start", "optimizer"))
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
