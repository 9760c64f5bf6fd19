"""Any checkpoint as a source of named tensors: what it holds, where each tensor came from, and its bytes.

`open_source` finds out what a path is by looking at it, never by its name alone, and asks the format for a plan; after
that a source only reads. Torch is not imported, nothing is unpickled beyond a fixed list, every checksum is compared
before bytes are handed out, and memory stays small whatever the size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Final

from thawline.ckpt import adapters
from thawline.ckpt.formats import dcp, huggingface, safetensors_file, thawline_run, torch_pt, wenet, zero
from thawline.ckpt.formats.mapped import CHUNK_BYTES
from thawline.ckpt.formats.pieces import Plan, Planned, TensorInfo, chunks, read, regions
from thawline.ckpt.recognition import BASE, first_of, matched, recognised, respelt
from thawline.ckpt.tensor_digest import digest, digest_of
from thawline.core.adapter import Adapter
from thawline.core.digest import fingerprint
from thawline.core.index import is_adapter
from thawline.errors import BaseMismatch, CheckpointError

__all__ = ["Source", "TensorInfo", "digest", "open_source"]

EMA: Final = "average (EMA)"


class Source:
    """An opened checkpoint.

    path, format: what was opened, and what it was found to be, in words
    infos:    its tensors, in its own order; an info says where the values come from
    notes:    what a reader should know, one sentence each
    not_held: names that it mentions and cannot give, with the reason
    sidecars: files that travel with the weights: name at the target -> path
    config:   the model's configuration, if one lies beside the weights
    adapters: LoRA adapters that it holds apart from the weights that they change, by the path of the layer
    below:    fingerprints of what it was made over, lowest first, where it is one of our runs or deltas
    """

    def __init__(
        self, path: Path, plan: Plan, *, adapters: Mapping[str, Adapter] | None = None, below: tuple[str, ...] = ()
    ) -> None:
        self.path = path
        self.plan = plan
        self.adapters = dict(adapters or {})
        self.below = below
        self.format = plan.format
        self.notes = plan.notes
        self.not_held = plan.not_held
        self.sidecars = plan.sidecars
        self.config = plan.config

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        return tuple(tensor.info for tensor in self.plan.tensors.values())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.plan.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.plan.tensors

    def __len__(self) -> int:
        return len(self.plan.tensors)

    def info(self, name: str) -> TensorInfo:
        """What is known of a tensor. Raises CheckpointError if the source does not hold it."""
        return self._planned(name).info

    def read(self, name: str) -> memoryview:
        """All bytes of a tensor, row major, little endian, verified against the format's checksum where it has one.

        Read-only and not copied where the tensor is contiguous in its file; valid as long as it is kept.
        """
        return read(self._planned(name))

    def chunks(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[memoryview]:
        """The same bytes a piece at a time; a piece is valid until the next one is asked for."""
        tensor = self._planned(name)
        for region in regions(tensor):
            region.check()
        return chunks(tensor, chunk_bytes)

    def digest(self, name: str) -> str:
        """Digest of a tensor, as `core.digest.digest_bytes` gives it; checksums compared."""
        return digest_of(self._planned(name))

    def fingerprint(self) -> str:
        """Fingerprint over all tensors: which model this is."""
        return fingerprint({name: self.digest(name) for name in self.names})

    def only(self, names: Iterable[str]) -> Source:
        """The same source with these tensors alone, without sidecars and configuration. The files stay this one's."""
        tensors = {name: self._planned(name) for name in names}
        return Source(self.path, Plan(format=self.format, tensors=tensors, files=self.plan.files))

    def merged(self) -> Source:
        """The same with its adapters added into the weights, under the names of a model without any; itself if it holds
        none. Raises CheckpointError where they do not fit."""
        if not self.adapters:
            return self
        plan = adapters.merge_recorded(self.plan, self.adapters, path=self.path)
        return Source(self.path, plan, below=self.below)

    def close(self) -> None:
        """Let go of the files; bytes already handed out stay valid."""
        for file in self.plan.files:
            file.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _planned(self, name: str) -> Planned:
        tensor = self.plan.tensors.get(name)
        if tensor is None:
            why = self.not_held.get(name)
            raise CheckpointError(
                f"does not hold tensor {name!r}" + (f": {why}" if why else ""),
                where=str(self.path),
                fix="give the base (--base)" if why else "see which names it has: thawline verify",
            )
        return tensor


def open_source(
    path: Path | str,
    *,
    tag: str | None = None,
    only: str | None = None,
    base: Path | str | None = None,
    alone: bool = False,
    below: bool = False,
    apart: bool = False,
) -> Source:
    """Open any checkpoint file or folder.

    tag:  which checkpoint of a folder that has several (DeepSpeed tag, WeNet `epoch_3`, `step-00001200`); of a
          distributed checkpoint the first key of the weights, if it is none of the usual ones
    only: "weights" as they were trained, or "ema" for the averaged copy kept beside them; None: what the checkpoint is
          for, which for a finished run is its result (averaged, where the run has `run.ema`)
    base: what gives the tensors that the checkpoint itself leaves out; for our deltas it is checked by digest
    alone: what was changed is what counts: a delta file is opened without its base, and a run's checkpoint where that
           is not there any more. Otherwise both are put over the base that they record; a delta file is opened without
           one where it is not there
    below: it is to be a base, so a delta file is put over the base that it records
    apart: LoRA adapters of our runs and deltas stay beside the weights, as they were trained and as a delta over them
           knows them; otherwise they are merged, as far as their scale is recorded

    Raises CheckpointError naming the file and the cause, BaseMismatch if the base is another one.
    """
    path = Path(path)
    if only not in (None, "weights", "ema"):
        raise CheckpointError(f"{only!r} cannot be asked for", where=str(path), fix="ask for 'weights' or 'ema'")
    for place in (path, *([Path(base)] if base is not None else [])):
        refuse_absent(place)
    try:
        source = _open(path, tag, only, Path(base) if base is not None else None, alone=alone, below=below)
        "".join(source.names).encode()  # a name that is no text fails here, as damage
        return source if apart or below else source.merged()
    except OSError as exc:
        raise CheckpointError(f"cannot be read: {exc.strerror or exc}", where=str(exc.filename or path)) from exc
    except (TypeError, KeyError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as exc:
        # Metadata are of any kind that a pickle or JSON can spell; formats check what they build on, and a value of
        # another kind anywhere else means damage too.
        raise CheckpointError(
            f"its metadata are damaged: {type(exc).__name__}: {exc}", where=str(path), fix="copy it again"
        ) from exc


def refuse_absent(path: Path) -> None:
    """Raise CheckpointError, naming what lies near, where there is nothing at `path`."""
    if path.exists():
        return
    from thawline.core.config import near_names

    beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    near = near_names(path.name, beside)
    more = ", ..." if len(beside) > 8 else ""
    raise CheckpointError(
        "does not exist",
        where=str(path),
        fix=f"did you mean {path.parent / near[0]}?"
        if near
        else f"beside it are: {', '.join(beside[:8])}{more}"
        if beside
        else "check the path",
    )


def _open(
    path: Path, tag: str | None, only: str | None, base: Path | None, *, alone: bool = False, below: bool = False
) -> Source:
    """`below`: as a base, for which a delta has to find its own."""
    notes: tuple[str, ...] = ()
    if thawline_run.is_run(path):
        model = path / "model"
        if tag is None and base is None and only is None and model.is_dir():
            result = _with_notes(_open(model, None, None, None), (f"a run: its result {model} is meant",))
            return Source(result.path, result.plan, below=thawline_run.made_over(path))
        if tag is not None:
            path, tag = thawline_run.checkpoint_called(path, tag), None
        else:
            path, notes = thawline_run.newest_checkpoint(path)
    if tag is not None and (thawline_run.is_checkpoint(path) or path.is_file()):
        raise _one_only(path, tag)
    if thawline_run.is_checkpoint(path):
        delta = thawline_run.read_delta(thawline_run.checked(path))
        source = _with_notes(_delta(path, delta, base, look=True, must=not alone), notes)
        return _averaged(source) if only == "ema" else source
    if thawline_run.is_delta(path):
        if only == "ema":
            raise _no_averages(path, "a delta")
        return _delta(path, thawline_run.read_delta(path), base, look=not alone, must=below)
    plan = _plan(path, tag, only or "weights")
    if only == "ema" and not plan.format.startswith("averaged"):
        raise _no_averages(path, plan.format)
    if base is None:
        return Source(path, plan, below=thawline_run.made_over(path))
    under = _open(base, None, None, None, below=True).merged()  # only a delta knows the base's adapters apart
    if plan.format.startswith("peft"):
        return Source(path, adapters.merge(plan, under.plan, path=path, base_path=base))
    return Source(path, _over(path, plan, under))


def _plan(path: Path, tag: str | None, only: str) -> Plan:
    if path.is_file():
        if torch_pt.looks_like(path):
            return torch_pt.plan(path, only=only)
        if safetensors_file.looks_like(path):
            plan = safetensors_file.plan(path)
            moments = plan.metadata.get("thawline", "").startswith("optimizer/")
            return replace(plan, notes=(*plan.notes, "the moments of an optimizer, not weights")) if moments else plan
        raise CheckpointError(
            "is no checkpoint file that is known: neither torch's nor safetensors",
            where=str(path),
            fix="if it was cut short or is a pointer of git-lfs, fetch it again",
        )
    if not path.is_dir():
        raise CheckpointError("is neither a file nor a folder", where=str(path), fix="give a checkpoint")
    if dcp.looks_like(path):
        return _of_trainer(dcp.plan(path, key=tag), path)
    if zero.looks_like(path):
        return _of_trainer(zero.plan(path, tag=tag), path)
    if huggingface.looks_like(path):
        if tag is not None:
            raise _one_only(path, tag)
        return huggingface.plan(path)
    if wenet.looks_like(path):
        weights = wenet.weights_file(path, tag)
        inner = _plan(weights, None, only)
        return replace(inner, format=f"wenet ({weights.name})", sidecars=wenet.sidecars(path, weights))
    single = [p for p in sorted(path.iterdir()) if p.suffix in (".pt", ".pth", ".ckpt", ".bin", ".safetensors")]
    if len(single) == 1 and single[0].is_file():
        return _plan(single[0], None, only)
    listed = ", ".join(p.name for p in sorted(path.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        "is no checkpoint folder that is known: looked for .metadata (torch distributed, FSDP2, accelerate, "
        "Lightning), latest or *_model_states.pt (DeepSpeed), model.safetensors, pytorch_model.bin or "
        "their index (Hugging Face), train.yaml with .pt files (WeNet), MANIFEST.json (Thawline), one weights file",
        where=str(path),
        fix=f"it holds: {listed}; give the file or folder itself",
    )


def _of_trainer(plan: Plan, path: Path) -> Plan:
    """Shards with what transformers' Trainer leaves beside them: a description of the model, often rounded weights."""
    folder = path if (path / "config.json").is_file() else path.parent
    config, sidecars = huggingface.described(folder)
    if config is None or "model_type" not in config:
        return plan
    beside = huggingface.whole_file(folder)
    notes = (f"{beside} lies beside the shards and was not read: theirs are the weights as trained",) if beside else ()
    return replace(plan, config=config, sidecars={**sidecars, **plan.sidecars}, notes=(*plan.notes, *notes))


def _no_averages(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"is {what}, which keeps no averaged weights that are known",
        where=str(path),
        fix="convert the weights themselves",
    )


def _one_only(path: Path, tag: str) -> CheckpointError:
    return CheckpointError(
        f"is one checkpoint: there is no {tag!r} to choose in it", where=str(path), fix="leave the tag out"
    )


def _with_notes(source: Source, notes: tuple[str, ...]) -> Source:
    plan = replace(source.plan, notes=(*notes, *source.plan.notes))
    return Source(source.path, plan, adapters=source.adapters, below=source.below)


def _over(path: Path, plan: Plan, base: Source) -> Plan:
    """The checkpoint's tensors over those of a base, in the base's order, new names last."""
    shared = [name for name in plan.tensors if name in base]
    if not shared:
        raise BaseMismatch(
            f"shares no tensor name with the base {base.path}: first names {next(iter(plan.tensors))!r} "
            f"and {base.names[0]!r}",
            where=str(path),
            fix="give the base it was trained from, or a table of names (--rename)",
        )
    wrong = [name for name in shared if plan.tensors[name].info.shape != base.info(name).shape]
    if wrong:
        name = wrong[0]
        raise BaseMismatch(
            f"{len(wrong)} tensors have another shape in the base {base.path}: {name!r} is "
            f"{plan.tensors[name].info.shape}, there {base.info(name).shape}",
            where=str(path),
            fix="give the base it was trained from",
        )
    tensors = {
        name: plan.tensors[name] if name in plan.tensors else planned.renamed(name, origin=BASE)
        for name, planned in base.plan.tensors.items()
    }
    # What the base ties to a tensor that the checkpoint has, and the checkpoint does not list, is that tensor.
    followers = [n for n, t in tensors.items() if n not in plan.tensors and t.info.tied_to in plan.tensors]
    for name in followers:
        kept = str(tensors[name].info.tied_to)
        tensors[name] = plan.tensors[kept].renamed(name, tied_to=kept)
    new = [name for name in plan.tensors if name not in base]
    tensors |= {name: plan.tensors[name] for name in new}
    notes = [f"{len(tensors) - len(plan.tensors) - len(followers)} tensors were taken from the base {base.path}"]
    if followers:
        notes.append(f"tied in the base, and so as in the checkpoint: {first_of(followers)}")
    if new:
        notes.append(f"{len(new)} tensors are not in the base: {first_of(new)}")
    return replace(
        plan,
        tensors=tensors,
        files=(*plan.files, *base.plan.files),
        notes=(*plan.notes, *notes),
        not_held={name: why for name, why in plan.not_held.items() if name not in tensors},
        sidecars={**base.sidecars, **plan.sidecars},
        config=plan.config or base.config,
    )


# --- our own deltas ---


def _averaged(source: Source) -> Source:
    """A checkpoint's tensors with the averages that it keeps laid over them, in the element types of the tensors."""
    tensors = dict(source.plan.tensors)
    averages, file = thawline_run.read_averages(source.path)
    unknown = sorted(set(averages) - set(tensors))
    if unknown:
        raise CheckpointError(f"keeps averages of what it does not hold: {first_of(unknown)}", where=str(source.path))
    for name, average in averages.items():
        own = tensors[name].info
        info = replace(own, origin=EMA, tied_to=average.info.tied_to)
        tensors[name] = Planned(info=info, parts=average.parts, stored=average.info.dtype)
    plan = replace(
        source.plan,
        tensors=tensors,
        files=(*source.plan.files, file),
        notes=(*source.notes, f"{len(averages)} tensors are averages over the run (EMA)"),
    )
    return Source(source.path, plan, adapters=source.adapters, below=source.below)


def _delta(path: Path, delta: thawline_run.DeltaPlan, base: Path | None, *, look: bool, must: bool) -> Source:
    """A delta over its base, every tensor of the base checked by digest; or, where allowed, the delta alone."""
    below = (*delta.below, delta.fingerprint)
    if base is None:
        recorded = Path(delta.base_path) if look and delta.base_path else None
        if recorded is None or not recorded.exists() or recorded.samefile(path):
            if not must:
                return Source(path, thawline_run.plan_alone(delta), below=below)
            raise _no_base(path, delta)
        base = recorded
    under = _open(base, None, None, None, below=True)
    found = recognised(path, delta, under.plan, under.path)
    copies: dict[str, list[str]] = {}
    for copy, origin in delta.copied.items():
        copies.setdefault(origin, []).append(copy)
    tensors: dict[str, Planned] = {}
    for name, tensor in found.tensors.items():  # in the base's order; a layer that was wrapped stays in its place
        tensors |= {copy: tensor.renamed(copy) for copy in copies.get(name, ())}
        if name not in delta.removed:
            tensors[name] = tensor
    tensors |= delta.tensors
    digests = {**delta.base, **{copy: delta.base[origin] for copy, origin in delta.copied.items()}, **delta.digests}
    tensors = {name: _tied_while_same(name, tensor, digests) for name, tensor in tensors.items()}
    notes = [f"{len(tensors) - len(delta.tensors)} tensors were taken from the base {base}"]
    if found.other:
        notes.append(
            f"{len(found.other)} tensors are not as in the base's files, first: {first_of(found.other)}; what lies "
            "there beside the weights (configuration, units, classes) is not of this model and was left out"
        )
    adapted = {
        path: adapter
        for path, adapter in {**under.adapters, **delta.adapters}.items()
        if f"{path}.base_layer.weight" in tensors
    }
    if not adapted and any(is_adapter(name) and name not in delta.base for name in delta.tensors):
        notes.append("it holds LoRA adapters, and not what they are scaled by: it was written by an older Thawline")
    plan = Plan(
        format="thawline delta over its base",
        tensors=tensors,
        files=(delta.file, *under.plan.files),
        notes=tuple(notes),
        sidecars={} if found.other else under.sidecars,
        config=None if found.other else under.config,
    )
    return Source(path, plan, adapters=adapted, below=below)


def _tied_while_same(name: str, tensor: Planned, digests: Mapping[str, str]) -> Planned:
    """The tensor; no longer tied, where only one of the two was changed."""
    kept = tensor.info.tied_to
    return tensor if kept is None or digests[name] == digests.get(kept) else tensor.renamed(name, tied_to=None)


def _no_base(path: Path, delta: thawline_run.DeltaPlan) -> CheckpointError:
    return CheckpointError(
        f"is a delta over a base that is not given; it was {delta.base_path or 'not recorded'} "
        f"(fingerprint {delta.fingerprint[:16]})",
        where=str(path),
        fix="give the base (--base); where this is itself a base, first make it whole over its own: "
        f"thawline convert {path} FULL --to safetensors --base BASE",
    )


def made_by_builder(wanted: Mapping[str, str], path: Path | str) -> tuple[str, ...]:
    """Names of a model that was built from the files at `path`, which are not in those files as they are in the model.

    wanted: the model's digests, by name. None is made where the files are no checkpoint of one place, or all are spelt
    otherwise there.
    """
    try:
        with open_source(path, below=True) as source:
            have = dict(source.plan.tensors)
            if not set(wanted) <= set(have):
                have |= respelt(wanted, have)
            found, _ = matched(wanted, have)
            return tuple(sorted(set(wanted) - set(found))) if found else ()
    except CheckpointError:
        return ()
