"""Words become calls: every verb is a few lines that parse, call the rooms below and print. No logic of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """The program `thawline`. Ends the process with the exit code of `thawline.errors`."""
    try:
        from thawline.cli.app import run

        code = run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:  # while the program is imported, or while an interruption is being told
        code = 130
    sys.exit(code)
