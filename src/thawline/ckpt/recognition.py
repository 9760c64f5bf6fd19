"""Whether the files of a base hold what a delta was made over: by the bytes of every tensor, not by names alone.

A base may be kept in another element type, or under other names, than the model that was built of it; and the run may
have made tensors of its own before it began. Torch is not imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from thawline.ckpt.formats import thawline_run, whisper_names
from thawline.ckpt.formats.pieces import Plan, Planned
from thawline.ckpt.tensor_digest import digest_of
from thawline.core.digest import fingerprint
from thawline.errors import BaseMismatch, CheckpointError

BASE: Final = "base"
"""The origin of a tensor that a base gave."""
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Recognised:
    """A base that is a delta's.

    tensors: those that were found, under the delta's names
    other:   names whose shape or bytes are others than in the base's files, though the delta was made over them: the
             run changed them before it began (a new head, other units)
    """

    tensors: dict[str, Planned]
    other: tuple[str, ...]


def recognised(path: Path, delta: thawline_run.DeltaPlan, base: Plan, base_path: Path) -> Recognised:
    """The base's tensors as the delta knows them. Raises BaseMismatch naming both and what differs.

    A base may be kept in another element type or another spelling than the model was trained in; every tensor is taken
    as it is or widened, whichever has the recorded digest. What the run made before it began (a new head, changed
    units) is not in the base's files, and need not be where the delta holds it.
    """
    have = dict(base.tensors)
    if not set(delta.base) <= set(have):
        have |= respelt(delta.base, have)
    found, differing = matched(delta.base, have)
    missing = sorted(set(delta.base) - set(have) - set(found))
    needed, made = delta.from_base, frozenset(delta.made)
    held = delta.tensors
    reshaped = {name for name in differing if name in held and have[name].info.shape != held[name].info.shape}
    excused = {name for name in (*differing, *missing) if name not in needed and (name in made or name in reshaped)}
    strange = [name for name in differing if name not in excused and name not in made]
    absent = [name for name in missing if name not in excused and name not in made]
    if strange or absent or not (found or not delta.base):
        raise _mismatch(path, delta, base, base_path, have, strange, absent)
    lost = sorted(name for name in (*differing, *missing) if name not in excused)
    if lost:
        raise CheckpointError(
            f"{len(lost)} tensors are neither in it nor in the base {base_path}: the run made them before it began, "
            f"and they did not change from there: {first_of(lost)}",
            where=str(path),
            fix="take the run's folder, which makes them again: thawline export RUN DST, or tl.load(RUN)",
        )
    return Recognised(found, tuple(name for name in differing if name in excused))


def matched(wanted: Mapping[str, str], have: Mapping[str, Planned]) -> tuple[dict[str, Planned], list[str]]:
    """The tensors with the wanted digests, as they are or widened; names of those that are there with another.

    Libraries rename layers between versions, so one that is not found under its name may lie under another: the same
    digest means the same bytes.
    """
    found: dict[str, Planned] = {}
    for name in wanted.keys() & have.keys():
        fitting = next((tensor for tensor, own in _readings(have[name]) if own == wanted[name]), None)
        if fitting is not None:
            found[name] = fitting
    rest = [name for name in wanted if name not in found]
    if rest:
        others = {own: tensor for name in have if name not in found for tensor, own in _readings(have[name])}
        others |= {wanted[name]: tensor for name, tensor in found.items()}
        found |= {name: others[wanted[name]] for name in rest if wanted[name] in others}
    ordered = {name: found[name].renamed(name, origin=BASE) for name in wanted if name in found}
    return ordered, [name for name in rest if name in have and name not in found]


def _readings(tensor: Planned) -> Iterator[tuple[Planned, str]]:
    """A tensor as a model may hold it, and the digest of that: as it is, and where it is half precision widened."""
    yield tensor, digest_of(tensor)
    if tensor.info.dtype in ("F16", "BF16"):
        yield _wide(tensor), digest_of(_wide(tensor))


def _mismatch(
    path: Path,
    delta: thawline_run.DeltaPlan,
    base: Plan,
    base_path: Path,
    have: Mapping[str, Planned],
    differing: Sequence[str],
    missing: Sequence[str],
) -> BaseMismatch:
    digests = {name: digest_of(tensor) for name, tensor in base.tensors.items()}
    wide = {name: digest_of(_wide(have[name])) for name in digests if have[name].info.dtype in ("F16", "BF16")}
    prints = [fingerprint(digests), fingerprint(digests | wide)]
    lines = [
        "belongs to another base",
        f"  made over: {delta.fingerprint}" + (f" ({delta.base_path})" if delta.base_path else ""),
        f"  given:     {prints[0]} ({base_path})",
    ]
    if differing:
        lines.append(f"  {len(differing)} of {len(delta.base)} tensors differ, first: {first_of(differing)}")
    if missing:
        lines.append(f"  {len(missing)} of {len(delta.base)} tensors are missing, first: {first_of(missing)}")
    lines += thawline_run.lies_below(delta.below, prints, delta.base_path)
    recorded = f", recorded as {delta.base_path}" if delta.base_path else ""
    fix = f"give the base it was made from{recorded} (--base)"
    if delta.base_path and Path(delta.base_path).absolute() == base_path.absolute():
        fix = (
            "that place holds other weights by now, or the run changed these before it began (a new head, other "
            "units), which a delta of an older Thawline does not say: take the run's folder (thawline export RUN)"
        )
    return BaseMismatch("\n".join(lines), where=str(path), fix=fix)


def _wide(tensor: Planned) -> Planned:
    return replace(tensor, info=replace(tensor.info, dtype="F32"), stored=tensor.info.dtype)


def respelt(wanted: Iterable[str], have: Mapping[str, Planned]) -> dict[str, Planned]:
    """The base's tensors under the names that are wanted, where both are a Whisper in different spellings."""
    mine, theirs = whisper_names.spelling(set(wanted)), whisper_names.spelling(have)
    if mine is None or theirs is None or mine == theirs:
        return {}
    return dict(whisper_names.respell(have, theirs, mine))


def first_of(names: Iterable[str]) -> str:
    """The first few of some names, for a message."""
    ordered = list(names)
    return ", ".join(map(repr, ordered[:_SHOWN])) + (", ..." if len(ordered) > _SHOWN else "")
