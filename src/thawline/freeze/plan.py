"""The freeze plan: what trains, at what rate, from when, and how normalisation layers behave.

A plan is a value: it comes from YAML or from keywords, is checked here for what can be checked without a model, and
is written back as plain data. What it means for one model is decided in `resolve.py`; when its phases begin, in
`schedule.py`; nothing is changed but by `apply.py`. Torch is never imported at the top.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from thawline.core.config import Document, Strict, bind, read_yaml
from thawline.core.digest import digest_bytes
from thawline.core.index import ModelIndex
from thawline.core.select import Item, items_of, layers_of
from thawline.core.span import Span
from thawline.errors import RecipeError, ThawlineError

if TYPE_CHECKING:
    from torch import nn

    from thawline.freeze.frozen import Frozen

NormPolicy = Literal["pinned", "tracking", "groupnorm"]

_PLATEAU = re.compile(r"\s*plateau\(\s*([^,()]+?)\s*((?:,\s*\w+\s*=\s*[^,()]+?\s*)*)\)\s*")
_HIGHER_IS_BETTER = re.compile(r"(acc|accuracy|bleu|f1|precision|recall|auc|map|iou|top\d)$", re.IGNORECASE)


class _Raising(type(Strict)):  # type: ignore[misc]  # pydantic's metaclass has no public name
    """Makes `FreezePlan(...)` raise the same RecipeError in Python that a recipe raises with its place."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError:
            # The door for YAML says it best: unknown keys with their neighbours, one complaint a place.
            return bind(cls, Document(kwargs, "plan"))


class Counted(Strict):
    """A selector with the count that it promises."""

    select: str
    expect: int | None = Field(default=None, ge=1)
    """So many layers, modules or tensors are named directly: 2 for `encoder.encoders[-2:]`."""
    tensors: int | None = Field(default=None, ge=1)
    """So many parameters and buffers lie in them."""


def _listed(value: Any) -> Any:
    """A single selector as a list of one."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _meant(entry: Any) -> Any:
    """Refuses what YAML made of an unquoted selector, with the remedy."""
    if isinstance(entry, (list, tuple)):
        raise ValueError(f'{entry!r} is a list inside the list (a slice needs quotes here: "name[-2:]")')
    if not isinstance(entry, Counted):
        try:
            items_of(entry)
        except ThawlineError as exc:
            raise ValueError(f"{exc.what} ({exc.fix})") from exc
    return entry


Selector = Annotated[str | Counted, BeforeValidator(_meant)]
Selectors = Annotated[tuple[Selector, ...], BeforeValidator(_listed)]


def _span(value: Any) -> Any:
    if value is None:
        return None
    try:
        span = Span.parse(value)
    except RecipeError as exc:
        raise ValueError(f"{exc.what} ({exc.fix})") from exc
    if span.unit == "minutes":
        raise ValueError("steps own the schedule, not the clock; write steps, epochs or %")
    return str(value)


Stretch = Annotated[str | None, BeforeValidator(_span)]


def _positive(value: float) -> float:
    if value == 0:
        raise ValueError("a rate of 0 is no freeze: the tensor is still updated by decay and kept in the optimizer; "
                         'take it out of train instead ("!name")')  # fmt: skip
    if not (math.isfinite(value) and value > 0):
        raise ValueError("a multiplier of the learning rate is a positive number")
    return value


class LayerDecay(Strict):
    """Layer-wise decay of the learning rate: the last layer of `over` at `decay ** start`, each earlier one lower.

    `below` (an embedding, a front end) counts as one layer beneath the first. ELECTRA and BEiT take start 1.
    """

    decay: float = Field(gt=0, le=1)
    over: str
    start: int = Field(default=0, ge=0)
    below: Selectors = ()


def _rates(value: Any) -> Any:
    """The forms of `lr`: a number, {selector: number}, {decay:, over:}, or a list of these, as a tuple."""
    entries = value if isinstance(value, (list, tuple)) else [value]
    made: list[Any] = []
    for entry in entries:
        if isinstance(entry, LayerDecay):
            made.append(entry)
        elif isinstance(entry, Mapping) and {"decay", "over"} & set(entry):
            decay_keys = set(LayerDecay.model_fields)
            made.append(LayerDecay.model_validate({k: v for k, v in entry.items() if k in decay_keys}))
            rest = {k: v for k, v in entry.items() if k not in decay_keys}
            if rest:
                made.append(_checked(rest))
        elif isinstance(entry, Mapping):
            made.append(_checked(entry))
        elif isinstance(entry, (int, float)) and not isinstance(entry, bool):
            made.append(_positive(float(entry)))
        else:
            raise ValueError("lr takes a multiplier, {selector: multiplier}, or {decay: 0.9, over: a layer list}")
    return tuple(made)


def _checked(entry: Mapping[Any, Any]) -> dict[str, float]:
    rates: dict[str, float] = {}
    for key, value in entry.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"the multiplier of {key!r} is {value!r}, not a number")
        try:
            rates[str(key)] = _positive(float(value))
        except ValueError as exc:
            raise ValueError(f"{key}: {exc}") from exc
    return rates


Rates = Annotated[tuple[Any, ...], BeforeValidator(_rates)]


class Lora(Strict):
    """Low-rank adapters through peft (Hu et al. 2021): which linear layers get one, and its size."""

    target: Selectors
    r: int = Field(default=8, ge=1)
    """Rank of the update."""
    alpha: float = Field(default=16, gt=0)
    """The update is scaled by alpha / r (by alpha / sqrt(r) with `rslora`)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's input that is dropped in training; stays active inside frozen layers."""
    modules_to_save: Selectors = ()
    """Parts that train in full beside the adapters, e.g. a new head."""
    rslora: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plateau:
    """A metric has stopped getting better: `patience` evaluations in a row within the phase brought no new best."""

    metric: str
    patience: int
    min_delta: float = 0.0
    higher_is_better: bool = False

    @classmethod
    def parse(cls, text: str, *, where: str = "") -> Plateau:
        """Read `plateau(valid/loss, patience=2, min_delta=0.001, mode=min)`.

        mode is max for names that end in acc, accuracy, bleu, f1 and their like, else min.
        """
        found = _PLATEAU.fullmatch(text)
        if found is None:
            raise RecipeError(f"{text!r} is not a condition", where=where, fix="e.g. plateau(valid/loss, patience=2)")
        given: dict[str, str] = {}
        for piece in found[2].split(",")[1:]:
            key, _, value = piece.partition("=")
            given[key.strip()] = value.strip()
        metric = found[1]
        mode = given.pop("mode", "max" if _HIGHER_IS_BETTER.search(metric) else "min")
        try:
            made = cls(
                metric=metric,
                patience=int(given.pop("patience", "1")),
                min_delta=float(given.pop("min_delta", "0")),
                higher_is_better={"min": False, "max": True}[mode],
            )
        except (ValueError, KeyError) as exc:
            raise RecipeError(f"{text!r} is not a condition: {exc}", where=where, fix="patience=2, mode=min") from exc
        if given or made.patience < 1 or not made.min_delta >= 0:
            odd = f"unknown {sorted(given)[0]!r}" if given else "patience is at least 1, min_delta at least 0"
            raise RecipeError(
                f"{text!r} is not a condition: {odd}", where=where, fix="it takes patience, min_delta, mode"
            )
        return made


def _condition(value: Any) -> Any:
    if value is not None:
        try:
            Plateau.parse(str(value))
        except RecipeError as exc:
            raise ValueError(f"{exc.what} ({exc.fix})") from exc
    return value


class Thaw(Strict):
    """The beginning of a phase: when it is due, and what is different from then on.

    Its rules are added after those of the phases before, so the last one wins: `train: ["!ctc"]`, or `freeze: [ctc]`,
    freezes again. With `over` one entry stands for a phase per layer.
    """

    model_config = ConfigDict(populate_by_name=True)

    after: Stretch = None
    """Not before this much of the run: `2 epochs`, `500 steps`, `30%`, counted from the run's beginning."""
    when: Annotated[str | None, BeforeValidator(_condition)] = None
    """Not before this holds in the phase before: `plateau(valid/loss, patience=2)`."""
    by: Stretch = None
    """At the latest after this much of the run, whether `when` holds or not."""
    train: Selectors = ()
    freeze: Selectors = ()
    lr: Rates = ()
    """A number is the multiplier of what this phase names under train; a mapping adds rules to the plan's own."""
    norms: NormPolicy | dict[str, NormPolicy] | None = None
    warmup: Stretch = None
    """The rate of what begins to train here rises linearly from 0 over this stretch."""
    over: str | None = None
    """A layer list to thaw a layer at a time."""
    from_: Literal["top", "bottom"] = Field(default="top", alias="from")
    every: Stretch = None
    """Time between two layers; the first is due at `after`, or after one such stretch."""
    layers: int = Field(default=1, ge=1)
    """Layers at a time."""

    @model_validator(mode="after")
    def _whole(self) -> Thaw:
        if self.over is not None:
            if self.every is None or self.when is not None or self.by is not None:
                raise ValueError(
                    "thawing over a layer list needs every: (e.g. 1 epoch) and takes neither when: nor by:"
                )
            if self.after is not None and Span.parse(self.after).unit != Span.parse(self.every).unit:
                raise ValueError("after and every must be in the same unit")
        elif self.every is not None or self.layers != 1 or self.from_ != "top":
            raise ValueError("every, from and layers belong to over: (the layer list to thaw)")
        elif self.after is None and self.when is None:
            raise ValueError('a phase needs after: (e.g. "2 epochs") or when: (e.g. "plateau(valid/loss, patience=2)")')
        elif self.by is not None and self.when is None:
            raise ValueError("by: limits how long when: is waited for; without when: write after:")
        if not (self.train or self.freeze or self.over or self.lr or self.norms):
            raise ValueError("a phase that changes nothing; give it train:, freeze:, lr: or norms:")
        return self


class FreezePlan(Strict, metaclass=_Raising):
    """What trains. Everything that no rule names stays as it is, bit for bit.

    >>> FreezePlan(train=["ctc", "encoder.encoders[-2:]"], lr={"encoder.**": 0.1}).to_dict()
    {'train': ['ctc', 'encoder.encoders[-2:]'], 'lr': {'encoder.**': 0.1}}
    """

    train: Selectors = ()
    """What trains: selectors (see core/selector_syntax.py), added up from left to right, `!` takes away."""
    freeze: Selectors = ()
    """What does not, after `train`; alone it means everything else trains."""
    preset: str | None = None
    """A plan by name (see freeze/presets.py); the other fields add to it."""
    norms: NormPolicy | dict[str, NormPolicy] = "pinned"
    """Normalisation layers with statistics. pinned: frozen ones keep their statistics and stay in eval mode;
    tracking: weights frozen, statistics adapt; groupnorm: BatchNorm is replaced by GroupNorm."""
    lr: Rates = ()
    """Multipliers of the learning rate, the last match wins."""
    no_decay: Selectors = ()
    """What is kept from weight decay, commonly ["@bias", "@norm"]."""
    may_rest: Selectors = ()
    """What trains and may nevertheless stay as it is, since no loss depends on it: the audit lets it."""
    thaw: tuple[Thaw, ...] = ()
    """Phases after the first, in order."""
    lora: Lora | None = None
    moments: Literal["park", "reset"] = "park"
    """Optimizer state of what is frozen again: parked and taken up if it thaws once more, or dropped."""

    @field_validator("norms", mode="after")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if isinstance(value, dict) and not value:
            raise ValueError("the mapping is empty; write a policy, or {selector: policy}")
        return value

    @model_validator(mode="after")
    def _says_what_trains(self) -> FreezePlan:
        if not (self.train or self.freeze or self.preset or self.lora):
            raise ValueError('nothing is said to train; write train: [...], e.g. ["**"] for everything')
        last: Span | None = None
        for i, phase in enumerate(self.thaw):
            if phase.after is None or phase.over is not None:
                continue
            due = Span.parse(phase.after)
            if last is not None and last.unit == due.unit and due.amount < last.amount:
                raise ValueError(f"phases stand in order of time, but thaw[{i}] is due after {due}, before {last}")
            last = due
        return self

    _kind: ClassVar[str] = "plan"

    @classmethod
    def from_yaml(cls, path: Path | str) -> FreezePlan:
        """The plan in a YAML file: the file itself, or what stands under its key `plan`."""
        document = read_yaml(path)
        inside = isinstance(document.data, Mapping) and "plan" in document.data
        return bind(cls, document, ("plan",) if inside else ())

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, without what is left at its default; `FreezePlan(**plan.to_dict())` equals it."""
        plain = _plain(self)
        assert isinstance(plain, dict)
        return plain

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, one form for every way of writing the same plan."""
        # Order is meaning in mappings of selectors (the last match wins), so only fixed keys are sorted.
        return json.dumps(_ordered(self.to_dict()), ensure_ascii=False, separators=(",", ":"))

    @property
    def digest(self) -> str:
        """64 hexadecimal digits that change with the plan's meaning."""
        return digest_bytes("plan", (), self.to_json().encode())

    @property
    def phases(self) -> int:
        """Number of phases, the first included. An entry with `over` counts as one until `expanded`."""
        return 1 + len(self.thaw)

    @property
    def is_expanded(self) -> bool:
        return self.preset is None and all(phase.over is None for phase in self.thaw)

    def expanded(self, index: ModelIndex) -> FreezePlan:
        """The same plan for one model, with presets and `over` written out. Does nothing to an expanded plan."""
        if self.is_expanded:
            return self
        plan = self
        if plan.preset is not None:
            plan = plan._with_preset(index)
        phases = [made for i, phase in enumerate(plan.thaw) for made in plan._layer_phases(i, phase, index)]
        return plan.model_copy(update={"thaw": tuple(phases)})

    def apply(self, model: nn.Module, *, audit: bool = True) -> Frozen:
        """Bring `model` under the plan's first phase: requires_grad, modes and norms; adapters where `lora` is set.

        audit: take digests of every tensor now, so that `Frozen.audit` can prove later what did not change.
        """
        from thawline.freeze.frozen import apply_plan

        return apply_plan(self, model, audit=audit)

    def _with_preset(self, index: ModelIndex) -> FreezePlan:
        from thawline.freeze.presets import preset

        assert self.preset is not None
        settings = preset(self.preset, index, where=self.where("preset"))
        base = FreezePlan(**settings)
        return self.model_copy(
            update={
                "preset": None,
                "train": base.train + self.train,
                "lr": base.lr + self.lr,
                "no_decay": base.no_decay + self.no_decay,
                "may_rest": base.may_rest + self.may_rest,
                "thaw": base.thaw + self.thaw,
            }
        )

    def _layer_phases(self, number: int, phase: Thaw, index: ModelIndex) -> list[Thaw]:
        if phase.over is None:
            return [phase]
        where = phase.where("over") or f"thaw[{number}].over"
        layers = list(layers_of(phase.over, index, where=where))
        if phase.from_ == "top":
            layers.reverse()
        assert phase.every is not None
        every = Span.parse(phase.every)
        start = Span.parse(phase.after).amount if phase.after is not None else every.amount
        made = []
        for k, at in enumerate(range(0, len(layers), phase.layers)):
            due = Span(start + k * every.amount, every.unit)
            if due.unit == "fraction" and due.amount > 1 + 1e-9:
                raise RecipeError(
                    f"layer {k + 1} of {len(layers)} in {phase.over!r} would thaw after the end of the run",
                    where=where,
                    fix="a smaller every:, or more layers: at a time",
                )
            extra = phase.train if k == 0 else ()
            update = {
                "over": None,
                "every": None,
                "from_": "top",
                "layers": 1,
                "after": _written(due),
                "train": (*extra, *layers[at : at + phase.layers]),
            }
            made.append(phase.model_copy(update=update))
        return made

    def rules(self, phase: int) -> list[tuple[Item, str, int]]:
        """Every train rule in force in `phase`, in order: (selector, how it is called in reports, its phase)."""
        made: list[tuple[Item, str, int]] = []
        train = self.train
        if not train and self.freeze and self.preset is None:
            train = ("**",)
        made += _rules(self, "train", train, "train", 0, minus=False)
        made += _rules(self, "freeze", self.freeze, "freeze", 0, minus=True)
        if self.lora is not None:
            made += _rules(
                self.lora, "modules_to_save", self.lora.modules_to_save, "lora.modules_to_save", 0, minus=False
            )
        for i, entry in enumerate(self.thaw[:phase]):
            made += _rules(entry, "train", entry.train, f"thaw[{i}].train", i + 1, minus=False)
            made += _rules(entry, "freeze", entry.freeze, f"thaw[{i}].freeze", i + 1, minus=True)
        return made


def _rules(
    holder: Strict, field: str, selectors: Sequence[str | Counted], label: str, phase: int, *, minus: bool
) -> list[tuple[Item, str, int]]:
    made = []
    for i, selector in enumerate(selectors):
        value = selector if isinstance(selector, str) else selector.model_dump()
        where = holder.where(field, i) or f"{label}[{i}]"
        for item in items_of(value, where=where):
            if minus and item.minus:
                raise RecipeError(f"{item.spelled!r} under freeze is frozen twice over", where=where, fix="leave out !")
            turned = Item(
                text=item.text, minus=item.minus or minus, expect=item.expect, tensors=item.tensors, where=where
            )
            made.append((turned, f"{label}[{i}] {item.spelled}", phase))
    return made


def _written(span: Span) -> str:
    amount = f"{span.amount * 100:.10g}" if span.unit == "fraction" else f"{span.amount:.10g}"
    return f"{amount}%" if span.unit == "fraction" else f"{amount} {span.unit}"


def _plain(value: Any) -> Any:
    if isinstance(value, Strict):
        made: dict[str, Any] = {}
        for name, info in type(value).model_fields.items():
            given = getattr(value, name)
            if given == info.get_default(call_default_factory=True) and not info.is_required():
                continue
            made[info.alias or name] = _plain_rates(given) if name == "lr" else _plain(given)
        return made
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _plain_rates(rates: Sequence[Any]) -> Any:
    plain = [_plain(rate) for rate in rates]
    return plain[0] if len(plain) == 1 else plain


def _ordered(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {key: plan[key] for key in sorted(plan)}
