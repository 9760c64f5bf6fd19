"""A torchvision that does not import must not take down what does not need it.

A torchvision built for another torch raises RuntimeError on import ("operator torchvision::nms does not exist").
transformers sees that the package is installed, imports it for image processors, and its models fail with it.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys

_LOG = logging.getLogger("thawline")


def hide_if_broken() -> str | None:
    """Make a broken torchvision look as if it were not installed, in this process only; why, or None where it is fine.

    Says so once, in one line, with the remedy. Call it before importing transformers, peft or whatever else asks
    whether torchvision is there.
    """
    name = "torchvision"
    if name in sys.modules or importlib.util.find_spec(name) is None:
        return None
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError, OSError, AttributeError) as exc:
        for loaded in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            del sys.modules[loaded]
        # None is Python's own mark for "not to be imported": find_spec then says that there is none.
        sys.modules[name] = None  # type: ignore[assignment]
        reason = str(exc).splitlines()[0]
        _LOG.warning(
            "torchvision is installed but broken (%s); going on as if it were not there. To mend it: "
            "pip uninstall torchvision, or install the one that belongs to torch %s",
            reason,
            _torch_version(),
        )
        return reason
    return None


def _torch_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("torch")
    except PackageNotFoundError:
        return "as installed"
