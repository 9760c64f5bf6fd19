"""Keys become generators: the only place that seeds the global random streams of a training process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_all(key: int) -> None:
    """Seed Python's, numpy's and torch's global generators (every device) from one key of `core.rng.derive`.

    Called before every micro-batch, so that dropout and whatever else draws from a global generator inside the model or
    in user code is a function of the counters in the key, not of what ran before.
    """
    random.seed(key)
    np.random.seed(key & 0xFFFF_FFFF)
    torch.manual_seed(key)


@contextmanager
def own_generators() -> Iterator[None]:
    """What happens inside leaves the global generators as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)
