"""Optional packages, imported where they are used, with the cause named when they do not import."""

from __future__ import annotations

import importlib
from typing import Any

from thawline.core.torchvision import hide_if_broken
from thawline.errors import MissingExtra


def need(module: str, *, extra: str) -> Any:
    """Import `module`, which belongs to the optional extra `extra` of this package.

    Raises MissingExtra both where the package is absent and where it is installed but broken (a torchvision built for
    another torch raises RuntimeError or OSError on import, and takes its dependents with it); the cause is named.
    """
    if module.partition(".")[0] in ("transformers", "peft"):
        hide_if_broken()  # neither needs it, and both fail with it
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as exc:
        root = module.partition(".")[0]
        if exc.name is not None and exc.name.partition(".")[0] == root:
            raise MissingExtra(
                f"this needs the package {root!r}, which is not installed",
                fix=f"pip install 'thawline[{extra}]'",
            ) from exc
        raise MissingExtra(
            f"the package {root!r} is installed but cannot be imported: {exc}",
            fix=f"pip install '{exc.name}', or 'thawline[{extra}]' whole",
        ) from exc
    except (ImportError, RuntimeError, OSError) as exc:
        hint = (
            "pip uninstall torchvision"
            if "torchvision" in str(exc)
            else f"reinstall it: pip install --force-reinstall 'thawline[{extra}]'"
        )
        raise MissingExtra(
            f"the package {module!r} is installed but fails to import: {str(exc).splitlines()[0]}",
            fix=hint,
        ) from exc
