"""Which checkpoints of a run are kept: the last, the best, every so many steps; and removing the others.

Deciding is a pure function of steps and scores. Removing first hides a checkpoint and then deletes it, so that a
half-deleted one is never seen; the newest whole one is never removed, whatever the rules say.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from thawline.ckpt import manifest, store
from thawline.ckpt.load import checkpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class Keep:
    """What to keep.

    last:  this many of the newest
    best:  this many of the best by score (of equal ones the newer)
    mode:  whether a low or a high score is good
    every: also those whose step is a multiple of this; 0 for none
    """

    last: int = 3
    best: int = 0
    mode: Literal["min", "max"] = "min"
    every: int = 0

    def __post_init__(self) -> None:
        if self.last < 1 or self.best < 0 or self.every < 0:
            raise ValueError(f"{self} cannot be meant: last is at least 1, best and every at least 0")


def kept(steps: Collection[int], rule: Keep, *, scores: Mapping[int, float] | None = None) -> frozenset[int]:
    """The steps to keep. Steps without a score, and those whose score is NaN, are not among the best.

    >>> sorted(kept([1, 2, 3, 4, 5, 6], Keep(last=2, best=1, every=3), scores={1: 0.9, 2: 0.1}))
    [2, 3, 5, 6]
    """
    sign = 1 if rule.mode == "min" else -1
    scored = [(sign * score, -step) for step, score in (scores or {}).items() if step in steps and score == score]
    newest = sorted(steps)[-rule.last :]
    best = [-step for _, step in sorted(scored)[: rule.best]]
    regular = [step for step in steps if rule.every and step % rule.every == 0]
    return frozenset([*newest, *best, *regular])


def prune(
    root: Path,
    rule: Keep,
    *,
    scores: Mapping[int, float] | None = None,
    trusted: Path | None = None,
    also: Collection[int] = (),
) -> tuple[Path, ...]:
    """Remove the checkpoints in `root` that the rule does not keep; returns them.

    scores:  step -> the metric that "best" goes by
    trusted: a checkpoint known to be whole (just written), so that it is not read again
    also:    steps that stay whatever the rule says

    Only those whose files are all there with their sizes are counted; damaged ones stay, for people to look at. Nothing
    is removed unless a whole one, every digest checked or trusted, remains. Raises StorageError if removing is refused.
    """
    found = {step: path for step, path in checkpoints(root) if not manifest.verify(path, digests=False)}
    wanted = kept(found, rule, scores=scores) | frozenset(also)
    doomed = [path for step, path in sorted(found.items()) if step not in wanted]
    if not doomed:
        return ()
    survivor = _newest_whole(found, trusted)
    removed = tuple(path for path in doomed if path != survivor) if survivor is not None else ()
    for path in removed:
        store.retire(path)
    return removed


def _newest_whole(found: Mapping[int, Path], trusted: Path | None) -> Path | None:
    for _, path in sorted(found.items(), reverse=True):
        if path == trusted or not manifest.verify(path):
            return path
    return None
