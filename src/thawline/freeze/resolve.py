"""A plan decided for one model at one phase: every parameter and buffer with its decision and the rule behind it.

`resolve(plan, index, phase=...)` takes and returns plain data; it never imports torch and changes nothing. What it
returns can be printed by block, written as canonical JSON, hashed, and compared with another.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from thawline.core.digest import digest_bytes
from thawline.core.index import NORM_STATISTICS, ModelIndex
from thawline.core.select import Item, Rows, items_of, layers_of, match
from thawline.errors import RecipeError, SelectorError
from thawline.freeze.adapters import has_adapters, with_adapters
from thawline.freeze.plan import Counted, FreezePlan, LayerDecay
from thawline.freeze.table import Block, blocks_of, table_of

DEFAULT_RULE = "default: what no rule names is frozen"
_TRACKING_RULE = "norms: tracking"


class Decision(NamedTuple):
    """What happens to one parameter or buffer in one phase.

    name:       first name of the tensor; `also` are the other names of a tied one
    trains:     a parameter gets gradients and updates; a buffer may change
    lr:         multiplier of the run's learning rate
    decays:     whether weight decay applies
    rule:       the rule that decided, and where it was written
    overridden: earlier rules that named the tensor too
    rows:       the ranges of rows that train, where not the whole tensor does
    since:      the phase in which it began to train without a break
    """

    name: str
    is_buffer: bool
    shape: tuple[int, ...]
    dtype: str
    trains: bool
    lr: float
    decays: bool
    rule: str
    where: str
    overridden: tuple[str, ...]
    rows: Rows | None
    since: int
    also: tuple[str, ...]
    persistent: bool

    @property
    def numel(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count

    @property
    def trained_numel(self) -> int:
        """Elements that may change: those of the rows that train, or all, or none."""
        if not self.trains:
            return 0
        if self.rows is None or not self.shape:
            return self.numel
        return sum(stop - start for start, stop in self.rows) * (self.numel // max(self.shape[0], 1))


class Override(NamedTuple):
    """A rule that lost `tensors` tensors to a later rule which says the opposite."""

    winner: str
    loser: str
    tensors: int
    example: str


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """A plan resolved against one model at one phase.

    decisions: parameters, then buffers, in model order
    pinned:    paths of the modules that are held in eval mode
    norms:     policy of each normalisation layer that keeps statistics, by path
    overrides: rules that lost tensors to later, opposite ones
    notes:     what a person should know: undecided kinds, ties, rules without effect
    resting:   first names of the parameters that train and may stay as they are
    """

    plan_digest: str
    phase: int
    phases: int
    decisions: tuple[Decision, ...]
    pinned: tuple[str, ...]
    norms: Mapping[str, str]
    overrides: tuple[Override, ...] = ()
    notes: tuple[str, ...] = ()
    resting: tuple[str, ...] = ()

    @cached_property
    def _by_name(self) -> dict[str, Decision]:
        return {name: d for d in self.decisions for name in (d.name, *d.also)}

    def __getitem__(self, name: str) -> Decision:
        """The decision on the tensor of that name (any of its names)."""
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @cached_property
    def trainable_names(self) -> tuple[str, ...]:
        """First names of the parameters that train, in model order."""
        return tuple(d.name for d in self.decisions if d.trains and not d.is_buffer)

    @cached_property
    def moving_buffers(self) -> tuple[str, ...]:
        """Names of the buffers that may change."""
        return tuple(d.name for d in self.decisions if d.trains and d.is_buffer)

    @cached_property
    def rows(self) -> dict[str, Rows]:
        """Parameters of which only some rows train -> those rows."""
        return {d.name: d.rows for d in self.decisions if d.trains and d.rows is not None}

    def lr_factor(self, name: str) -> float:
        return self[name].lr

    @cached_property
    def parameters(self) -> int:
        """Elements of all parameters."""
        return sum(d.numel for d in self.decisions if not d.is_buffer)

    @cached_property
    def trained_parameters(self) -> int:
        """Elements of the parameters that train."""
        return sum(d.trained_numel for d in self.decisions if not d.is_buffer)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that says everything; `Resolution.from_dict` reads it back."""
        return {
            "plan": self.plan_digest,
            "phase": self.phase,
            "phases": self.phases,
            "tensors": [
                {key: value for key, value in d._asdict().items() if value not in (None, ())} for d in self.decisions
            ],
            "pinned": list(self.pinned),
            "norms": dict(self.norms),
            "overrides": [list(o) for o in self.overrides],
            "notes": list(self.notes),
            "resting": list(self.resting),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Resolution:
        """The resolution that `to_dict` wrote (also after a way through JSON)."""
        decisions = []
        for row in data["tensors"]:
            rows = row.get("rows")
            fixed = {
                "shape": tuple(row.get("shape", ())),
                "overridden": tuple(row.get("overridden", ())),
                "also": tuple(row.get("also", ())),
                "rows": None if rows is None else tuple((int(a), int(b)) for a, b in rows),
            }
            decisions.append(Decision(**{**row, **fixed}))
        return cls(
            plan_digest=data["plan"],
            phase=data["phase"],
            phases=data["phases"],
            decisions=tuple(decisions),
            pinned=tuple(data["pinned"]),
            norms=dict(data["norms"]),
            overrides=tuple(Override(*row) for row in data["overrides"]),
            notes=tuple(data["notes"]),
            resting=tuple(data.get("resting", ())),
        )

    def to_json(self) -> str:
        """Canonical JSON: the same decisions give the same text, on every machine."""
        return json.dumps(self.to_dict(), ensure_ascii=False, sort_keys=True, separators=(",", ":"))

    @cached_property
    def digest(self) -> str:
        """64 hexadecimal digits over every decision (not over where the rules were written)."""
        plain = [(d.name, d.shape, d.dtype, d.trains, d.lr, d.decays, d.rows, d.since) for d in self.decisions]
        text = json.dumps([plain, list(self.pinned), dict(self.norms)], sort_keys=True, separators=(",", ":"))
        return digest_bytes("resolution", (len(plain),), text.encode())

    def blocks(self) -> tuple[Block, ...]:
        """The resolution by block: a layer of a layer list, or a part of the model; equal neighbours are one row."""
        return blocks_of(self.decisions, set(self.pinned))

    def table(self) -> str:
        """The blocks as text for people, with totals, overrides and notes."""
        return table_of(self)


@dataclass(frozen=True, slots=True)
class ResolutionDiff:
    """What differs between two resolutions: (name, field, before, after), in model order."""

    changes: tuple[tuple[str, str, Any, Any], ...]

    def __bool__(self) -> bool:
        return bool(self.changes)

    def to_dict(self) -> list[dict[str, Any]]:
        return [{"name": n, "field": f, "before": a, "after": b} for n, f, a, b in self.changes]

    def table(self) -> str:
        if not self.changes:
            return "no difference"
        return "\n".join(f"{name}: {field} {before} -> {after}" for name, field, before, after in self.changes)


def diff(before: Resolution, after: Resolution) -> ResolutionDiff:
    """The difference of two resolutions: tensors, decisions, rates, decay, rows and modes."""
    changes: list[tuple[str, str, Any, Any]] = []
    a_all, b_all = {d.name: d for d in before.decisions}, {d.name: d for d in after.decisions}
    for name in dict.fromkeys((*a_all, *b_all)):
        a, b = a_all.get(name), b_all.get(name)
        if a is None or b is None:
            changes.append((name, "tensor", a is not None, b is not None))
            continue
        for field in ("shape", "dtype", "trains", "lr", "decays", "rows"):
            if field in ("lr", "decays") and not (a.trains and b.trains):
                continue
            if getattr(a, field) != getattr(b, field):
                changes.append((name, field, getattr(a, field), getattr(b, field)))
    a_pins, b_pins = set(before.pinned), set(after.pinned)
    changes += [(p, "eval mode", p in a_pins, p in b_pins) for p in sorted(a_pins ^ b_pins)]
    return ResolutionDiff(tuple(changes))


def resolve_all(plan: FreezePlan, index: ModelIndex) -> tuple[Resolution, ...]:
    """The plan at each of its phases. Raises what `resolve` raises, so a fault in a later phase is found now."""
    plan = plan.expanded(index)
    return tuple(resolve(plan, index, phase=p) for p in range(plan.phases))


def resolve(plan: FreezePlan, index: ModelIndex, *, phase: int = 0) -> Resolution:
    """Decide every parameter and buffer of `index` under `plan` at `phase` (0 is the beginning).

    Raises SelectorError for selectors that match nothing, half-frozen ties and integer tensors that shall train;
    RecipeError where nothing trains, or the plan has no such phase.
    """
    plan = plan.expanded(index)
    if not 0 <= phase < plan.phases:
        raise RecipeError(f"there is no phase {phase}", where=plan.where("thaw"), fix=f"0 to {plan.phases - 1}")
    if plan.lora is not None and not has_adapters(index):
        index = with_adapters(index, plan.lora)
    return _Resolver(plan, index, phase).run()


class _Resolver:
    """The steps of one resolution over arrays indexed by tensor number."""

    def __init__(self, plan: FreezePlan, index: ModelIndex, phase: int) -> None:
        self.plan, self.index, self.phase = plan, index, phase
        count = len(index)
        self.rules: list[tuple[Item, str, int]] = []
        self.by = [-1] * count  # number of the rule that decided last
        self.on = bytearray(count)
        self.since = [0] * count
        self.lost: dict[int, list[int]] = {}
        self.rows: dict[int, Rows] = {}
        self.lr = [1.0] * count
        self.notes: list[str] = []
        self.named_in: list[set[int]] = []  # tensors that each phase names under train

    def run(self) -> Resolution:
        self.apply_rules()
        also = self.join_ties()
        self.refuse_untrainable()
        self.set_rates()
        decays = self.set_decay()
        resting = self.set_resting()
        policies, tracked, half = self.set_norms()
        decisions = self.decisions(also, decays, tracked)
        if not any(d.trains and not d.is_buffer for d in decisions):
            raise RecipeError(
                f"no parameter is left to train in phase {self.phase}",
                where=self.plan.where("train") or "plan.train",
                fix="the last matching rule wins; begin with what trains and take away after it",
            )
        return Resolution(
            plan_digest=self.plan.digest,
            phase=self.phase,
            phases=self.plan.phases,
            decisions=decisions,
            pinned=self.pins(tracked, half),
            norms=policies,
            overrides=self.overrides(),
            notes=tuple(dict.fromkeys(self.notes)),
            resting=resting,
        )

    def apply_rules(self) -> None:
        rules = self.plan.rules(self.phase)
        adapters = [i for i, info in enumerate(self.index.params) if ".lora_" in info.name]
        if self.plan.lora is not None:
            where = self.plan.lora.where() or "plan.lora"
            rules.append((Item(text="@lora", where=where), "lora: its adapters train", 0))
        self.rules = rules
        implied = len(rules) - 1 if self.plan.lora is not None else -1
        for phase in range(self.phase + 1):
            was = bytes(self.on)
            named: set[int] = set()
            for number, (item, _, begins) in enumerate(rules):
                if begins == phase and number != implied:
                    named.update(self.apply_rule(number, item))
            if implied >= 0:
                # A path means the original layers; the adapters follow `lora:` unless a rule speaks of them.
                for i in adapters:
                    if self.by[i] < 0 or "lora" not in self.rules[self.by[i]][0].text:
                        self.turn(i, implied, on=True)
            self.named_in.append(named)
            if phase:
                for i, (before, now) in enumerate(zip(was, self.on, strict=True)):
                    if now and not before:
                        self.since[i] = phase

    def apply_rule(self, number: int, item: Item) -> Sequence[int]:
        found = match(item, self.index)
        self.notes.extend(found.notes)
        by, on, lost = self.by, self.on, self.lost
        value = not item.minus
        for i in found.numbers:
            before = by[i]
            if before >= 0:
                lost.setdefault(i, []).append(before)
            by[i] = number
            if found.rows or i in self.rows:
                self.turn_rows(i, found.rows.get(i), on=value)
            else:
                on[i] = value
        return () if item.minus else found.numbers

    def turn(self, i: int, rule: int, *, on: bool) -> None:
        if self.by[i] >= 0 and self.by[i] != rule:
            self.lost.setdefault(i, []).append(self.by[i])
        self.by[i] = rule
        self.on[i] = on

    def turn_rows(self, i: int, rows: Rows | None, *, on: bool) -> None:
        count = self.index.tensors[i].shape[0]
        whole = set(range(count))
        named = whole if rows is None else {r for a, b in rows for r in range(a, b)}
        have = {r for a, b in self.rows[i] for r in range(a, b)} if i in self.rows else (whole if self.on[i] else set())
        have = have | named if on else have - named
        self.on[i] = bool(have)
        self.rows.pop(i, None)
        if have and have != whole:
            self.rows[i] = _ranges(have)

    def join_ties(self) -> dict[int, tuple[str, ...]]:
        """Tied names are one tensor: one decision, or a refusal with the names."""
        also: dict[int, tuple[str, ...]] = {}
        for first, names in self.index.aliases().items():
            numbers = [self.index.numbers[name] for name in names]
            also[numbers[0]] = names[1:]
            trained = [i for i in numbers if self.on[i]]
            if not trained:
                continue
            refused = [i for i in numbers if not self.on[i] and self.by[i] >= 0]
            left_out = [i for i in numbers if not self.on[i] and self.by[i] < 0]
            if refused:
                self.refuse_tie(trained[0], refused[0], f"is frozen by {self.rules[self.by[refused[0]]][1]}")
            if numbers[0] in left_out:
                self.refuse_tie(trained[0], numbers[0], "stays frozen (no rule names it)")
            for i in left_out:
                if self.owns_frozen(i):
                    self.refuse_tie(trained[0], i, "stays frozen with its module (no rule names it)")
                self.notes.append(f"{self.index.tensors[i].name} is the same tensor as {first} and trains with it")
            if len({self.rows.get(i) for i in trained}) > 1:
                self.refuse_tie(trained[0], trained[-1], "trains other rows")
            for i in numbers:
                if i != trained[0]:
                    self.on[i] = True
                    self.since[i] = self.since[trained[0]]
                    if trained[0] in self.rows:
                        self.rows[i] = self.rows[trained[0]]
            if self.by[numbers[0]] < 0:
                self.by[numbers[0]] = self.by[trained[0]]
        return also

    def owns_frozen(self, i: int) -> bool:
        """Whether the module of tensor `i` has another parameter, which is frozen."""
        owner = self.index.tensors[i].name.rpartition(".")[0]
        place = self.index.place(owner)
        if place is None:
            return False
        others = [c.tensor for c in place.children.values() if c.tensor >= 0 and c.tensor != i]
        return any(not self.index.tensors[o].is_buffer and not self.on[o] for o in others)

    def refuse_tie(self, trained: int, frozen: int, how: str) -> None:
        a, b = self.index.tensors[trained].name, self.index.tensors[frozen].name
        rule = self.rules[self.by[trained]]
        raise SelectorError(
            f"{a} and {b} are one tensor (tied weights): {rule[1]} trains {a}, while {b} {how}",
            where=rule[0].where,
            fix=f'train both (add "{b}"), or freeze both (add "!{a}")',
        )

    def refuse_untrainable(self) -> None:
        for i, info in enumerate(self.index.params):
            if self.on[i] and not info.is_floating:
                item, rule, _ = self.rules[self.by[i]]
                raise SelectorError(
                    f"{info.name} is of type {info.dtype} and cannot be trained by gradient ({rule})",
                    where=item.where,
                    fix=f'add "!{info.name}" after that rule, or load the weights in a floating type',
                )

    def set_rates(self) -> None:
        plan = self.plan
        self.rate_rules(plan.lr, plan, "lr")
        for p, entry in enumerate(plan.thaw[: self.phase], start=1):
            numbers = [rate for rate in entry.lr if isinstance(rate, float)]
            for rate in numbers:
                for i in self.named_in[p]:
                    self.lr[i] = rate
            self.rate_rules([r for r in entry.lr if not isinstance(r, float)], entry, f"thaw[{p - 1}].lr")

    def rate_rules(self, rates: Sequence[Any], holder: Any, label: str) -> None:
        for rate in rates:
            if isinstance(rate, float):
                self.lr = [rate] * len(self.lr)
            elif isinstance(rate, LayerDecay):
                self.layer_decay(rate, rate.where("over") or f"{label}.over")
            else:
                for selector, factor in rate.items():
                    where = holder.where("lr", selector) or f"{label}[{selector!r}]"
                    numbers = self.positive(selector, where, "a rate")
                    for i in numbers:
                        self.lr[i] = factor
                    if not any(self.on[i] for i in numbers):
                        self.notes.append(
                            f"{label} {selector!r} has no effect in phase {self.phase}: nothing in it trains"
                        )

    def layer_decay(self, rate: LayerDecay, where: str) -> None:
        layers = layers_of(rate.over, self.index, where=where)
        for depth, layer in enumerate(reversed(layers)):
            place = self.index.place(layer)
            assert place is not None
            for i in self.index.tree.numbers(place):
                self.lr[i] = rate.decay ** (depth + rate.start)
        for selector in rate.below:
            for i in self.positive(selector, where, "below"):
                self.lr[i] = rate.decay ** (len(layers) + rate.start)

    def positive(self, selector: str | Counted, where: str, what: str) -> list[int]:
        value: object = selector if isinstance(selector, str) else selector.model_dump()
        numbers: list[int] = []
        for item in items_of(value, where=where):
            if item.minus:
                raise SelectorError(f"{item.spelled!r} cannot have {what}", where=where, fix="name what it is for")
            found = match(item, self.index)
            self.notes.extend(found.notes)
            numbers.extend(found.numbers)
        return numbers

    def set_decay(self) -> bytearray:
        decays = bytearray(b"\x01" * len(self.index))
        for k, selector in enumerate(self.plan.no_decay):
            value: object = selector if isinstance(selector, str) else selector.model_dump()
            for item in items_of(value, where=self.plan.where("no_decay", k) or f"no_decay[{k}]"):
                found = match(item, self.index)
                self.notes.extend(found.notes)
                for i in found.numbers:
                    decays[i] = item.minus
        return decays

    def set_resting(self) -> tuple[str, ...]:
        """First names of the parameters that train and may stay as they are; says so where there are any."""
        named: set[int] = set()
        for k, selector in enumerate(self.plan.may_rest):
            named.update(self.positive(selector, self.plan.where("may_rest", k) or f"may_rest[{k}]", "may_rest"))
        numbers = [i for i in sorted(named) if self.on[i] and i < len(self.index.params)]
        names = dict.fromkeys(self.index.params[i].tied_to or self.index.params[i].name for i in numbers)
        if names:
            self.notes.append(f"{len(names)} of the tensors that train may stay as they are ({next(iter(names))} ...)")
        return tuple(names)

    def set_norms(self) -> tuple[dict[str, str], set[int], set[str]]:
        """Policies by norm, the statistics that may adapt though their norm is frozen, and norms that train in part."""
        statistics: dict[str, list[int]] = {}
        for i in range(len(self.index.params), len(self.index)):
            owner, _, last = self.index.tensors[i].name.rpartition(".")
            if last in NORM_STATISTICS:
                statistics.setdefault(owner, []).append(i)
        policies = dict.fromkeys(statistics, "pinned")
        self.policy_rules(self.plan.norms, self.plan, "norms", policies)
        for p, entry in enumerate(self.plan.thaw[: self.phase]):
            if entry.norms is not None:
                if "groupnorm" in ([entry.norms] if isinstance(entry.norms, str) else entry.norms.values()):
                    raise RecipeError(
                        "groupnorm replaces layers, which cannot begin in the middle of a run",
                        where=entry.where("norms") or f"thaw[{p}].norms",
                        fix="set it in the plan's own norms, or use pinned or tracking here",
                    )
                self.policy_rules(entry.norms, entry, f"thaw[{p}].norms", policies)
        tracked: set[int] = set()
        half: set[str] = set()
        for path, numbers in statistics.items():
            if any(self.on[i] for i in numbers):
                continue
            if policies[path] == "tracking":
                tracked.update(numbers)
            else:
                half.add(path)
        in_part = [p for p in half if self.trains_in_part(p)]
        if in_part:
            more = f" and {len(in_part) - 1} more" if len(in_part) > 1 else ""
            self.notes.append(
                f"{in_part[0]}{more}: a parameter trains, but no rule names the statistics, so they stay pinned "
                "(name the whole layer, or use norms: tracking, to let them adapt)"
            )
        return policies, tracked, half

    def trains_in_part(self, path: str) -> bool:
        place = self.index.place(path)
        return place is not None and any(self.on[i] for i in self.index.tree.numbers(place))

    def policy_rules(self, norms: Any, holder: Any, label: str, policies: dict[str, str]) -> None:
        if isinstance(norms, str):
            policies.update(dict.fromkeys(policies, norms))
            return
        kinds = {n.path for n in self.index.of_kind("norm")[0]}
        for selector, policy in norms.items():
            where = holder.where("norms", selector) or f"{label}[{selector!r}]"
            owners = {self.index.tensors[i].name.rpartition(".")[0] for i in self.positive(selector, where, "a policy")}
            if not owners & (policies.keys() | kinds):
                raise SelectorError(
                    f"{selector!r} holds no normalisation layer", where=where, fix="name one, or use @norm"
                )
            policies.update(dict.fromkeys(owners & policies.keys(), policy))

    def decisions(
        self, also: Mapping[int, tuple[str, ...]], decays: bytearray, tracked: set[int]
    ) -> tuple[Decision, ...]:
        # One flat loop: this is most of the time that a resolution of 10,000 tensors takes.
        by, on, lr, since, lost, rows = self.by, self.on, self.lr, self.since, self.lost, self.rows
        labels = [(rule, item.where) for item, rule, _ in self.rules]
        default, tracking = (DEFAULT_RULE, ""), (_TRACKING_RULE, self.plan.where("norms"))
        made: list[Decision] = []
        for i, info in enumerate(self.index.tensors):
            if info.tied_to is not None:
                continue
            rule, where = labels[by[i]] if by[i] >= 0 else default
            trains, buffer = bool(on[i]), info.is_buffer
            if i in tracked:
                trains, (rule, where) = True, tracking
            overridden = tuple(labels[r][0] for r in lost[i]) if i in lost else ()
            made.append(
                Decision(
                    info.name,
                    buffer,
                    info.shape,
                    info.dtype,
                    trains,
                    lr[i] if trains and not buffer else 1.0,
                    bool(decays[i]) and not buffer,
                    rule,
                    where,
                    overridden,
                    rows.get(i) if trains else None,
                    since[i] if trains else 0,
                    also.get(i, ()),
                    info.persistent,
                )
            )
        return tuple(made)

    def pins(self, tracked: set[int], half: set[str]) -> tuple[str, ...]:
        """Modules held in eval mode: wholly frozen ones with all that is in them, and norms whose statistics are.

        A module without tensors (dropout) goes with the nearest module around it that has some.
        """
        holders: set[str] = set()
        alive: set[str] = set()
        for info, live in zip(self.index.tensors, self.on, strict=True):
            path = info.name.rpartition(".")[0]
            known = alive if live else holders
            while path not in known:
                known.add(path)
                holders.add(path)
                path = path.rpartition(".")[0]
        adapting = {self.index.tensors[i].name.rpartition(".")[0] for i in tracked}
        paths: Iterable[str] = self.index.modules or sorted(holders)
        nearest: dict[str, str] = {}
        pinned = []
        for path in paths:
            holder = path if path in holders or not path else nearest.get(path.rpartition(".")[0], "")
            nearest[path] = holder
            if path in half or (holder in holders and holder not in alive and path not in adapting):
                pinned.append(path)
        return tuple(pinned)

    def overrides(self) -> tuple[Override, ...]:
        counts: dict[tuple[int, int], list[int]] = {}
        for i, losers in self.lost.items():
            winner = self.by[i]
            for loser in losers:
                if self.rules[loser][0].minus != self.rules[winner][0].minus:
                    counts.setdefault((winner, loser), []).append(i)
        return tuple(
            Override(self.rules[w][1], self.rules[x][1], len(found), self.index.tensors[found[0]].name)
            for (w, x), found in sorted(counts.items())
        )


def _ranges(rows: set[int]) -> Rows:
    made: list[tuple[int, int]] = []
    for row in sorted(rows):
        if made and made[-1][1] == row:
            made[-1] = (made[-1][0], row + 1)
        else:
            made.append((row, row + 1))
    return tuple(made)
