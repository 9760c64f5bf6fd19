"""What a task is: the parts of a run that know what the data mean. A task has no loop of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from thawline.train.recipe import Recipe


class Batch(Protocol):
    """A micro-batch: tensors that can be moved, and the keys of its samples."""

    @property
    def keys(self) -> Sequence[str]: ...

    def to(self, device: Any) -> Any: ...

    def rows(self, start: int, stop: int) -> Any:
        """The samples from `start` to `stop`, padded as they are: what a step that does not fit into memory is cut
        into."""
        ...


class Term(Protocol):
    """One part of the objective over one micro-batch: a sum, its coefficient applied, and what divides it."""

    @property
    def sum(self) -> Tensor: ...

    @property
    def per(self) -> str: ...


class LossSums(Protocol):
    """What the model makes of one micro-batch, nothing normalised yet.

    terms:   parts of the objective; each is divided by the global batch's weight of the name `per`
    metrics: name -> (sum, count), logged as the ratio of their sums over the global batch
    """

    @property
    def terms(self) -> Mapping[str, Term]: ...

    @property
    def metrics(self) -> Mapping[str, tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True, slots=True)
class SumTerm:
    """A plain `Term`."""

    sum: Tensor
    per: str


@dataclass(frozen=True, slots=True)
class PlainSums:
    """A plain `LossSums`, for tasks whose model does not bring its own."""

    terms: Mapping[str, SumTerm]
    metrics: Mapping[str, tuple[Tensor, Tensor]]


class LeftOut(Protocol):
    """A sample that the plan of batches does not contain: filtered, or found unreadable before training began."""

    @property
    def key(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def unreadable(self) -> bool: ...


class Samples(Protocol):
    """Samples by number. `read` is a pure function of (id, epoch) and the global generators seeded for it."""

    def __len__(self) -> int: ...
    def read(self, id: int, epoch: int) -> Any: ...
    def collate(self, samples: Sequence[Any]) -> Any: ...
    def length(self, id: int) -> float: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def left_out(self) -> Sequence[LeftOut]: ...


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Metrics of one model on one set, and a row for every sample."""

    metrics: Mapping[str, float]
    rows: Sequence[Mapping[str, Any]] = ()


class Task(Protocol):
    """The parts of a run that know what the data mean.

    A task may also have `notes`, sentences on what building the base did (rows kept, rows drawn), which are recorded,
    and `complete(recipe)`, which writes out what its own options say of the plan and of files.
    """

    name: str

    def build(self, recipe: Recipe) -> nn.Module:
        """The base model with its weights loaded, whole or not at all."""
        ...

    def samples(self, recipe: Recipe, model: nn.Module, split: str) -> Samples:
        """The samples of `train` or `valid`."""
        ...

    def weights(self, model: nn.Module, batch: Any) -> Mapping[str, float]:
        """The denominators of the loss, e.g. {"utterances": 8, "tokens": 211}, known before the model runs.

        They are summed over the whole global batch first, so that accumulation, splitting and world size do not change
        the gradient beyond the rounding of sums.
        """
        ...

    def loss(self, model: nn.Module, batch: Any) -> LossSums:
        """The sums of one micro-batch."""
        ...

    def evaluate(self, model: nn.Module, samples: Samples, batches: Iterator[Any]) -> Evaluation:
        """Metrics over `batches`, which hold every sample once. The loop puts the model into eval mode."""
        ...

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write what others load: weights under their original names and the files that belong beside them."""
        ...
