"""Any checkpoint in, one verified file (or folder) out, in bounded memory.

The target's layout is computed from metadata alone, then all cores copy tensors straight from the source's memory maps
to their places, hashing what they write. Before the result gets its name it is read again and every digest compared.
The source is only read. Torch is not imported.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Final

from thawline.ckpt import targets, whisper_files
from thawline.ckpt.engine import Engine, Job, Work, same_values
from thawline.ckpt.formats import whisper_names
from thawline.ckpt.formats.casting import FLOATING
from thawline.ckpt.formats.pieces import Planned, chunks
from thawline.ckpt.naming import shown
from thawline.ckpt.remote import is_url, local_path
from thawline.ckpt.rename import Rename, renamed
from thawline.ckpt.source import Source, open_source
from thawline.ckpt.transfer import fetched, sent
from thawline.core.digest import fingerprint
from thawline.core.index import is_adapter
from thawline.errors import CheckpointError, RecipeError

TARGETS: Final = ("safetensors", "torch", "wenet", "whisper", "hf", "videochat2", "delta")

DTYPES: Final[Mapping[str, str]] = {
    "fp64": "F64", "float64": "F64", "double": "F64", "f64": "F64", "fp32": "F32", "float32": "F32", "float": "F32",
    "f32": "F32", "fp16": "F16", "float16": "F16", "half": "F16", "f16": "F16", "bf16": "BF16", "bfloat16": "BF16",
}  # fmt: skip
"""What `dtype` may be called."""

_DEFAULT_MEMORY: Final = 48 << 20
_SHARD_BYTES: Final = 5_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport:
    """What was done.

    tensors, bytes: of the target; tied names count each time they can be read
    dtype_changes:  name -> "BF16 -> F32"
    origins:        name -> where its values came from (master weights, module, frozen fragment, base, ...)
    tied:           name -> the name it is tied to
    dropped:        names of the source that the target has no place for
    not_held:       names that the source mentions and cannot give, with the reason
    verified:       every tensor of the target was read again and had the digest of what was streamed
    digests, fingerprint: of the target's tensors
    """

    source: str
    source_format: str
    target: str
    to: str
    files: tuple[str, ...]
    tensors: int
    bytes: int
    seconds: float
    verified: bool
    dtypes: Mapping[str, int]
    dtype_changes: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    not_held: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)
    fingerprint: str = ""

    def to_json(self) -> dict[str, object]:
        """A plain value for machines."""
        return {
            "source": self.source,
            "source_format": self.source_format,
            "target": self.target,
            "to": self.to,
            "files": list(self.files),
            "tensors": self.tensors,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "verified": self.verified,
            "dtypes": dict(self.dtypes),
            "dtype_changes": dict(self.dtype_changes),
            "origins": dict(self.origins),
            "tied": dict(self.tied),
            "dropped": list(self.dropped),
            "not_held": dict(self.not_held),
            "notes": list(self.notes),
            "fingerprint": self.fingerprint,
        }

    def table(self) -> str:
        """The same for people."""
        changes = Counter(self.dtype_changes.values())
        rows = [
            ("source", f"{self.source} ({self.source_format})"),
            ("target", f"{self.target} ({self.to})"),
            ("tensors", f"{self.tensors}, {self.bytes:,} bytes"),
            ("values from", ", ".join(f"{origin}: {n}" for origin, n in Counter(self.origins.values()).items())),
            ("element types", ", ".join(f"{dtype} x {count}" for dtype, count in self.dtypes.items())),
            ("changed", ", ".join(f"{change}: {count}" for change, count in changes.items())),
            ("tied names", ", ".join(f"{shown(alias)} = {shown(kept)}" for alias, kept in self.tied.items())),
            ("fingerprint", self.fingerprint),
            ("verified", "read again, every digest equal" if self.verified else "no"),
            ("seconds", f"{self.seconds:.2f}"),
            *(("left out", shown(name)) for name in self.dropped[:20]),
            *(("not held", f"{shown(name)}: {why}") for name, why in list(self.not_held.items())[:20]),
            *(("note", note) for note in self.notes),
        ]
        return "\n".join(f"{key:14} {value}" for key, value in rows if value)


def convert(
    src: Path | str,
    dst: Path | str,
    *,
    to: str,
    dtype: str | None = None,
    base: Path | str | None = None,
    only: str | None = None,
    rename: Rename | None = None,
    force: bool = False,
    max_memory: int | None = None,
    tag: str | None = None,
    max_shard_bytes: int = _SHARD_BYTES,
) -> ConversionReport:
    """Write the weights of any checkpoint as one verified file, or folder for "hf". Places may be URLs (s3://...).

    to:     "safetensors"; "torch" and "wenet": a `.pt` that holds a flat state dict; "whisper": OpenAI's `.pt`;
            "videochat2": Ask-Anything's `.pth`, which is a state dict under the key "model"; "hf": a folder of
            safetensors and configuration; "delta": what differs from `base`. Whisper weights are respelt for
            "wenet", "whisper" and "hf". For "wenet" a DST without a suffix becomes a model directory.
    dtype:  element type of all floating tensors ("fp32", "bf16", ...); None: as in the source, except that a training
            checkpoint's half-precision tensors become fp32, which is exact
    base:   what the source leaves out is taken from here; for "delta" what to subtract
    only:   "weights" as trained, or "ema"; None: what the checkpoint is for (of a finished run its result)
    rename: a table of names (`thawline.ckpt.rename`)
    force:  replace an existing DST
    max_memory: bytes for buffers, by default 48 MB, whatever the size of the checkpoint
    tag:    which checkpoint of a folder that has several

    Raises CheckpointError (what, where, fix), or RecipeError for arguments that cannot be meant, then leaving nothing
    under DST; the source is never changed.
    """
    started = time.perf_counter()
    _refuse_target(to)
    refuse_places(src, dst, base=base, force=force)
    with ExitStack() as places:
        here = places.enter_context(fetched(src, tag=tag, result=only is None and base is None))
        under = None if base is None else places.enter_context(fetched(base))
        there = places.enter_context(sent(dst, force=force))
        with open_source(here, tag=tag, only=only, base=None if to == "delta" else under) as source:
            report = write(
                source, there, to=to, dtype=dtype, base=under, base_label=str(base or ""), rename=rename, force=force,
                max_memory=max_memory, max_shard_bytes=max_shard_bytes,
            )  # fmt: skip
    files = tuple(file.replace(str(there), str(dst), 1) for file in report.files)
    seconds = time.perf_counter() - started
    return replace(report, source=str(src), target=str(dst), files=files, seconds=seconds)


def write(
    source: Source,
    dst: Path,
    *,
    to: str,
    dtype: str | None = None,
    base: Path | None = None,
    base_label: str = "",
    rename: Rename | None = None,
    force: bool = False,
    max_memory: int | None = None,
    max_shard_bytes: int = _SHARD_BYTES,
) -> ConversionReport:
    """Write the tensors of an opened source; arguments as for `convert`.

    base: for "delta": what to subtract; base_label: how the delta is to call it
    """
    started = time.perf_counter()
    _refuse_target(to)
    _refuse_bare_delta(source, to)
    _refuse_unmerged(source, to)
    work = _prepare(source, to, None if dtype is None else _dtype(dtype), rename)
    engine = Engine(work, max_memory or _DEFAULT_MEMORY)
    if to == "safetensors":
        files = targets.to_safetensors(engine, dst, force)
    elif to == "hf":
        files = targets.to_huggingface(engine, dst, force, max_shard_bytes)
    elif to == "delta":
        if base is None:
            raise RecipeError("a delta needs what it is a difference from", fix="give --base")
        files = targets.to_delta(engine, dst, force, base, base_label or str(base))
    else:
        files = targets.to_torch(engine, dst, force, to)
    infos = [job.info for job in work.jobs.values() if job.info.name in engine.digests]
    return ConversionReport(
        source=str(source.path),
        source_format=source.format,
        target=str(dst),
        to=to,
        files=tuple(str(file) for file in files),
        tensors=len(infos),
        bytes=sum(info.nbytes for info in infos),
        seconds=time.perf_counter() - started,
        verified=engine.verified,
        dtypes=dict(Counter(info.dtype for info in infos)),
        dtype_changes={
            job.info.name: f"{job.tensor.info.dtype} -> {job.info.dtype}"
            for job in work.jobs.values()
            if job.tensor.info.dtype != job.info.dtype
        },
        origins={info.name: info.origin for info in infos},
        tied={info.name: info.tied_to for info in infos if info.tied_to is not None},
        dropped=work.dropped,
        not_held=source.not_held,
        notes=(*source.notes, *work.notes),
        digests=dict(engine.digests),
        fingerprint=fingerprint(engine.digests),
    )


# --- what to write ---


def _prepare(source: Source, to: str, dtype: str | None, rename: Rename | None) -> Work:
    tensors = renamed(dict(source.plan.tensors), rename, str(source.path))
    spelling = whisper_names.spelling(tensors)
    target = {"whisper": "openai", "hf": "huggingface", "wenet": "wenet"}.get(to)
    dropped: tuple[str, ...] = ()
    notes: list[str] = []
    if to == "whisper" and spelling is None:
        raise CheckpointError(
            "is no Whisper: its names are none of OpenAI's, WeNet's and Hugging Face's",
            where=str(source.path),
            fix="choose another target",
        )
    if spelling is not None and target is not None and spelling != target:
        dropped = _droppable(tensors, spelling, target, source)
        tensors = whisper_names.respell(tensors, spelling, target)
        notes.append(f"Whisper names respelt from {spelling} to {target}")
    jobs = {}
    for name, tensor in tensors.items():
        have = tensor.info.dtype
        want = have
        if have in FLOATING and dtype is not None:
            want = dtype
        elif source.plan.widen and have in ("F16", "BF16"):
            want = "F32"
        jobs[name] = Job(tensor, replace(tensor.info, dtype=want))
    # An alias must be in the target for a tie to mean anything there.
    for name, job in jobs.items():
        if job.info.tied_to is not None and job.info.tied_to not in jobs:
            jobs[name] = Job(job.tensor, replace(job.info, tied_to=None))
    companions: Mapping[str, bytes] = {}
    if to == "wenet" and "train.yaml" not in source.sidecars:
        companions = whisper_files.wenet_files(source, jobs)
        if not companions:
            notes.append("no train.yaml lies beside the source; WeNet needs one to load the weights")
    return Work(source, jobs, dropped, tuple(notes), companions)


def _droppable(tensors: dict[str, Planned], spelling: str, target: str, source: Source) -> tuple[str, ...]:
    """Names the target's spelling has no place for. Raises CheckpointError if leaving one out changes the model."""
    embedding = tensors[whisper_names.EMBEDDING[spelling]]
    kept = []
    for name in whisper_names.without(tensors, spelling, target):
        tensor = tensors[name]
        if name == whisper_names.TIED.get(spelling):
            if not same_values(tensor, embedding):
                raise CheckpointError(
                    f"{name!r} is not the embedding any more, which {target} cannot hold",
                    where=str(source.path),
                    fix="write safetensors or WeNet's own format",
                )
        elif name == whisper_names.OUTPUT_BIAS:
            if any(bytes(chunk).strip(b"\0") for chunk in chunks(tensor)):
                raise CheckpointError(
                    f"{name!r} is not zero, and {target} has no output bias",
                    where=str(source.path),
                    fix="write WeNet's own format, or keep the bias at zero when training (freeze it)",
                )
        elif name in whisper_names.WENET_HEAD:
            kept.append(name)
        else:
            raise CheckpointError(
                f"tensor {name!r} has no counterpart in {target}'s Whisper",
                where=str(source.path),
                fix="write safetensors, or merge adapters before",
            )
    return tuple(kept)


# --- refusals ---


def _dtype(name: str) -> str:
    found = DTYPES.get(name.lower().removeprefix("torch."))
    if found is None:
        raise RecipeError(f"{name!r} is no element type to convert to", fix="choose fp32, bf16, fp16 or fp64")
    return found


def _refuse_target(to: str) -> None:
    if to not in TARGETS:
        raise RecipeError(f"{to!r} is no target", fix=f"choose one of: {', '.join(TARGETS)}")


def refuse_places(src: Path | str, dst: Path | str, *, base: Path | str | None = None, force: bool = False) -> None:
    """Raise CheckpointError if `dst` exists and may not be replaced, or lies on, in or around what is only read."""
    for path in [src, *([base] if base is not None else [])]:
        if is_url(path) != is_url(dst):
            continue
        own, target = _absolute(path), _absolute(dst)
        if target == own:
            raise CheckpointError("would replace what it is made from", where=str(dst), fix="choose another DST")
        if target.is_relative_to(own) and (is_url(dst) or Path(own).is_dir()):
            raise CheckpointError(
                f"lies inside {path}, which is only read", where=str(dst), fix="choose a DST beside or elsewhere"
            )
        if own.is_relative_to(target):
            raise CheckpointError(f"contains {path}, which must stay", where=str(dst), fix="choose another DST")
    if not is_url(dst) and os.path.lexists(local_path(dst)) and not force:
        raise CheckpointError(
            "exists already", where=str(dst), fix="choose another name, or say that it may be replaced (--force)"
        )


def _absolute(place: Path | str) -> PurePosixPath:
    return PurePosixPath(str(place)) if is_url(place) else PurePosixPath(os.path.realpath(local_path(place)))


def _refuse_unmerged(source: Source, to: str) -> None:
    if to in ("safetensors", "torch", "delta"):
        return
    if source.format.startswith("thawline delta") and any(map(is_adapter, source.names)):
        raise CheckpointError(
            f"holds LoRA adapters beside the weights that they change, which {to} has no place for",
            where=str(source.path),
            fix="a delta of an older Thawline does not say how to add them: export its run (thawline export RUN DST)",
        )
    if source.format == "peft adapter":
        raise CheckpointError(
            "is an adapter: what it is added to is in its base", where=str(source.path), fix="give the base (--base)"
        )


def _refuse_bare_delta(source: Source, to: str) -> None:
    if source.format == "thawline delta" and source.not_held and to != "delta":
        raise CheckpointError(
            f"is a delta: {len(source.not_held)} tensors are in its base only",
            where=str(source.path),
            fix="give the base (--base)",
        )
