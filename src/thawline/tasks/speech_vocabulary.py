"""Fine-tuning to other units: which rows a recogniser keeps, which are new, in words that a person can check."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from thawline.core.rng import derive
from thawline.data.text import read_units
from thawline.errors import RecipeError
from thawline.models.wenet.model import U2Model
from thawline.models.wenet.vocabulary import VocabularyChange, resize_vocabulary_

_SHOWN = 12


@dataclass(frozen=True, slots=True)
class NewUnits:
    """A changed vocabulary.

    change:  what became of every row
    kept, drawn, dropped: the same as tokens
    """

    change: VocabularyChange
    kept: tuple[str, ...]
    drawn: tuple[str, ...]
    dropped: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a run's events and an export's vocabulary.json."""
        return {
            "size": self.change.size,
            "kept": len(self.kept),
            "new": list(self.drawn),
            "dropped": list(self.dropped),
            "tensors": list(self.change.tensors),
        }

    def __str__(self) -> str:
        return (
            f"{self.change.size} units: {len(self.kept)} keep their rows, {_named(self.drawn)} new "
            f"(drawn around the mean of the kept rows), {_named(self.dropped)} dropped"
        )


def change_vocabulary_(model: nn.Module, *, old: Path, new: Path, seed: int) -> NewUnits | None:
    """Give a WeNet model the units of `new` where it has those of `old`; None where they are the same.

    Rows of tokens in both are kept bit for bit (tokens are compared in Unicode NFC). New rows are a function of the
    run's seed, the tensor's name and the new id. The base of a run with other units is the model after this: base.json
    has the fingerprint of the changed model, and it is made again, the same, whenever the run is resumed or loaded.

    Raises RecipeError for a model without units of its own, ids with gaps, and units that lack blank or sos/eos.
    """
    if not isinstance(model, U2Model) or model.config.is_whisper:
        raise RecipeError(
            "only a model with a units.txt can be given other units, and this one is a Whisper",
            where="options.units",
            fix="leave options.units out: Whisper's vocabulary belongs to its tokenizer",
        )
    before, after = read_units(old), read_units(new)
    if before == after:
        return None
    if sorted(after.values()) != list(range(len(after))):
        raise RecipeError(
            f"{len(after)} units have ids up to {max(after.values())}: ids must be 0, 1, 2, ... without gaps",
            where=str(new),
            fix="number the lines from 0",
        )
    here, there = _composed(before), _composed(after)
    mapping = {i: there[token] for token, i in here.items() if token in there}
    try:
        change = resize_vocabulary_(model, mapping, len(after), derive(seed, "units"))
    except RecipeError as error:
        raise RecipeError(error.what, where=str(new), fix=error.fix) from error
    names, old_names = {i: t for t, i in after.items()}, {i: t for t, i in before.items()}
    return NewUnits(
        change,
        kept=tuple(names[i] for _, i in change.kept),
        drawn=tuple(names[i] for i in change.new),
        dropped=tuple(old_names.get(i, f"id {i}") for i in change.dropped),
    )


def _composed(units: Mapping[str, int]) -> dict[str, int]:
    return {unicodedata.normalize("NFC", token): i for token, i in units.items()}


def _named(tokens: tuple[str, ...]) -> str:
    if not tokens:
        return "none"
    more = f" and {len(tokens) - _SHOWN} more" if len(tokens) > _SHOWN else ""
    return f"{len(tokens)} ({' '.join(tokens[:_SHOWN])}{more})"
