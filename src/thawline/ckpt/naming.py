"""Names of tensors as they are shown to people: they come from files, and may hold anything."""

from __future__ import annotations

from typing import Final

_LONGEST: Final = 100


def shown(name: str) -> str:
    """A name on one line, of bounded length, without characters that a terminal would act on.

    >>> shown("encoder.weight"), shown("a\\nb"), len(shown("x" * 5000))
    ('encoder.weight', 'a\\\\nb', 100)
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    half = (_LONGEST - 3) // 2
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3 - half]}...{text[-half:]}"
