"""One tree of errors: what was wrong, where, and the fix.

    ThawlineError                 exit code
    ├── RecipeError               2   a recipe, an override, a plan or a command line cannot be meant as written
    │   └── SelectorError         2   a selector matches nothing, too much, or contradicts itself
    ├── DataError                 3   samples are missing, empty or unreadable beyond the stated share
    ├── CheckpointError           4   a checkpoint is damaged, foreign or not accounted for
    │   └── BaseMismatch          4   a delta or a run belongs to another base
    ├── LawBroken                 5   an audit found that something changed which the plan does not name
    ├── Stopped                   75  stopped early with a whole checkpoint; the same command goes on
    └── MissingExtra              2   an optional package is absent or does not import

The classes carry their parts as fields; callers test fields, people read the sentence.
"""

from __future__ import annotations

from typing import ClassVar


class ThawlineError(Exception):
    """Base of every error that a user of Thawline may meet.

    what:  what was wrong, with the value quoted
    where: file:line:column, tensor name, sample id, path; may be empty
    fix:   what to do about it; may be empty
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what = what
        self.where = where
        self.fix = fix
        super().__init__(what, where, fix)

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders (loader workers); keyword arguments would be lost by the default.
        return _rebuild, (type(self), self.what, self.where, self.fix)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  fix: {self.fix}" if self.fix else text


def _rebuild(cls: type[ThawlineError], what: str, where: str, fix: str) -> ThawlineError:
    error = cls.__new__(cls)
    ThawlineError.__init__(error, what, where=where, fix=fix)
    return error


class RecipeError(ThawlineError):
    """A recipe, override, plan or command line cannot be meant as written."""

    exit_code = 2


class SelectorError(RecipeError):
    """A selector matches nothing, too much, or contradicts itself."""


class MissingExtra(ThawlineError):
    """An optional package is absent or fails to import."""

    exit_code = 2


class DataError(ThawlineError):
    """Samples are missing, empty or unreadable beyond the stated share."""

    exit_code = 3


class CheckpointError(ThawlineError):
    """A checkpoint is damaged, foreign, or leaves tensors unaccounted for."""

    exit_code = 4


class BaseMismatch(CheckpointError):
    """A delta or a run belongs to another base than the one given."""


class LawBroken(ThawlineError):
    """Something changed that the plan does not name, or a trainable did not move."""

    exit_code = 5


class Stopped(ThawlineError):
    """Stopped early with a whole checkpoint; the same command goes on."""

    exit_code = 75
