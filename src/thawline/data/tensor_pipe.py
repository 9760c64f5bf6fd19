"""Messages with tensors through a pipe between processes, each tensor as its bare bytes."""

from __future__ import annotations

import io
import pickle
import sys
import traceback
from typing import Any


class _Raised(Exception):
    """The traceback of a worker, as the cause of the exception that the parent raises."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def portable(exc: BaseException) -> BaseException:
    """`exc` with its traceback as text, fit to travel; one that cannot be pickled is told as a RuntimeError."""
    text = "".join(traceback.format_exception(exc))
    try:
        copy: BaseException = pickle.loads(pickle.dumps(exc))
    except Exception:  # noqa: BLE001  any class may fail here in its own way
        copy = RuntimeError(f"{type(exc).__name__}: {exc}")
    return _with_cause(copy, text)


def _with_cause(exc: BaseException, text: str) -> BaseException:
    exc.__cause__ = _Raised(text)
    return exc


class _Pickler(pickle.Pickler):
    """Tensors as bare buffers: torch's own way goes through shared memory files, of which a system has few."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, BaseException) and isinstance(obj.__cause__, _Raised):
            return _with_cause, (_bare(obj), obj.__cause__.args[0])
        torch = sys.modules.get("torch")
        if torch is None or type(obj) is not torch.Tensor or obj.device.type != "cpu" or obj.layout != torch.strided:
            return NotImplemented
        if obj.requires_grad or obj.is_quantized or obj.is_conj() or obj.is_neg() or obj.numel() == 0:
            return NotImplemented
        flat = obj.contiguous().view(-1).view(torch.uint8).numpy()
        return _tensor, (pickle.PickleBuffer(flat), str(obj.dtype).removeprefix("torch."), tuple(obj.shape))


def _bare(exc: BaseException) -> BaseException:
    copy: BaseException = pickle.loads(pickle.dumps(exc))  # the default leaves __cause__ behind
    return copy


def _tensor(buffer: Any, dtype: str, shape: tuple[int, ...]) -> Any:
    import torch

    return torch.frombuffer(buffer, dtype=torch.uint8).view(getattr(torch, dtype)).view(shape)


def send(pipe: Any, message: object) -> None:
    """One message for `receive` at the other end."""
    buffers: list[pickle.PickleBuffer] = []
    head = io.BytesIO()
    _Pickler(head, protocol=5, buffer_callback=buffers.append).dump(message)
    raw = [b.raw() for b in buffers]
    pipe.send_bytes(pickle.dumps(([len(r) for r in raw], head.getvalue()), protocol=5))
    for r in raw:
        if len(r):
            pipe.send_bytes(r)


def receive(pipe: Any) -> tuple[str, int, Any]:
    """The next message. Raises EOFError or OSError where the other end is gone."""
    sizes, head = pickle.loads(pipe.recv_bytes())
    buffers = []
    for size in sizes:
        buffer = bytearray(size)  # writable, so that what is made of it is
        if size:
            pipe.recv_bytes_into(buffer)
        buffers.append(buffer)
    message: tuple[str, int, Any] = pickle.loads(head, buffers=buffers)
    return message
