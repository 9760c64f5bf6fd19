"""Fine-tuning as a contract: the public names, imported when they are first used.

>>> import thawline as tl
>>> plan = tl.FreezePlan(train=["head"], norms="pinned")
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from thawline.api import Run as Run
    from thawline.api import resume as resume
    from thawline.api import train as train
    from thawline.ckpt.convert import ConversionReport as ConversionReport
    from thawline.ckpt.convert import convert as convert
    from thawline.ckpt.verify import verify as verify
    from thawline.errors import BaseMismatch as BaseMismatch
    from thawline.errors import CheckpointError as CheckpointError
    from thawline.errors import DataError as DataError
    from thawline.errors import LawBroken as LawBroken
    from thawline.errors import RecipeError as RecipeError
    from thawline.errors import SelectorError as SelectorError
    from thawline.errors import Stopped as Stopped
    from thawline.errors import ThawlineError as ThawlineError
    from thawline.freeze.audit import AuditReport as AuditReport
    from thawline.freeze.plan import FreezePlan as FreezePlan
    from thawline.tasks.averaging import average as average
    from thawline.tasks.exporting import export as export
    from thawline.tasks.loading import load as load

_HOMES = {
    "AuditReport": "thawline.freeze.audit",
    "BaseMismatch": "thawline.errors",
    "CheckpointError": "thawline.errors",
    "ConversionReport": "thawline.ckpt.convert",
    "DataError": "thawline.errors",
    "FreezePlan": "thawline.freeze.plan",
    "LawBroken": "thawline.errors",
    "RecipeError": "thawline.errors",
    "Run": "thawline.api",
    "SelectorError": "thawline.errors",
    "Stopped": "thawline.errors",
    "ThawlineError": "thawline.errors",
    "average": "thawline.tasks.averaging",
    "convert": "thawline.ckpt.convert",
    "export": "thawline.tasks.exporting",
    "load": "thawline.tasks.loading",
    "resume": "thawline.api",
    "verify": "thawline.ckpt.verify",
}

__all__ = sorted([*_HOMES, "train"])  # pyright: ignore[reportUnsupportedDunderAll]


class _CallablePackage(ModuleType):
    """The subpackage `thawline.train`, which can also be called: `tl.train("recipe.yaml")`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from thawline.api import train

        return train(*args, **kwargs)


class _Public(ModuleType):
    """This module. Importing anything below `thawline.train` binds that subpackage to the name of the call `tl.train`;
    so that one name serves both, the subpackage is made callable when it is bound."""

    @property
    def train(self) -> Any:
        return importlib.import_module("thawline.train")

    @train.setter
    def train(self, package: ModuleType) -> None:
        package.__class__ = _CallablePackage


sys.modules[__name__].__class__ = _Public


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("thawline")
    if name not in _HOMES:
        raise AttributeError(f"module 'thawline' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
