"""Deltas: what a run changed of its base, and the proof of which base that was.

A delta holds every tensor (weights and buffers) whose bytes differ from the base's, found by digest and not by
`requires_grad`, so that a BatchNorm statistic that moved is in it and a trainable that did not move is not. It carries
the base's fingerprint and the digest of each of the base's tensors, so that a refusal names what differs, and the
fingerprint of what comes out. Deltas stack: one made over (base + delta 1) names that result as its base.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from pathlib import Path
from typing import Final

from blake3 import blake3
from torch import Tensor, nn

from thawline.ckpt import store, tensorfile
from thawline.ckpt.formats import thawline_run
from thawline.ckpt.manifest import FileEntry
from thawline.core.adapter import Adapter, factors
from thawline.core.digest import digest_tensor, fingerprint
from thawline.errors import BaseMismatch, CheckpointError

NAME: Final = "delta.safetensors"
KIND: Final = "delta/1"
"""What the metadata entry `thawline` of a delta file says: kind and version."""

_SHOWN = 5  # names listed in a refusal; the count says how many there are

Tensors = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRef:
    """Which base: enough to recognise it, and to say what differs in another one.

    fingerprint: digest over name, dtype, shape and bytes of every tensor
    digests:     name -> digest, of every tensor (parameters and persistent buffers, each tied name)
    path:        where it was when it was read; for messages, and for finding it again
    below:       fingerprints of what it was itself made over, lowest first; empty for a base of its own
    made:        names that are not in the base's files as they are here: whoever built the model for a run made them
                 (a new head, other units)
    """

    fingerprint: str
    digests: Mapping[str, str]
    path: str = ""
    below: tuple[str, ...] = ()
    made: tuple[str, ...] = ()

    @classmethod
    def of(cls, tensors: nn.Module | Tensors, *, path: str = "", below: Sequence[str] = ()) -> BaseRef:
        """Of a model (its state dict) or of named tensors, one at a time."""
        source = tensors.state_dict() if isinstance(tensors, nn.Module) else tensors
        digests = {name: digest_tensor(tensor) for name, tensor in _pairs(source)}
        return cls(fingerprint=fingerprint(digests), digests=digests, path=path, below=tuple(below))

    def to_json(self) -> dict[str, object]:
        """A plain value for `base.json`."""
        return {
            "fingerprint": self.fingerprint,
            "path": self.path,
            "below": list(self.below),
            **({"made": sorted(self.made)} if self.made else {}),
            "digests": dict(sorted(self.digests.items())),
        }

    @classmethod
    def from_json(cls, value: object, *, where: str = "") -> BaseRef:
        """Read `to_json`'s value. Raises CheckpointError if the digests do not give the fingerprint."""
        try:
            if not isinstance(value, Mapping):
                raise TypeError("not a mapping")
            found = cls(
                fingerprint=str(value["fingerprint"]),
                digests={str(name): str(digest) for name, digest in value["digests"].items()},
                path=str(value["path"]),
                below=tuple(str(item) for item in value["below"]),
                made=tuple(str(item) for item in value.get("made", ())),
            )
            if fingerprint(found.digests) != found.fingerprint:
                raise ValueError("its digests do not give its fingerprint")
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise CheckpointError(
                f"the record of the base is damaged: {exc}", where=where, fix="take base.json from a copy of the run"
            ) from exc
        return found

    def write(self, path: Path) -> None:
        """Write `base.json`."""
        with store.atomic_file(path, force=True) as file:
            file.write((json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> BaseRef:
        """Read `base.json`. Raises CheckpointError if it is missing or damaged."""
        try:
            value: object = json.loads(path.read_bytes())
        except OSError as exc:
            raise CheckpointError(
                f"cannot be read: {exc.strerror}", where=str(path), fix="is this a run directory?"
            ) from exc
        except (ValueError, RecursionError) as exc:
            raise CheckpointError(
                f"the record of the base is damaged: {exc}",
                where=str(path),
                fix="take base.json from a copy of the run",
            ) from exc
        return cls.from_json(value, where=str(path))


@dataclass(frozen=True, kw_only=True)
class Delta:
    """The difference between a base and what was made of it.

    base:    what it belongs to
    tensors: the changed and the new ones; tied names lead to the same tensor
    digests: name -> digest of each of `tensors`
    copied:  new name -> name in the base that holds the same bytes (a module that was wrapped or renamed)
    removed: names of the base that are no more
    merged:  for a run with LoRA: whether the adapters are merged into the weights; None without LoRA
    adapters: the LoRA adapters that it adds, by the path of the layer, with what their factors do not say
    """

    base: BaseRef
    tensors: Mapping[str, Tensor]
    digests: Mapping[str, str]
    copied: Mapping[str, str] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    merged: bool | None = None
    adapters: Mapping[str, Adapter] = field(default_factory=dict)

    @cached_property
    def changed(self) -> tuple[str, ...]:
        """Names in both whose bytes differ."""
        return tuple(sorted(name for name in self.tensors if name in self.base.digests))

    @cached_property
    def added(self) -> tuple[str, ...]:
        """Names that the base does not have (a new head, adapters), copied ones included."""
        return tuple(sorted(name for name in (*self.tensors, *self.copied) if name not in self.base.digests))

    @property
    def from_base(self) -> frozenset[str]:
        """Names of the base's tensors whose bytes are needed; the others are held here, or are no more."""
        return frozenset(set(self.base.digests) - set(self.tensors) - set(self.removed)) | set(self.copied.values())

    @cached_property
    def result(self) -> BaseRef:
        """What base + delta is: the base to name for a delta made over it. Nothing is read for this."""
        digests = {name: digest for name, digest in self.base.digests.items() if name not in self.removed}
        digests |= {name: self.base.digests[source] for name, source in self.copied.items()}
        digests |= self.digests
        return BaseRef(
            fingerprint=fingerprint(digests), digests=digests, below=(*self.base.below, self.base.fingerprint)
        )


def delta_of(
    base: BaseRef,
    tensors: Tensors,
    *,
    complete: bool = True,
    merged: bool | None = None,
    adapters: Mapping[str, Adapter] = {},
) -> Delta:
    """What differs from the base, by digest.

    tensors:  the whole model's, or with `complete=False` those that may have changed (the others are taken as they are
              in the base, and none as removed)
    Keeps references to the differing tensors only, so a stream of a model larger than memory may be given.
    """
    kept: dict[str, Tensor] = {}
    digests: dict[str, str] = {}
    copied: dict[str, str] = {}
    seen: set[str] = set()
    # What is not in the base's files cannot be copied from there by whoever has the files and the delta alone.
    made = frozenset(base.made)
    sources = {digest: name for name, digest in sorted(base.digests.items(), reverse=True) if name not in made}
    for name, tensor in _pairs(tensors):
        seen.add(name)
        digest = digest_tensor(tensor)
        if base.digests.get(name) == digest:
            continue
        if name not in base.digests and digest in sources:
            copied[name] = sources[digest]
        else:
            kept[name], digests[name] = tensor.detach(), digest
    removed = tuple(sorted(set(base.digests) - seen)) if complete else ()
    return Delta(
        base=base, tensors=kept, digests=digests, copied=copied, removed=removed, merged=merged, adapters=adapters
    )


def check_base(want: BaseRef, have: BaseRef, *, source: str = "") -> None:
    """Raise BaseMismatch unless `have` is the base that `want` describes.

    source: the delta or run that wants it; for the message
    """
    if want.fingerprint == have.fingerprint:
        return
    differing = [name for name in sorted(want.digests) if have.digests.get(name, "") not in ("", want.digests[name])]
    missing = sorted(set(want.digests) - set(have.digests))
    unexpected = sorted(set(have.digests) - set(want.digests))
    lines = [
        "belongs to another base",
        f"  made over: {want.fingerprint}{_in(want.path)}",
        f"  given:     {have.fingerprint}{_in(have.path)}",
    ]
    for what, names in (("differ", differing), ("are missing", missing), ("are unknown to it", unexpected)):
        if names:
            lines.append(f"  {len(names)} of {len(want.digests)} tensors {what}, first: {_first(names)}")
    lines += thawline_run.lies_below(want.below, {have.fingerprint}, want.path)
    fix = f"give the base it was made from{f', recorded as {want.path}' if want.path else ''} (--base)"
    raise BaseMismatch("\n".join(lines), where=source, fix=fix)


def apply(base: Tensors, delta: Delta, *, source: str = "") -> Iterator[tuple[str, Tensor]]:
    """The full tensors of base + delta, one at a time, in the base's order, the new ones last.

    Each of the base's tensors is checked by digest before it is handed on. Raises BaseMismatch at the first that does
    not fit (after reading the rest, to name them), or at the end if some are missing: the taker keeps nothing until the
    stream has ended well, as `store` does.
    """
    copies: dict[str, list[str]] = {}
    for name, origin in delta.copied.items():
        copies.setdefault(origin, []).append(name)
    found: dict[str, str] = {}
    good = True
    for name, tensor in _pairs(base):
        found[name] = digest_tensor(tensor)
        good = good and found[name] == delta.base.digests.get(name)
        if not good:
            continue
        for copy in copies.get(name, ()):
            yield copy, tensor
        if name in delta.tensors:
            yield name, delta.tensors[name]
        elif name not in delta.removed and name not in delta.copied:
            yield name, tensor
    if not good or len(found) != len(delta.base.digests):
        check_base(delta.base, BaseRef(fingerprint=fingerprint(found), digests=found), source=source)
    for name in sorted(delta.tensors):
        if name not in delta.base.digests:
            yield name, delta.tensors[name]


def lay_over(
    current: Mapping[str, Tensor], delta: Delta, *, as_shaped: Collection[str] = (), source: str = ""
) -> dict[str, Tensor]:
    """What a model that was built from the base has to hold at the delta's point, every tensor accounted for.

    current:   the model's tensors as they are: the base's under their present names (layers wrapped, adapters new)
    as_shaped: names known to differ from the base by construction (a replaced norm), which are to stay as they are

    For restoring into a model, also one that has trained meanwhile: a tensor that the delta leaves to the base must be
    the base's, and one that it says to be a copy must be found. Raises CheckpointError naming those that are not.
    """
    digests = {name: digest_tensor(tensor) for name, tensor in current.items() if name not in delta.tensors}
    holders = {digest: name for name, digest in digests.items()}
    laid = dict(current) | dict(delta.tensors)
    strays: list[str] = []
    for name, digest in digests.items():
        origin = delta.copied.get(name, name)
        wanted = delta.base.digests.get(origin)
        if wanted is not None and wanted != digest and name in delta.copied and wanted in holders:
            laid[name] = current[holders[wanted]]
        elif wanted != digest and name not in as_shaped:
            strays.append(name)
    if strays:
        raise CheckpointError(
            f"{len(strays)} tensors of the model are neither in the delta nor as in the base: {_first(strays)}",
            where=source,
            fix="load the base anew and restore into that",
        )
    return laid


def compose(first: Delta, second: Delta, *, source: str = "") -> Delta:
    """One delta over `first`'s base that does what `first` and then `second` do. No base is read.

    Raises BaseMismatch if `second` was not made over the result of `first`.
    """
    check_base(second.base, first.result, source=source)
    base = first.base
    tensors = {name: tensor for name, tensor in first.tensors.items() if name not in second.removed}
    copied = {name: origin for name, origin in first.copied.items() if name not in second.removed}
    for name, origin in second.copied.items():
        if origin in first.tensors:
            tensors[name] = first.tensors[origin]
        else:
            copied[name] = first.copied.get(origin, origin)
    for name, tensor in second.tensors.items():
        tensors[name] = tensor
        copied.pop(name, None)
    final = second.result.digests
    return Delta(
        base=base,
        tensors={name: tensor for name, tensor in tensors.items() if base.digests.get(name) != final[name]},
        digests={name: final[name] for name in tensors if base.digests.get(name) != final[name]},
        copied={name: origin for name, origin in copied.items() if base.digests.get(name) != final[name]},
        removed=tuple(sorted(set(base.digests) - set(final))),
        merged=first.merged if second.merged is None else second.merged,
        adapters={
            path: adapter
            for path, adapter in {**first.adapters, **second.adapters}.items()
            if any(name in final for pair in factors(path) for name in pair)
        },
    )


def stack(deltas: Sequence[tuple[str, Delta]]) -> Delta:
    """Several deltas as one: each made over the result of the one before.

    deltas: (its path or name, the delta), lowest first
    Raises BaseMismatch that names the right order if there is one.
    """
    order = _right_order(deltas)
    given = [name for name, _ in deltas]
    if order is not None and order != given:
        raise BaseMismatch(
            f"these deltas were made in another order: {' -> '.join(order)}",
            where=" -> ".join(given),
            fix="give them in the order in which they were made",
        )

    def add(below: tuple[str, Delta], above: tuple[str, Delta]) -> tuple[str, Delta]:
        return above[0], compose(below[1], above[1], source=above[0])

    return reduce(add, deltas)[1]


def metadata_of(delta: Delta) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata of a delta file, and the tensors to store in it: of tied names the first."""
    stored, aliases = tensorfile.untied(delta.tensors)
    metadata = {
        "format": "pt",  # other readers of safetensors look for this
        "thawline": KIND,
        "base": _json(delta.base.to_json()),
        "result": delta.result.fingerprint,
        "digests": _json(dict(sorted(delta.digests.items()))),
        "aliases": _json(aliases),
        "copied": _json(dict(sorted(delta.copied.items()))),
        "removed": _json(sorted(delta.removed)),
        "merged": _json(delta.merged),
    }
    if delta.adapters:
        records = {path: adapter.to_json() for path, adapter in sorted(delta.adapters.items())}
        metadata[thawline_run.ADAPTERS] = _json(records)
    return metadata | {"check": _check(metadata)}, stored


def write_delta(path: Path, delta: Delta, *, force: bool = False) -> None:
    """Write a delta as one file, which appears whole or not at all."""
    metadata, stored = metadata_of(delta)
    with store.atomic_file(path, force=force, need_bytes=tensorfile.size_of(stored, metadata)) as file:
        for piece in tensorfile.pieces(stored, metadata):
            file.write(piece)


def read_delta(path: Path, entry: FileEntry | None = None) -> Delta:
    """Read a delta file, every byte of it verified: by `entry` (of a checkpoint's manifest) if given, else by the
    digests in the file itself. Raises CheckpointError if it is damaged or not a delta.
    """
    metadata, stored = tensorfile.read(path, entry)
    if metadata.get("thawline") != KIND:
        kind = metadata.get("thawline", "no Thawline file")
        raise CheckpointError(
            f"is not a delta that this version reads ({kind!r}, wanted {KIND!r})",
            where=str(path),
            fix="give a delta.safetensors, or update Thawline",
        )
    try:
        claimed = metadata.pop("check")
        if claimed != _check(metadata):
            raise ValueError("its metadata is altered")
        aliases: dict[str, str] = json.loads(metadata["aliases"])
        tensors = stored | {name: stored[target] for name, target in aliases.items()}
        found = Delta(
            base=BaseRef.from_json(json.loads(metadata["base"]), where=str(path)),
            tensors=tensors,
            digests=json.loads(metadata["digests"]),
            copied=json.loads(metadata["copied"]),
            removed=tuple(json.loads(metadata["removed"])),
            merged=json.loads(metadata["merged"]),
            adapters=thawline_run.adapters_in(metadata, {n: tuple(t.shape) for n, t in tensors.items()}),
        )
        if set(found.digests) != set(tensors):
            raise ValueError(f"tensors and digests are of different names: {_first(set(found.digests) ^ set(tensors))}")
        if entry is None:
            altered = sorted(n for n, tensor in stored.items() if digest_tensor(tensor) != found.digests[n])
            if altered:
                raise ValueError(f"altered tensors: {_first(altered)}")
        if found.result.fingerprint != metadata["result"]:
            raise ValueError("base and tensors do not give the recorded result")
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise CheckpointError(
            f"damaged: {exc}", where=str(path), fix="take it from a copy, or make it again from the run"
        ) from exc
    return found


def _right_order(deltas: Sequence[tuple[str, Delta]]) -> list[str] | None:
    """Names in the order in which each was made over the one before; None if they are no chain."""
    by_base = {delta.base.fingerprint: (name, delta) for name, delta in deltas}
    results = {delta.result.fingerprint for _, delta in deltas}
    starts = [delta.base.fingerprint for _, delta in deltas if delta.base.fingerprint not in results]
    if len(by_base) != len(deltas) or len(starts) != 1:
        return None
    order: list[str] = []
    here = starts[0]
    while here in by_base and len(order) < len(deltas):
        name, delta = by_base[here]
        order.append(name)
        here = delta.result.fingerprint
    return order if len(order) == len(deltas) else None


def _pairs(tensors: Tensors) -> Iterable[tuple[str, Tensor]]:
    return tensors.items() if isinstance(tensors, Mapping) else tensors


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _check(metadata: Mapping[str, str]) -> str:
    return str(blake3(json.dumps(dict(sorted(metadata.items()))).encode()).hexdigest())


def _first(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:_SHOWN]) + (", ..." if len(ordered) > _SHOWN else "")


def _in(path: str) -> str:
    return f" ({path})" if path else ""
