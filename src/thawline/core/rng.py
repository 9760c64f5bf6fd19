"""Every random stream by name: `derive(seed, *path)` and nothing else.

There is no generator state in Thawline that could be lost: whoever needs randomness derives a key from the run's seed
and the counters that say where the run is (purpose, epoch, step, micro-batch, sample id). This module does not import
torch; `thawline.train.seeding` turns keys into generators.
"""

from __future__ import annotations

import hashlib

_KEY_BITS = 63  # torch.Generator and numpy accept it alike as a non-negative seed


def derive(seed: int, *path: int | str) -> int:
    """The key of one random stream: a number in [0, 2**63).

    A pure function: the same seed and path give the same key in every process, on every machine, in every version of
    Python. Path elements are tagged with their type and length, so ("a", "bc") and ("ab", "c"), or 1 and "1", differ.

    >>> derive(7, "dropout", 3, 0) == derive(7, "dropout", 3, 0)
    True
    >>> derive(7, "shuffle", 1) != derive(7, "shuffle", "1")
    True
    """
    h = hashlib.blake2b(digest_size=8, person=b"thawline.rng")
    for element in (seed, *path):
        tag = b"s" if isinstance(element, str) else b"i"
        body = str(element).encode()
        h.update(tag + len(body).to_bytes(8, "little") + body)
    return int.from_bytes(h.digest(), "little") >> (64 - _KEY_BITS)
