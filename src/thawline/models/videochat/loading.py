"""Which file supplies which tensor: the chain of a VideoChat2 model, whole or refused.

A model is a language model's directory and then files in order: stage 1 (vision transformer and Q-Former), the stage-2
delta, the stage-3 delta, perhaps further deltas. Upstream loads each with `strict=False` and logs what did not fit,
which no reader can tell from what is meant to be absent: that is how a run that trained only a projection ends in
gibberish (Ask-Anything issue 235). Here every tensor of the model is accounted for over the whole chain by our own
comparison of names. torch's `strict=True` is not enough for it: keys below a submodule that is None are dropped unseen.

`account` decides from names and shapes, and never needs torch; `load_parts_` acts. What names cannot tell is listed
under `undecidable`: files of another run with the same shapes need a fingerprint, which upstream's files do not carry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from thawline.errors import CheckpointError
from thawline.models.videochat.config import LoraConfig
from thawline.models.videochat.names import Part, as_upstream, canonical, is_rotary, part_of, wrappings

if TYPE_CHECKING:
    from torch import Tensor, nn

Kind = Literal["stage1", "stage2", "stage3", "partial"]
Shapes = Mapping[str, Sequence[int]]

_RANK: Mapping[Kind, int] = {"stage1": 1, "stage2": 2, "stage3": 3, "partial": 4}
_TITLE: Mapping[Kind, str] = {
    "stage1": "stage 1 (vision transformer and Q-Former)",
    "stage2": "stage 2 (captions, no text in the Q-Former)",
    "stage3": "stage 3 or later (instructions)",
    "partial": "a delta of a run that trained little",
}
_SUPPLIERS: Mapping[Part, str] = {
    "vision_encoder": "the stage-1 file (umt_l16_qformer.pth)",
    "vision_layernorm": "the stage-1 file (umt_l16_qformer.pth)",
    "qformer": "the stage-1 file (umt_l16_qformer.pth)",
    "text_branch": "the stage-1 file (umt_l16_qformer.pth)",
    "queries": "the stage-1 file (umt_l16_qformer.pth)",
    "extra_queries": "the stage-2 file",
    "projection": "the stage-2 file",
    "lora": "the stage-3 file",
    "llm": "the language model's directory",
}
_ADAPTER = re.compile(r"^(?P<layer>.*)\.lora_(?P<side>[AB])\.(?P<adapter>[^.]+)\.weight$")
_SHOWN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class PartReport:
    """What became of one file's tensors. All names are the file's own.

    kind:       what the file is, by its tensors
    loaded:     into the model (later files may overwrite them)
    derived:    recomputed from the configuration, so passed over (rotary tables)
    dropped:    known to belong to no model of this kind (stage 1's heads; the text branch of a stage-2 model)
    unexpected: this model has no place for them; fatal
    misshapen:  (name, shape in the file, shape in the model); fatal
    """

    label: str
    kind: Kind
    loaded: tuple[str, ...]
    derived: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """Where every tensor of the model comes from, and why the chain is refused, if it is.

    supplier:    model name -> label of the last file that supplies it, "language model", or "new"
    missing:     model names that nothing supplies
    refusals:    reasons, most telling first; empty where the chain is whole
    undecidable: what the files do not say, as sentences
    order:       the chain as it should be given, with <...> where a file is missing
    """

    parts: tuple[PartReport, ...]
    supplier: Mapping[str, str]
    missing: tuple[str, ...]
    refusals: tuple[str, ...]
    undecidable: tuple[str, ...]
    order: tuple[str, ...]

    def raise_if_refused(self, command: Callable[[Sequence[str]], str] | None = None) -> None:
        """Raises CheckpointError with every reason. command: turns the right order of files into what to run."""
        if not self.refusals:
            return
        told = command(self.order) if command is not None else "give the files in this order: " + ", ".join(self.order)
        raise CheckpointError("; ".join(self.refusals), where=" + ".join(p.label for p in self.parts), fix=told)

    def table(self) -> str:
        """One line for each file and each part of the model, for people."""
        lines = [f"{'file':<32} {'kind':<8} {'loaded':>7} {'derived':>8} {'dropped':>8} {'fatal':>6}"]
        for p in self.parts:
            fatal = len(p.unexpected) + len(p.misshapen)
            counts = f"{len(p.loaded):>7} {len(p.derived):>8} {len(p.dropped):>8} {fatal:>6}"
            lines.append(f"{p.label:<32} {p.kind:<8} {counts}")
        of: dict[tuple[str, str], int] = {}
        for name, label in self.supplier.items():
            of[part_of(name), label] = of.get((part_of(name), label), 0) + 1
        lines += [f"  {part:<18} {count:>5} tensors from {label}" for (part, label), count in of.items()]
        return "\n".join(lines + [f"  not told by the files: {text}" for text in self.undecidable])

    def to_json(self) -> dict[str, Any]:
        return {
            "parts": [
                {
                    "file": p.label,
                    "kind": p.kind,
                    "loaded": len(p.loaded),
                    "derived": list(p.derived),
                    "dropped": list(p.dropped),
                    "unexpected": list(p.unexpected),
                    "misshapen": [[n, list(a), list(b)] for n, a, b in p.misshapen],
                }
                for p in self.parts
            ],
            "missing": list(self.missing),
            "refusals": list(self.refusals),
            "undecidable": list(self.undecidable),
            "order": list(self.order),
        }


def kind_of(names: Iterable[str]) -> Kind:
    """What a file is, by the parts of the model that its tensors belong to.

    stage1: heads that no later stage has, or vision and Q-Former without a projection
    stage2: vision or Q-Former, but neither text in the Q-Former nor adapters
    stage3: the Q-Former's text branch beside a projection, or adapters beside vision or Q-Former
    partial: too little to be any of these by itself; it stands on a parent that the file does not name
    """
    parts = {part_of(n) for n in names}
    seen = bool(parts & {"vision_encoder", "qformer"})
    if "stage1_heads" in parts or (seen and "projection" not in parts and "lora" not in parts):
        return "stage1"
    if "lora" in parts:
        return "stage3" if seen or "text_branch" in parts else "partial"
    if "text_branch" in parts:
        return "stage3"
    return "stage2" if "qformer" in parts else "partial"


def lora_of(tensors: Shapes) -> LoraConfig | None:
    """Rank and targets that a file's adapters were made with, by their names and shapes; None where it has none.

    alpha and dropout stand in no file: they keep upstream's (32, 0.1) unless the caller knows better.
    Raises CheckpointError where ranks differ between layers, which no configuration here means.
    """
    ranks: dict[int, str] = {}
    targets: list[str] = []
    for name, shape in tensors.items():
        found = _ADAPTER.match(canonical(name))
        if found is None or found["side"] != "A":
            continue
        ranks.setdefault(int(shape[0]), name)
        last = found["layer"].rpartition(".")[2]
        if last not in targets:
            targets.append(last)
    if not ranks:
        return None
    if len(ranks) > 1:
        raise CheckpointError(
            f"adapters of several ranks in one file: {', '.join(f'{r} in {n}' for r, n in ranks.items())}",
            fix="give the file's own adapter_config.json to peft and merge it first",
        )
    return LoraConfig(r=next(iter(ranks)), targets=tuple(targets))


def account(
    model: Shapes, parts: Sequence[tuple[str, Shapes]], *, new: Collection[Part] = (), llm_given: bool = True
) -> LoadReport:
    """Compare a chain of files with the model that they are to fill.

    model: name -> shape of every tensor of its state dict
    parts: (label, name -> shape) of each file, in the order of loading
    new:   parts of the model that start from their initial values on purpose, e.g. ("lora",) before stage 3
    llm_given: whether the language model's own weights came from its directory, already compared
    """
    homes = {canonical(name): name for name in model}
    model_wraps = wrappings(model)
    has_lora = any(part_of(n) == "lora" for n in model)
    has_text = any(part_of(n) == "text_branch" for n in model)
    supplier = {n: "language model" for n in model if llm_given and part_of(n) == "llm"}
    reports: list[PartReport] = []
    refusals: list[str] = []
    undecidable: list[str] = []
    if model_wraps > 1:
        refusals.append(
            f"the language model is wrapped in adapters {model_wraps} times, so no file's adapters have a place in it; "
            "build it without LoRA, or do not wrap it again"
        )
    for label, tensors in parts:
        kind = kind_of(tensors)
        report = _compare(label, kind, tensors, model, homes, has_text=has_text)
        reports.append(report)
        for name in report.loaded:
            supplier[homes[canonical(name)]] = label
        refusals += _refused(report, tensors, has_lora=has_lora, has_text=has_text)
    refusals = _disorder(reports) + refusals
    for name in model:
        if name not in supplier and part_of(name) in new:
            supplier[name] = "new"
    missing = tuple(n for n in model if n not in supplier and part_of(n) != "derived")
    by_part: dict[Part, list[str]] = {}
    for name in missing:
        by_part.setdefault(part_of(name), []).append(name)
    for part, names in by_part.items():
        consequence = ": answers would be those of the language model without adapters" if part == "lora" else ""
        refusals.append(
            f"{len(names)} tensors of {part} come from no file ({_some(names)}); "
            f"{_SUPPLIERS.get(part, 'a file')} supplies them{consequence}"
        )
    for report in reports:
        if report.kind == "partial":
            trained = sorted({part_of(n) for n in report.loaded} - {"derived"})
            undecidable.append(
                f"{report.label} holds only {', '.join(trained)}, and not beside which weights they trained"
            )
        if any(part_of(n) == "lora" for n in report.loaded):
            undecidable.append(f"{report.label} does not hold LoRA's alpha: the configuration's is used")
    return LoadReport(
        parts=tuple(reports),
        supplier={n: supplier[n] for n in model if n in supplier},
        missing=missing,
        refusals=tuple(dict.fromkeys(refusals)),
        undecidable=tuple(undecidable),
        order=_right_order(reports, by_part),
    )


def load_parts_(
    model: nn.Module,
    parts: Sequence[tuple[str, Mapping[str, Tensor]]],
    *,
    new: Collection[Part] = (),
    llm_given: bool = True,
    command: Callable[[Sequence[str]], str] | None = None,
) -> LoadReport:
    """Fill the model from a chain of files, or refuse the chain and change nothing.

    parts: (label, name -> tensor) in the order of loading; a file's `{"model": ...}` is opened by the caller
    Raises CheckpointError as `LoadReport.raise_if_refused`.
    """
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    report = account(
        shapes,
        [(label, {n: tuple(t.shape) for n, t in ts.items()}) for label, ts in parts],
        new=new,
        llm_given=llm_given,
    )
    report.raise_if_refused(command)
    for (_, tensors), part in zip(parts, report.parts, strict=True):
        copy_part_(model, part, ((name, tensors[name]) for name in part.loaded))
    return report


def copy_part_(model: nn.Module, part: PartReport, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy one accepted file into the model, tensor by tensor: for files larger than memory, after `account`."""
    home = model.state_dict()  # detached, so writing needs no guard against autograd
    homes = {canonical(name): name for name in home}
    wanted = set(part.loaded)
    for name, tensor in tensors:
        if name in wanted:
            home[homes[canonical(name)]].copy_(tensor.detach())


def upstream_delta(model: nn.Module, trainable: Iterable[str]) -> dict[str, Tensor]:
    """What upstream would save after training `trainable`: those tensors and the buffers, under its names.

    Upstream's file is `{"model": this}`; copies, on the CPU.
    """
    wanted = set(trainable)
    parameters = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    # Adapters that a plan put in lack the wrapper that upstream's names have.
    bare = wrappings(parameters) == 0 and any(part_of(n) == "lora" for n in parameters)
    return {
        as_upstream(name, wrap=bare): tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in model.state_dict().items()
        if name in wanted or name not in parameters
    }


def _compare(
    label: str, kind: Kind, tensors: Shapes, model: Shapes, homes: Mapping[str, str], *, has_text: bool
) -> PartReport:
    loaded: list[str] = []
    derived: list[str] = []
    dropped: list[str] = []
    unexpected: list[str] = []
    misshapen: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    for name, shape in tensors.items():
        part = part_of(name)
        home = homes.get(canonical(name))
        if is_rotary(name):
            derived.append(name)
        elif home is not None and tuple(model[home]) == tuple(shape):
            loaded.append(name)
        elif home is not None:
            misshapen.append((name, tuple(shape), tuple(model[home])))
        elif part == "stage1_heads" or (part == "text_branch" and kind == "stage1" and not has_text):
            dropped.append(name)
        else:
            unexpected.append(name)
    return PartReport(
        label=label,
        kind=kind,
        loaded=tuple(loaded),
        derived=tuple(derived),
        dropped=tuple(dropped),
        unexpected=tuple(unexpected),
        misshapen=tuple(misshapen),
    )


def _refused(report: PartReport, tensors: Shapes, *, has_lora: bool, has_text: bool) -> list[str]:
    """Why one file does not fit this model."""
    reasons: list[str] = []
    rest = list(report.unexpected)
    if wrappings(tensors) > 1:
        twice = [n for n in rest if wrappings([n]) > 1]
        reasons.append(f"{report.label} was saved from a model wrapped in adapters twice ({_some(twice)})")
        rest = [n for n in rest if n not in twice]
    adapters = [n for n in rest if part_of(n) == "lora"]
    if adapters and not has_lora:
        made = lora_of(tensors)
        rank = f"r {made.r} on {', '.join(made.targets)}" if made is not None else "unknown rank"
        reasons.append(
            f"{report.label} holds {len(adapters)} adapter tensors ({_some(adapters)}) and this model has no adapters; "
            f"configure LoRA with {rank}"
        )
        rest = [n for n in rest if n not in adapters]
    text = [n for n in rest if part_of(n) == "text_branch"]
    if text and not has_text:
        reasons.append(
            f"{report.label} trained the Q-Former's text branch ({_some(text)}), which this model was built without; "
            "build it with text input"
        )
        rest = [n for n in rest if n not in text]
    if rest:
        reasons.append(f"{report.label} has {len(rest)} tensors that this model has no place for: {_some(rest)}")
    for name, there, here in report.misshapen[:_SHOWN]:
        hint = ""
        if part_of(name) == "lora":
            hint = ": another LoRA rank"
        elif name.endswith("word_embeddings.weight"):
            hint = ": another BERT vocabulary, or [DEC] not added to it"
        reasons.append(f"{name} has shape {there} in {report.label} and {here} in the model{hint}")
    if len(report.misshapen) > _SHOWN:
        reasons.append(f"{len(report.misshapen) - _SHOWN} more shapes of {report.label} differ")
    return reasons


def _disorder(reports: Sequence[PartReport]) -> list[str]:
    """Why the order of the files is wrong, as far as their kinds tell."""
    reasons: list[str] = []
    for number, late in enumerate(reports):
        for early in reports[:number]:
            if (
                late.kind in ("stage1", "stage2")
                and early.kind in ("stage2", "stage3")
                and (_RANK[late.kind] < _RANK[early.kind])
            ):
                back = set(late.loaded) & set(early.loaded)
                reasons.append(
                    f"{late.label} is {_TITLE[late.kind]} and comes after {early.label}, {_TITLE[early.kind]}: "
                    f"it would put {len(back)} tensors back to an older state ({_some(sorted(back))})"
                )
            if early.kind == "partial" and late.kind != "partial":
                lost = set(early.loaded) & set(late.loaded)
                reasons.append(
                    f"{early.label} is a small delta and comes before {late.label}, {_TITLE[late.kind]}, "
                    f"which overwrites {len(lost)} of its {len(early.loaded)} tensors"
                )
    return reasons


def _right_order(reports: Sequence[PartReport], missing: Mapping[Part, Sequence[str]]) -> tuple[str, ...]:
    chain = [(_RANK[r.kind], r.label) for r in reports]
    for part, rank, place in (
        ("vision_encoder", 1, "<stage-1 file>"),
        ("qformer", 1, "<stage-1 file>"),
        ("projection", 2, "<stage-2 file>"),
        ("lora", 3, "<stage-3 file>"),
    ):
        if part in missing and (rank, place) not in chain:
            chain.append((rank, place))
    directory = ("<language model directory>",) if "llm" in missing else ()
    return directory + tuple(label for _, label in sorted(chain, key=lambda pair: pair[0]))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
