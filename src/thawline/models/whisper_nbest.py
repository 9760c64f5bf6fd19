"""The runners-up of a Whisper's beam search.

transformers' Whisper answers `num_return_sequences` by repeating its input, and so with the best sequence n times
(generation_whisper.py, `_expand_variables_for_generation`). The search below it knows better: here it is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:

    class _Search:
        """transformers' GenerationMixin, for the type checker."""

        def generate(self, *args: Any, **settings: Any) -> Any: ...

else:
    _Search = object


class EveryBeam(_Search):
    """Stands between transformers' Whisper and its GenerationMixin: what the search finds passes through here."""

    _beams: list[Tensor] | None = None

    def generate(self, *args: Any, **settings: Any) -> Any:
        """As GenerationMixin's: the best sequence of each row. Where `every_beam` listens, it is told of all."""
        if self._beams is None:
            return super().generate(*args, **settings)
        count = int(settings["generation_config"].num_beams)
        found = super().generate(*args, **settings, num_return_sequences=count)  # (B * beams, prompt + text + padding)
        self._beams.append(found.unflatten(0, (-1, count)))
        return found[::count]


@contextmanager
def every_beam(model: Any) -> Iterator[list[Tensor]]:
    """Meanwhile each search of `model` appends (B, beams, prompt + text + padding), best first, to what is yielded."""
    model._beams = []
    try:
        yield model._beams
    finally:
        model._beams = None
