"""What autograd keeps of a forward pass for the backward pass, counted rather than estimated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class SavedActivations:
    """Counts what autograd keeps for the backward pass: `with SavedActivations(model) as kept: loss = ...`.

    Distinct storages, parameters and buffers left out, in bytes.
    """

    model: nn.Module
    bytes: int = 0
    _seen: set[int] = field(default_factory=set)
    _keep: list[Tensor] = field(default_factory=list)
    _hooks: Any = None

    def __enter__(self) -> SavedActivations:
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            self._seen.add(tensor.untyped_storage().data_ptr())
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self._keep.clear()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._keep.append(tensor.detach())  # alive, so that its address is not given to another
            self.bytes += storage.nbytes()
        return tensor
