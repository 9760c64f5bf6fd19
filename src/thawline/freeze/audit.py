"""Proof of what changed: digests of every parameter and buffer before and after, held against the resolution.

The comparison is bitwise. It covers buffers that no state dict holds, the frozen rows of partly trained tensors, and
the reverse promise too: every trainable did move.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from thawline.core.digest import digest_bytes
from thawline.core.select import Rows
from thawline.errors import LawBroken
from thawline.freeze.inspect import all_buffers, dtype_name, parameters_by_name, unwrap
from thawline.freeze.resolve import Resolution

_ALONE_BYTES = 1 << 20  # less than this is not worth a second thread
_BUNDLE = 4  # tensors handed to a thread at a time
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Digests of one model at one moment, by name.

    rows: digests of the rows that do not train, for tensors of which only some rows do
    """

    parameters: Mapping[str, str]
    buffers: Mapping[str, str]
    rows: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, dict[str, str]]:
        return {"parameters": dict(self.parameters), "buffers": dict(self.buffers), "rows": dict(self.rows)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping[str, str]]) -> Snapshot:
        return cls(dict(data["parameters"]), dict(data["buffers"]), dict(data.get("rows", {})))


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """What an audit found. Names are in model order; tied tensors appear under their first name.

    moved_frozen:  parameters (or frozen rows, as `name[rows frozen]`) that changed though they are frozen
    moved_buffers: buffers that changed though they may not
    unmoved:       parameters that train and did not change, though the plan does not say that they may rest
    rested:        those of which it does
    vanished, appeared: tensors that only one of the two snapshots has
    stepped:       whether any update took place, as far as can be seen; without one nothing can have moved
    """

    moved_frozen: tuple[str, ...] = ()
    moved_buffers: tuple[str, ...] = ()
    unmoved: tuple[str, ...] = ()
    rested: tuple[str, ...] = ()
    vanished: tuple[str, ...] = ()
    appeared: tuple[str, ...] = ()
    frozen: int = 0
    trained: int = 0
    buffers: int = 0
    stepped: bool = True

    @property
    def broken(self) -> bool:
        """Whether the plan law was broken."""
        return bool(
            self.moved_frozen or self.moved_buffers or self.vanished or self.appeared or (self.stepped and self.unmoved)
        )

    def raise_if_broken(self) -> None:
        """Raises LawBroken (exit code 5) with the names of the tensors."""
        if not self.broken:
            return
        parts = [
            f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{' ...' if len(names) > _SHOWN else ''}"
            for what, names in self._findings()
            if names
        ]
        raise LawBroken("; ".join(parts), fix="`thawline plan` shows the rule behind each; the doctor names causes")

    def merged(self, other: AuditReport) -> AuditReport:
        """This audit and a later one of the same model as one report."""
        unmoved = [*(self.unmoved if self.stepped else ()), *(other.unmoved if other.stepped else ())]
        if not (self.stepped or other.stepped):
            unmoved = list(other.unmoved)
        return replace(
            other,
            moved_frozen=_joined(self.moved_frozen, other.moved_frozen),
            moved_buffers=_joined(self.moved_buffers, other.moved_buffers),
            unmoved=_joined(unmoved),
            rested=_joined(self.rested, other.rested),
            vanished=_joined(self.vanished, other.vanished),
            appeared=_joined(self.appeared, other.appeared),
            frozen=min(self.frozen, other.frozen),
            trained=max(self.trained, other.trained),
            stepped=self.stepped or other.stepped,
        )

    def to_dict(self) -> dict[str, Any]:
        found = {what: list(names) for what, names in self._findings(every=True)}
        return {
            "broken": self.broken,
            "stepped": self.stepped,
            "frozen": self.frozen,
            "trained": self.trained,
            "buffers": self.buffers,
            **{key.replace(" ", "_"): names for key, names in found.items()},
            "rested": list(self.rested),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def table(self) -> str:
        """The report for people."""
        lines = [
            f"frozen parameters   {self.frozen:>7}   {_verdict(self.moved_frozen, 'changed')}",
            f"buffers             {self.buffers:>7}   {_verdict(self.moved_buffers, 'changed though they may not')}",
        ]
        if self.stepped:
            lines.append(
                f"trained parameters  {self.trained:>7}   {_verdict(self.unmoved, 'did not move', 'all moved')}"
            )
        else:
            lines.append(f"trained parameters  {self.trained:>7}   no update was seen")
        if self.stepped and self.rested:
            lines.append(f"    of them         {len(self.rested):>7}   did not move, as the plan lets them (may_rest)")
        lines += [
            f"{what}: {', '.join(names[:_SHOWN])}{' ...' if len(names) > _SHOWN else ''}"
            for what, names in self._findings()
            if names
        ]
        lines.append("the plan law is BROKEN" if self.broken else "the plan law holds")
        return "\n".join(lines)

    def _findings(self, *, every: bool = False) -> list[tuple[str, tuple[str, ...]]]:
        unmoved = self.unmoved if self.stepped or every else ()
        return [
            ("frozen tensors changed", self.moved_frozen),
            ("buffers changed", self.moved_buffers),
            ("trainables did not move", unmoved),
            ("tensors vanished", self.vanished),
            ("tensors appeared", self.appeared),
        ]


def _joined(*parts: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for part in parts for name in part))


def _verdict(names: Sequence[str], what: str, otherwise: str = "bit for bit as they may be") -> str:
    return f"{len(names)} {what}" if names else otherwise


def snapshot(model: nn.Module, resolution: Resolution | None = None) -> Snapshot:
    """Digests of every parameter and buffer, those included that no state dict holds.

    resolution: where some rows of a tensor train, the others get a digest of their own.
    """
    model = unwrap(model)
    params = parameters_by_name(model)
    buffers = dict(all_buffers(model))
    rows = dict(resolution.rows) if resolution is not None else {}
    kept = {name: _without(params[name], ranges) for name, ranges in rows.items()}
    made = digests({**{f"p{n}": t for n, t in params.items()}, **{f"b{n}": t for n, t in buffers.items()},
                    **{f"r{n}": t for n, t in kept.items()}})  # fmt: skip
    return Snapshot(
        {name: made[f"p{name}"] for name in params},
        {name: made[f"b{name}"] for name in buffers},
        {name: made[f"r{name}"] for name in kept},
    )


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Digest of each tensor, on all cores.

    Whole tensors are shared out among threads, which is faster than all threads working on one (0.145 s against 0.175 s
    a gigabyte on two cores). A tensor that is a core's share by itself is hashed by all of them.
    """
    workers = min(os.cpu_count() or 1, 8)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    share = max(sum(sizes.values()) // workers, _ALONE_BYTES)
    made = {name: _digest(tensors[name]) for name, size in sizes.items() if size >= share}
    rest = sorted((name for name in tensors if name not in made), key=lambda name: -sizes[name])
    if workers == 1 or sum(sizes[name] for name in rest) < _ALONE_BYTES:
        made.update((name, _digest(tensors[name], parallel=False)) for name in rest)
    else:
        with ThreadPoolExecutor(workers) as pool:
            # The largest first, and small ones in bundles, so that the threads end together and do not wait on a queue.
            bundles = [rest[i : i + _BUNDLE] for i in range(0, len(rest), _BUNDLE)]
            for part in pool.map(lambda names: [(n, _digest(tensors[n], parallel=False)) for n in names], bundles):
                made.update(part)
    return {name: made[name] for name in tensors}


def audit(
    before: Snapshot,
    after: Snapshot,
    resolution: Resolution | Sequence[Resolution],
    *,
    stepped: bool | None = None,
) -> AuditReport:
    """Hold two snapshots against the resolution in force between them (or those of all phases between them).

    stepped: whether an update took place; None: it did if anything that trains has changed.
    """
    phases = (resolution,) if isinstance(resolution, Resolution) else tuple(resolution)
    trained = {name for r in phases for name in r.trainable_names}
    moving = {name for r in phases for name in r.moving_buffers}
    partial = {n for n in trained if all(n in r.rows for r in phases if n in r.trainable_names)}
    same = {n for n, digest in before.parameters.items() if after.parameters.get(n) == digest}
    there = before.parameters.keys() & after.parameters.keys()
    moved_frozen = [n for n in before.parameters if n in there and n not in trained and n not in same]
    moved_frozen += [f"{n}[rows frozen]" for n in partial if before.rows.get(n) != after.rows.get(n)]
    resting = {name for r in phases for name in r.resting}
    still = [n for n in before.parameters if n in there and n in trained and n in same]
    all_before, all_after = {**before.parameters, **before.buffers}, {**after.parameters, **after.buffers}
    return AuditReport(
        moved_frozen=tuple(moved_frozen),
        moved_buffers=tuple(
            n for n, d in before.buffers.items() if n not in moving and n in after.buffers and after.buffers[n] != d
        ),
        unmoved=tuple(n for n in still if n not in resting),
        rested=tuple(n for n in still if n in resting),
        vanished=tuple(n for n in all_before if n not in all_after),
        appeared=tuple(n for n in all_after if n not in all_before),
        frozen=sum(n not in trained for n in before.parameters),
        trained=len(trained & before.parameters.keys()),
        buffers=len(before.buffers),
        stepped=stepped if stepped is not None else any(n not in same for n in trained & there),
    )


def audit_average(model: nn.Module, average: nn.Module, resolution: Resolution) -> tuple[str, ...]:
    """Frozen parameters whose running average (EMA) differs from the model's own tensor in any bit.

    Averaging by `d * average + (1 - d) * value` rounds, so even an average of equal values drifts (16 % of fp32
    elements in 100 steps); lerp, which torch's AveragedModel uses, does not.
    """
    live, kept = parameters_by_name(model), _inner(average)
    frozen = [d.name for d in resolution.decisions if not d.is_buffer and not d.trains]
    return tuple(n for n in frozen if n in kept and not _equal(live[n], kept[n]))


def _inner(average: nn.Module) -> dict[str, nn.Parameter]:
    module = average.module if isinstance(average, torch.optim.swa_utils.AveragedModel) else average
    return parameters_by_name(module)


def _equal(a: Tensor, b: Tensor) -> bool:
    return _digest(a) == _digest(b)


def _without(param: Tensor, rows: Rows) -> Tensor:
    mask = torch.ones(param.shape[0], dtype=torch.bool, device=param.device)
    for start, stop in rows:
        mask[start:stop] = False
    return param.detach()[mask]


def _digest(tensor: Tensor, *, parallel: bool = True) -> str:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    flat = whole.detach().to("cpu").contiguous().reshape(-1)
    raw = memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")
    return digest_bytes(dtype_name(whole), tuple(whole.shape), raw)
