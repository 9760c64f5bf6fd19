"""Sample readers for the tests of the loader; importable by its workers, which a test module is not."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from thawline.errors import DataError


class Drawing:
    """Samples that draw from every global generator, as user code does."""

    def __len__(self) -> int:
        return 100

    def key(self, id: int) -> str:
        return f"utt{id}"

    def read(self, id: int, epoch: int) -> torch.Tensor:
        if id % 10 == 7:
            raise DataError("it is cut short", where=f"utt{id}.wav")
        noise = torch.rand(3, dtype=torch.float64)
        return torch.cat([torch.tensor([id, epoch, random.random(), np.random.rand()], dtype=torch.float64), noise])

    def collate(self, samples: Sequence[torch.Tensor]) -> dict[str, object]:
        whole = torch.stack(list(samples))
        return {
            "x": whole,
            "half": whole.to(torch.bfloat16),
            "ids": np.asarray(whole[:, 0], dtype=np.int64),
            "draw": random.random() + float(torch.rand(())),
            "empty": torch.zeros(0, 4),
            "pid": os.getpid(),
        }


class Large(Drawing):
    """Batches larger than any pipe holds."""

    def collate(self, samples: Sequence[torch.Tensor]) -> dict[str, object]:
        return {"x": torch.full((1 << 20,), float(samples[0][0])), "pid": os.getpid()}


class Deadly(Drawing):
    """Kills its own worker while reading `id`: once, or always."""

    def __init__(self, folder: Path, id: int, *, always: bool = False) -> None:
        self.folder, self.id, self.always = folder, id, always

    def read(self, id: int, epoch: int) -> torch.Tensor:
        mark = self.folder / f"died-{epoch}-{id}"
        if id == self.id and (self.always or not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(id, epoch)


class Slow(Drawing):
    """Takes `seconds` for each sample and says in a file when it has begun."""

    def __init__(self, seconds: float, mark: Path | None = None) -> None:
        self.seconds, self.mark = seconds, mark

    def read(self, id: int, epoch: int) -> torch.Tensor:
        if self.mark is not None:
            (self.mark / f"{os.getpid()}").touch()
        time.sleep(self.seconds)
        return super().read(id, epoch)


class Away(Drawing):
    """Storage that is away for the first `times` reads of a sample."""

    def __init__(self, folder: Path, times: int, code: int = errno.ESTALE) -> None:
        self.folder, self.times, self.code = folder, times, code

    def read(self, id: int, epoch: int) -> torch.Tensor:
        mark = self.folder / f"{id}"
        seen = len(mark.read_bytes()) if mark.exists() else 0
        if seen < self.times:
            with mark.open("ab") as file:
                file.write(b"x")
            raise OSError(self.code, os.strerror(self.code), f"utt{id}.wav")
        return super().read(id, epoch)


class Faulty(Drawing):
    """A mistake in user code at sample 5."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def read(self, id: int, epoch: int) -> torch.Tensor:
        if id == 5:
            raise self.error
        return super().read(id, epoch)


class Unpicklable(Exception):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


class Untellable(Drawing):
    """Raises what cannot be pickled."""

    def read(self, id: int, epoch: int) -> torch.Tensor:
        raise Unpicklable(1, 2)


class Stubborn:
    """Cannot be unpickled in a worker."""

    def __reduce__(self) -> tuple[object, ...]:
        return _refuse, ()

    def read(self, id: int, epoch: int) -> int:
        return id

    def collate(self, samples: Sequence[int]) -> list[int]:
        return list(samples)


def _refuse() -> None:
    raise RuntimeError("not here")
