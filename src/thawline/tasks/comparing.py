"""Two models or checkpoints side by side, of whatever format, each over its base where it is a delta."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from thawline.ckpt.diff import Diff, diff
from thawline.ckpt.source import open_source
from thawline.ckpt.tensors import SourceTensors
from thawline.ckpt.transfer import fetched

_WIDENED = {"F16", "BF16"}


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
    """Compare two checkpoints, runs or model directories tensor by tensor, bitwise. All may be URLs."""
    with (
        fetched(a) as first,
        fetched(b) as second,
        nullcontext() if base is None else fetched(base) as under,
        open_source(first, base=under if _needs(first) else None) as one,
        open_source(second, base=under if _needs(second) else None) as two,
    ):
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
    """Whether a base given on the command line is meant for this side: a delta or a checkpoint of a run."""
    return path.suffix == ".safetensors" or (path / "delta.safetensors").is_file() or (path / "base.json").is_file()


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
