"""A source's tensors as torch tensors, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from thawline.ckpt.formats.pieces import Planned, read
from thawline.ckpt.source import Source
from thawline.core.digest import DTYPES

_TORCH = {spelled: getattr(torch, word) for word, spelled in DTYPES.items() if hasattr(torch, word)}


def tensor_of(tensor: Planned) -> Tensor:
    """A tensor of a plan, checksums checked, in memory of its own."""
    data = bytearray(read(tensor))
    dtype = _TORCH[tensor.info.dtype]
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(tensor.info.shape)


class SourceTensors(Mapping[str, Tensor]):
    """Name -> tensor of an opened source; nothing is kept, so the whole may be larger than memory.

    The tensors own their memory: they may be changed, and outlive the source.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._source:
            raise KeyError(name)
        return tensor_of(self._source.plan.tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.names)

    def __len__(self) -> int:
        return len(self._source)
