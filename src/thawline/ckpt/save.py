"""Writing checkpoints: `step-00001200/` with what changed, the optimizer's state, the counters and a manifest; and with
`ema.safetensors` where the run keeps averages of its weights: tensors under the names of the model's state dict, other
names of tied ones in the metadata entry `aliases`. Moments that a plan has parked (of what it froze again) lie in a
file of their own, which is one file under many names as long as it stays the same.

`save_checkpoint` writes one and returns when it is on the device. `Saver` does the same behind the training thread,
which stops only while the tensors are copied into a staging buffer that is kept from save to save. Files are a function
of the state: the same state gives the same bytes. No pickle is written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from thawline.ckpt import manifest, store, tensorfile
from thawline.ckpt.delta import NAME as DELTA
from thawline.ckpt.delta import BaseRef, Delta, delta_of, metadata_of
from thawline.ckpt.filesystem import Buffer
from thawline.ckpt.manifest import FileEntry, Manifest
from thawline.errors import CheckpointError

OPTIMIZER: Final = "optimizer.safetensors"
PARKED: Final = "optimizer-parked.safetensors"
EMA: Final = "ema.safetensors"
STATE: Final = "state.json"

_ALIGNMENT = 64  # bytes; torch's own, so that the copy runs at full width


def step_name(step: int) -> str:
    """The directory's name: `step-00001200`. Names sort like steps up to a hundred million."""
    return f"step-{step:08d}"


def save_checkpoint(
    root: Path,
    *,
    step: int,
    delta: Mapping[str, Tensor] | Delta,
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, object],
    base: BaseRef,
    ema: Mapping[str, Tensor] = {},
    parked: Collection[str] = (),
) -> Path:
    """Write `root/step-NNNNNNNN/` whole or not at all and return its path; an older one of the same step is replaced.

    delta:     tensors that may have changed (those equal to the base's are left out), or the whole model's Delta
    optimizer: the optimizer's tensors by "<parameter name>/<state key>"
    state:     counters and metrics, of JSON's own types
    base:      what the delta belongs to
    ema:       averages of weights by the weights' names; empty for a run without
    parked:    names in `optimizer` that do not move any more

    Raises StorageError (path, bytes needed and free, the cause kept) if the storage refuses; what was there before is
    then untouched. Raises CheckpointError for a state or tensor that cannot be written.
    """
    return _write(
        root, step=step, delta=delta, optimizer=optimizer, state=_state_bytes(state), base=base, ema=ema, parked=parked
    )


class Handle:
    """A save under way.

    step, path: which one, and where it will be
    waited_s:   how long the training thread waited for the save before it
    copied_s:   how long it stopped for the copy
    """

    def __init__(self, step: int, path: Path, future: Future[Path], *, waited_s: float, copied_s: float) -> None:
        self.step = step
        self.path = path
        self.waited_s = waited_s
        self.copied_s = copied_s
        self._future = future

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._future.done()

    @property
    def error(self) -> BaseException | None:
        """Why it failed; None if it went well or is still under way. Does not wait."""
        return self._future.exception() if self._future.done() else None

    def wait(self, timeout_s: float | None = None) -> Path:
        """Wait until the checkpoint is on the device and return its path; raises what made it fail."""
        return self._future.result(timeout_s)


class Saver:
    """Writes checkpoints behind the training thread, at most one at a time.

    root:   directory of the checkpoints
    base:   what the deltas belong to
    after:  called in the writing thread with the path of each checkpoint that is on the device (retention)
    report: called in the writing thread with one line for a save that failed; the last good checkpoint stays, the run
            may go on, and `Handle.error` has the reason
    reserve_bytes: staging memory to take at once rather than in the first save
    """

    def __init__(
        self,
        root: Path,
        *,
        base: BaseRef,
        after: Callable[[Path], object] | None = None,
        report: Callable[[str], object] | None = None,
        reserve_bytes: int = 0,
    ) -> None:
        self._root = root
        self._base = base
        self._after = after
        self._report = report
        self._staging = Staging(reserve_bytes)
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="thawline-save")
        self._last: Handle | None = None

    def save(
        self,
        *,
        step: int,
        delta: Mapping[str, Tensor] | Delta,
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, object],
        merged: bool | None = None,
        ema: Mapping[str, Tensor] = {},
        parked: Collection[str] = (),
    ) -> Handle:
        """Copy the tensors and return; files are written meanwhile. Waits for the save before this one, if need be.

        Arguments as for `save_checkpoint`. When this returns the tensors may be changed again.
        """
        began = time.perf_counter()
        self.drain()
        ready = time.perf_counter()
        text = _state_bytes(state)
        tensors = delta.tensors if isinstance(delta, Delta) else delta
        staged = self._staging.copy({"d": tensors, "o": optimizer, "e": ema})
        change = replace(delta, tensors=staged["d"]) if isinstance(delta, Delta) else staged["d"]
        copied = time.perf_counter()
        resting = frozenset(parked)
        future = self._writer.submit(self._run, step, change, staged["o"], staged["e"], resting, text, merged)
        handle = Handle(step, self._root / step_name(step), future, waited_s=ready - began, copied_s=copied - ready)
        self._last = handle
        return handle

    def drain(self) -> None:
        """Wait for the save under way, if any. A refusal of the storage is the handle's to tell; a fault of the program
        is raised here."""
        error = None if self._last is None else self._last._future.exception()
        if error is not None and not isinstance(error, CheckpointError):
            raise error

    def close(self) -> None:
        """Wait for the save under way and end the writing thread."""
        self._writer.shutdown(wait=True)
        self.drain()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(
        self,
        step: int,
        delta: Mapping[str, Tensor] | Delta,
        optimizer: Mapping[str, Tensor],
        ema: Mapping[str, Tensor],
        parked: Collection[str],
        state: bytes,
        merged: bool | None,
    ) -> Path:
        try:
            change = delta if isinstance(delta, Delta) else delta_of(self._base, delta, complete=False, merged=merged)
            path = _write(
                self._root, step=step, delta=change, optimizer=optimizer, state=state, base=self._base, ema=ema,
                parked=parked,
            )  # fmt: skip
        except CheckpointError as exc:
            self._tell(f"checkpoint of step {step} was not written: {exc}")
            raise
        try:
            if self._after is not None:
                self._after(path)
        except CheckpointError as exc:  # this checkpoint is on the device all the same
            self._tell(f"after the checkpoint of step {step}: {exc}")
        return path

    def _tell(self, line: str) -> None:
        if self._report is not None:
            self._report(line)


class Staging:
    """Memory of one's own for a copy of many tensors, kept and reused: fresh pages cost three times the copy."""

    def __init__(self, reserve_bytes: int = 0) -> None:
        self._buffer = torch.zeros(reserve_bytes, dtype=torch.uint8)

    def copy(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Copies of all tensors, valid until the next call. Tied tensors stay tied."""
        places: dict[object, int] = {}
        plan: list[tuple[int, Tensor]] = []
        offsets: dict[str, dict[str, int]] = {}
        end = 0
        for group, tensors in groups.items():
            offsets[group] = {}
            for name, tensor in tensors.items():
                key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
                if key not in places or not tensor.numel():
                    places[key] = end
                    plan.append((end, tensor.detach()))
                    size = tensor.numel() * tensor.element_size()
                    end += size + -size % _ALIGNMENT
                offsets[group][name] = places[key]
        on_cuda = any(tensor.is_cuda for _, tensor in plan)
        if self._buffer.numel() < end or (on_cuda and not self._buffer.is_pinned()):
            self._buffer = torch.empty(0, dtype=torch.uint8)  # give the old one back before taking a larger one
            self._buffer = torch.empty(end, dtype=torch.uint8, pin_memory=on_cuda)
        for offset, tensor in plan:
            self._view(offset, tensor).copy_(tensor, non_blocking=True)
        if on_cuda:
            torch.cuda.synchronize()
        return {
            group: {name: self._view(offset, groups[group][name]) for name, offset in names.items()}
            for group, names in offsets.items()
        }

    def _view(self, offset: int, like: Tensor) -> Tensor:
        size = like.numel() * like.element_size()
        return self._buffer[offset : offset + size].view(like.dtype).view(like.shape)


def _write(
    root: Path,
    *,
    step: int,
    delta: Mapping[str, Tensor] | Delta,
    optimizer: Mapping[str, Tensor],
    state: bytes,
    base: BaseRef,
    ema: Mapping[str, Tensor],
    parked: Collection[str],
) -> Path:
    change = delta if isinstance(delta, Delta) else delta_of(base, delta, complete=False)
    if change.base.fingerprint != base.fingerprint:
        raise CheckpointError(
            f"the delta was made over {change.base.fingerprint}, the run over {base.fingerprint}",
            where=str(root),
            fix="make the delta over the run's base",
        )
    metadata, tensors = metadata_of(change)
    plain = {"format": "pt", "thawline": "optimizer/1"}
    resting = {name: tensor for name, tensor in optimizer.items() if name in parked}
    moving = {name: tensor for name, tensor in optimizer.items() if name not in resting}
    parts = {DELTA: (tensors, metadata), OPTIMIZER: (moving, plain)}
    if resting:
        parts[PARKED] = (resting, plain)
    if ema:
        averages, aliases = tensorfile.untied(ema)
        parts[EMA] = (averages, {"format": "pt", "thawline": "ema/1", "aliases": json.dumps(aliases)})
    target = root / step_name(step)
    need = sum(tensorfile.size_of(*part) for part in parts.values()) + len(state)
    store.clean_leftovers(root)
    with store.atomic_dir(target, force=True, need_bytes=need) as folder:
        files: dict[str, FileEntry] = {}
        contents = {name: tensorfile.pieces(*part) for name, part in parts.items()}
        for name, content in (*contents.items(), (STATE, iter((state,)))):
            if name == PARKED:
                files[name] = _write_or_link(folder / name, tuple(content), root)
            else:
                size, digest = store.write_file(folder / name, content)
                files[name] = FileEntry(size=size, digest=digest)
        listed = Manifest(step=step, base=base.fingerprint, files=files, thawline=version("thawline"))
        store.write_file(folder / manifest.NAME, [listed.to_json()])
    return target


def _write_or_link(path: Path, pieces: Sequence[Buffer], root: Path) -> FileEntry:
    """Write a file, or give the newest checkpoint's file of that name a second one if it holds the same bytes.

    That one is read for it: a damaged file must not find its way into another checkpoint.
    """
    hasher = store.file_hasher()
    for piece in pieces:
        hasher.update(piece)
    entry = FileEntry(size=sum(memoryview(piece).nbytes for piece in pieces), digest=str(hasher.hexdigest()))
    newest = max(root.glob(f"step-*/{path.name}"), default=None)
    if newest is None or manifest.check(newest, entry) or not store.link(newest, path):
        store.write_file(path, pieces)
    return entry


def _state_bytes(state: Mapping[str, object]) -> bytes:
    _check_plain(state, "state")
    return (json.dumps(state, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _check_plain(value: object, where: str) -> None:
    """Refuse what JSON would drop, or give back as something else."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"the key {key!r} is not text", where=where, fix="JSON has text keys only")
            _check_plain(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif type(value) not in (str, int, float, bool, type(None)):
        raise CheckpointError(
            f"a {type(value).__name__} cannot be kept in {STATE}",
            where=where,
            fix="give numbers, text, lists and mappings; tensors belong into the optimizer's file",
        )
