"""What every test may ask for."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch

# One thread: the tests are many and small, run beside each other, and bits must not depend on the machine's cores.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
_CACHE = tempfile.TemporaryDirectory(prefix="thawline-test-cache-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data, weights and golden outputs beside the checkout; skips where it is absent."""
    folder = Path(os.environ.get("THAWLINE_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "parity").is_dir():
        pytest.skip(f"real data and golden files are not at {folder} (set THAWLINE_SHARED)")
    return folder
