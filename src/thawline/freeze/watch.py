"""What one forward and backward pass did to each module: why a trainable got no gradient, what was written.

Seen by hooks and read off version counters; the pass computes what it would compute unseen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils.hooks import RemovableHandle

from thawline.freeze.finding import Finding
from thawline.freeze.inspect import all_buffers
from thawline.freeze.resolve import Resolution


@dataclass
class _Calls:
    """How often a module ran, and under what."""

    total: int = 0
    no_grad: int = 0
    inference: int = 0
    dry_checkpoint: int = 0  # inside a reentrant checkpoint of which no input needs a gradient
    reached: bool = False  # a gradient came back to its output


class Watch:
    """What one forward and backward pass did to each module; made by `watch`."""

    def __init__(self, model: nn.Module, resolution: Resolution) -> None:
        self.model, self.resolution = model, resolution
        self.calls: dict[str, _Calls] = {}
        self.dry: dict[str, None] = {}  # outermost modules run inside a dry checkpoint
        self._handles: list[RemovableHandle] = []
        self._versions: dict[str, int] = {}
        self._buffers: dict[str, Tensor] = {}
        self.written: tuple[str, ...] = ()

    def __enter__(self) -> Watch:
        self._versions = self._frozen_versions()
        self._buffers = {n: b.detach().clone() for n, b in self._frozen_buffers().items()}
        for path, module in self.model.named_modules():
            calls = self.calls[path] = _Calls()
            self._handles.append(module.register_forward_pre_hook(self._entering(path, calls)))
            self._handles.append(module.register_forward_hook(_left(calls)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        now, buffers = self._frozen_versions(), self._frozen_buffers()
        written = [n for n, v in now.items() if self._versions.get(n, v) != v]
        written += [n for n, old in self._buffers.items() if n in buffers and not _same_bits(buffers[n], old)]
        self.written = tuple(written)
        self._buffers.clear()

    def reason(self, name: str) -> str:
        """Why the parameter `name` got no gradient: unused, checkpoint, no_grad, inference, detached."""
        path = name.rpartition(".")[0]
        calls = self.calls.get(path, _Calls())
        if not calls.total:
            # A module whose weight its parent reads without calling it (a fused qkv) fares as the parent does.
            parent = self.calls.get(path.rpartition(".")[0], _Calls())
            return "checkpoint" if parent.total and parent.dry_checkpoint == parent.total else "unused"
        if calls.dry_checkpoint == calls.total:
            return "checkpoint"
        if calls.inference == calls.total:
            return "inference"
        if calls.no_grad == calls.total:
            return "no_grad"
        return "bypassed" if calls.reached else "detached"

    def findings(self) -> list[Finding]:
        """What the pass wrote though it is frozen, and checkpoint warnings that mean nothing."""
        findings = []
        if self.written:
            findings.append(
                Finding(
                    code="frozen-written",
                    severity="error",
                    what="the pass wrote into frozen tensors, which will not stay as they were",
                    names=self.written,
                    fix="pin the module that does (its buffers adapt in train mode), or let the plan train it",
                )
            )
        trained = {n.rpartition(".")[0] for n in self.resolution.trainable_names}
        harmless = [path for path in self.dry if not any(t == path or t.startswith(f"{path}.") for t in trained)]
        if harmless:
            findings.append(
                Finding(
                    code="checkpoint-harmless",
                    severity="info",
                    what='"None of the inputs have requires_grad=True" is harmless here: nothing trains in',
                    names=tuple(harmless),
                )
            )
        return findings

    def _frozen_versions(self) -> dict[str, int]:
        frozen = {d.name for d in self.resolution.decisions if not d.trains}
        return {n: p._version for n, p in self.model.named_parameters() if n in frozen and not p.is_inference()}

    def _frozen_buffers(self) -> dict[str, Tensor]:
        # BatchNorm's kernel writes its statistics without a new version, so buffers are compared by value.
        frozen = {d.name for d in self.resolution.decisions if not d.trains}
        return {n: b for n, b in all_buffers(self.model) if n in frozen}

    def _entering(self, path: str, calls: _Calls) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any) -> None:
            calls.total += 1
            if torch.is_inference_mode_enabled():
                calls.inference += 1
            elif not torch.is_grad_enabled():
                frame = _checkpoint_frame()
                if frame is None:
                    calls.no_grad += 1
                elif not _wants_gradient(frame.f_locals.get("args", ())):
                    calls.dry_checkpoint += 1
                    if not any(path.startswith(f"{outer}.") or not outer for outer in self.dry):
                        self.dry[path] = None

        return hook


def _left(calls: _Calls) -> Callable[..., None]:
    def came_back(_: Tensor) -> None:
        calls.reached = True

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(came_back)  # type: ignore[no-untyped-call]

    return hook


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _wants_gradient(args: Any) -> bool:
    return any(t.requires_grad for t in _tensors(args))


def _checkpoint_frame() -> FrameType | None:
    """The frame of the reentrant checkpoint whose forward pass this is called in, if any."""
    code = checkpoint.CheckpointFunction.forward.__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame
