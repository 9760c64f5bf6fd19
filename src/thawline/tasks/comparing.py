"""Two models or checkpoints side by side, of whatever format, each over its base where it is a delta."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from thawline.ckpt.adapters import CONFIG
from thawline.ckpt.diff import Diff, diff
from thawline.ckpt.formats.thawline_run import is_checkpoint, is_delta, is_run
from thawline.ckpt.source import open_source
from thawline.ckpt.tensors import SourceTensors
from thawline.ckpt.transfer import fetched
from thawline.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Comparison:
    """A difference, and which tensors only the element type tells apart.

    widened: names kept in half precision on one side and in fp32 on the other; they were compared as fp32, which half
             precision becomes without rounding
    """

    diff: Diff
    widened: tuple[str, ...]

    @property
    def differs(self) -> bool:
        """Whether any value differs, or any name is on one side only."""
        return not self.diff.is_same

    def to_json(self) -> dict[str, Any]:
        return {**self.diff.to_json(), "differs": self.differs, "widened": list(self.widened)}

    def table(self) -> str:
        lines = [self.diff.table()]
        if self.widened:
            lines.append(f"{len(self.widened)} tensors are half precision on one side; they were compared as fp32")
        return "\n".join(lines)


def compare(a: Path | str, b: Path | str, *, base: Path | str | None = None) -> Comparison:
    """Compare two checkpoints, runs or model directories tensor by tensor, bitwise. All may be URLs.

    Raises RecipeError where a base is given and neither leaves anything to one.
    """
    with ExitStack() as opened:
        places = [opened.enter_context(fetched(place)) for place in (a, b)]
        under = None if base is None else opened.enter_context(fetched(base))
        if under is not None and not any(map(_needs, places)):
            raise RecipeError("neither of the two leaves anything to a base", where="--base", fix="leave it out")
        one, two = (
            opened.enter_context(open_source(place, base=under if _needs(place) else None, apart=True))
            for place in places
        )
        if bool(one.adapters) != bool(two.adapters):  # the one is a model with its adapters merged
            one, two = one.merged(), two.merged()
        widened = tuple(
            name
            for name in one.names
            if name in two and {one.info(name).dtype, two.info(name).dtype} in ({"F16", "F32"}, {"BF16", "F32"})
        )
        known = frozenset(widened)
        found = diff(
            _Widened(SourceTensors(one), known), _Widened(SourceTensors(two), known), first=str(a), second=str(b)
        )
    return Comparison(found, widened)


def _needs(path: Path) -> bool:
    """Whether a base given on the command line is meant for this side: a delta, a run or a checkpoint, an adapter."""
    return is_delta(path) or is_checkpoint(path) or is_run(path) or (path / CONFIG).is_file()


class _Widened(Mapping[str, Tensor]):
    """The tensors, those named in `names` as fp32."""

    def __init__(self, tensors: Mapping[str, Tensor], names: frozenset[str]) -> None:
        self._tensors = tensors
        self._names = names

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return tensor.float() if name in self._names else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
