"""Copying planned tensors to their places in a file on all cores, and comparing a finished file with what was copied.

What to write (names, element types, places) is decided by others; nothing here knows a format.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from blake3 import blake3

from thawline.ckpt import store
from thawline.ckpt.formats.casting import cast, is_exact, overflowed
from thawline.ckpt.formats.checksum import crc32
from thawline.ckpt.formats.mapped import Region
from thawline.ckpt.formats.pieces import Planned, TensorInfo, chunks, regions
from thawline.ckpt.source import Source, digest
from thawline.ckpt.verify import cores
from thawline.errors import CheckpointError

# Larger ones leave the processor's cache between hashing and writing, and for writes of a megabyte Linux looks for
# megabytes of contiguous memory, which in a virtual machine may take three times as long as the copy.
_LARGEST_CHUNK: Final = 512 << 10
_SMALLEST_CHUNK: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Job:
    """One tensor of the target: its data, and name, element type and shape as they will be."""

    tensor: Planned
    info: TensorInfo


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be written.

    dropped:    names that the target has no place for
    companions: files that were made to lie beside the weights: name -> content
    """

    source: Source
    jobs: dict[str, Job]
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    companions: Mapping[str, bytes] = field(default_factory=dict)


def same_values(one: Planned, other: Planned) -> bool:
    """Whether two planned tensors have the same type, shape and bits."""
    if (one.info.dtype, one.info.shape) != (other.info.dtype, other.info.shape):
        return False
    if one.parts == other.parts and one.stored == other.stored:
        return True
    # By digest, because the same bytes may come in pieces of other sizes.
    return digest(one.info.dtype, one.info.shape, chunks(one)) == digest(
        other.info.dtype, other.info.shape, chunks(other)
    )


class Engine:
    """Copies tensors to their places on all cores, and remembers the digest of what it wrote."""

    def __init__(self, work: Work, memory: int) -> None:
        self.work = work
        # One waits for the disk while another computes; each holds a chunk, its widened copy and a temporary.
        self.workers = max(min(2 * cores(), 16, memory // (6 * _SMALLEST_CHUNK)), 1)
        self.chunk = max(min(memory // (self.workers * 6), _LARGEST_CHUNK), _SMALLEST_CHUNK)
        self.digests: dict[str, str] = {}
        self.checksums: dict[str, int] = {}
        self.verified = False
        self._stamps = _stamps(work.source)

    def copy(self, file: store.Direct, places: Mapping[str, int], *, checksums: bool = False) -> None:
        """Write each named tensor at its place of a file; tensors at one place are written once.

        Every source region's own checksum is compared too, from what went by. The largest tensors go first, so that no
        core is left with one at the end. Raises CheckpointError or OSError of the first failure, after stopping the
        others.
        """
        # An empty tensor has the place of the one after it without being it.
        spots = {name: (place, "" if self.work.jobs[name].info.nbytes else name) for name, place in places.items()}
        first: dict[tuple[int, str], str] = {}
        for name, spot in spots.items():
            first.setdefault(spot, name)
        names = sorted(first.values(), key=lambda name: -self.work.jobs[name].info.nbytes)
        stretches: dict[int, Region] = {}
        for name in names:
            for region in regions(self.work.jobs[name].tensor):
                stretches[id(region)] = region
        checks = sorted(stretches.values(), key=lambda region: -region.nbytes)

        def one(name: str) -> None:
            self._one(file, places[name], self.work.jobs[name], checksums)

        run_all(self.workers, [(one, (name,)) for name in names])
        run_all(self.workers, [(region.check, ()) for region in checks])
        for name, spot in spots.items():
            kept = first[spot]
            if name != kept and not same_values(self.work.jobs[name].tensor, self.work.jobs[kept].tensor):
                raise CheckpointError(
                    f"{name!r} is called tied to {kept!r}, and their values differ", where=str(self.work.source.path)
                )
            self.digests[name] = self.digests[kept]

    def _one(self, file: store.Direct, place: int, job: Job, checksum: bool) -> None:
        have, want = job.tensor.info.dtype, job.info.dtype
        narrows = have != want and not is_exact(have, want)
        hasher = _hasher(job.info)
        crc = lost = 0
        for chunk in chunks(job.tensor, self.chunk, note=True):
            data = chunk if have == want else cast(chunk, have, want)
            if narrows:
                lost += overflowed(chunk, have, data, want)
            hasher.update(data)
            if checksum:
                crc = crc32(data, crc)
            file.write_at(data, place)
            place += len(data)
        if lost:
            for region in regions(job.tensor):
                region.check()  # a flipped byte is the likelier cause
            raise CheckpointError(
                f"{lost} values of {job.info.name!r} are too large for {want}",
                where=str(self.work.source.path),
                fix="choose bf16 or fp32",
            )
        self.digests[job.info.name] = str(hasher.hexdigest())
        self.checksums[job.info.name] = crc

    def compare(self, have: Mapping[str, Planned], where: Path, file: store.Direct) -> None:
        """Read a finished target again, while it goes to the device. Raises CheckpointError if anything differs from
        what was streamed."""
        jobs = {name: self.work.jobs[name] for name in self.digests if name in have}

        def one(name: str) -> None:
            found, job = have[name], jobs[name]
            if (found.info.dtype, found.info.shape) != (job.info.dtype, job.info.shape):
                raise unlike(name, f"{found.info.dtype} {found.info.shape}", where)
            for region in regions(found):
                # The bytes are compared by digest; that the stated CRC-32 is theirs was seen when they were written.
                if region.crc not in (None, self.checksums.get(job.info.tied_to or name)):
                    region.check()
            if digest(found.info.dtype, found.info.shape, chunks(found, self.chunk)) != self.digests[name]:
                raise unlike(name, "other bytes", where)

        tasks = [(one, (name,)) for name in sorted(jobs, key=lambda name: -jobs[name].info.nbytes)]
        run_all(self.workers, [(file.flush, ()), *tasks])

    def finish(self, names: Iterable[str], where: Path) -> None:
        """State that all of `names`, and no other, were found in the target, and that the source did not change."""
        found = set(names)
        if found != set(self.digests):
            raise unlike(min(found ^ set(self.digests)), "missing or unexpected", where)
        _refuse_changed(self._stamps)
        self.verified = True


def _stamps(source: Source) -> dict[Path, tuple[int, int]]:
    return {file.path: _stamp(file.path) for file in source.plan.files}


def _stamp(path: Path) -> tuple[int, int]:
    try:
        info = os.stat(path)
    except OSError as exc:
        raise CheckpointError(f"vanished while it was converted: {exc.strerror}", where=str(path)) from exc
    return info.st_size, info.st_mtime_ns


def _refuse_changed(stamps: Mapping[Path, tuple[int, int]]) -> None:
    for path, stamp in stamps.items():
        if _stamp(path) != stamp:
            raise CheckpointError(
                "was written to while it was converted", where=str(path), fix="wait for the run, then convert again"
            )


def run_all(workers: int, tasks: Sequence[tuple[Callable[..., None], tuple[object, ...]]]) -> None:
    """Run all tasks; on the first failure drop those not begun and raise it."""
    with ThreadPoolExecutor(workers) as pool:
        running: list[Future[None]] = [pool.submit(task, *args) for task, args in tasks]
        try:
            for future in running:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _hasher(info: TensorInfo) -> blake3:
    return blake3(f"{info.dtype}[{','.join(map(str, info.shape))}]".encode() + b"\0")


def unlike(name: str, found: str, where: Path) -> CheckpointError:
    """The error for a result that reads back as something else."""
    return CheckpointError(
        f"reading the result again gives {found} for tensor {name!r}; nothing was kept",
        where=str(where),
        fix="the storage may be failing: try another disk",
    )
