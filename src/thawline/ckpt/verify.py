"""Whether a checkpoint is whole: every byte read, every checksum and digest compared, structure against configuration.

Nothing is changed and nothing is unpickled beyond a fixed list; torch is not imported.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from thawline.ckpt.formats.huggingface import tied_name
from thawline.ckpt.formats.pieces import TensorInfo
from thawline.ckpt.naming import shown
from thawline.ckpt.source import Source, open_source, refuse_absent
from thawline.ckpt.transfer import fetched
from thawline.core.digest import fingerprint
from thawline.errors import CheckpointError

_SHOWN = 20
_LAYER = re.compile(r"(.*?\b(?:layers|h|blocks|block))\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was found.

    problems: what is wrong, one sentence each; empty if the checkpoint is whole
    digests:  name -> digest of each tensor
    """

    path: str
    format: str
    tensors: int
    bytes: int
    dtypes: Mapping[str, int]
    tied: Mapping[str, str]
    fingerprint: str
    seconds: float
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    not_held: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.problems

    def raise_if_broken(self) -> None:
        """Raise CheckpointError with the problems, if there are any."""
        if self.problems:
            raise CheckpointError(
                "; ".join(self.problems), where=self.path, fix="copy it again, or use another checkpoint"
            )

    def to_json(self) -> dict[str, object]:
        """A plain value for machines."""
        return {
            "path": self.path,
            "ok": self.ok,
            "format": self.format,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "dtypes": dict(self.dtypes),
            "tied": dict(self.tied),
            "fingerprint": self.fingerprint,
            "seconds": self.seconds,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "not_held": dict(self.not_held),
        }

    def table(self) -> str:
        """The same for people."""
        rows = [
            ("path", self.path),
            ("format", self.format or "unknown"),
            ("tensors", f"{self.tensors}, {self.bytes:,} bytes"),
            ("element types", ", ".join(f"{dtype} x {count}" for dtype, count in self.dtypes.items())),
            ("tied names", ", ".join(f"{shown(alias)} = {shown(kept)}" for alias, kept in self.tied.items())),
            ("fingerprint", self.fingerprint),
            ("result", "whole" if self.ok else "BROKEN"),
            *(("problem", problem) for problem in self.problems),
            *(("note", note) for note in self.notes),
            *(("not held", f"{shown(name)}: {why}") for name, why in list(self.not_held.items())[:_SHOWN]),
            ("not held", f"and {len(self.not_held) - _SHOWN} more" if len(self.not_held) > _SHOWN else ""),
        ]
        return "\n".join(f"{key:14} {value}" for key, value in rows if value)


def verify(path: Path | str, *, tag: str | None = None, base: Path | str | None = None) -> VerifyReport:
    """Read a checkpoint of any kind whole and say what is wrong with it.

    Damage is reported, not raised; what `open_source` refuses is a problem too. Raises CheckpointError only if the path
    does not exist.
    """
    with fetched(path, tag=tag) as here, nullcontext() if base is None else fetched(base) as under:
        return replace(_verified(here, tag, under), path=str(path))


def _verified(path: Path, tag: str | None, base: Path | None) -> VerifyReport:
    started = time.perf_counter()
    refuse_absent(path)
    try:
        source = open_source(path, tag=tag, base=base, alone=True, apart=True)
    except CheckpointError as exc:
        return VerifyReport(
            path=str(path), format="", tensors=0, bytes=0, dtypes={}, tied={}, fingerprint="",
            seconds=time.perf_counter() - started, problems=(_sentence(exc, path),),
        )  # fmt: skip
    with source:
        digests, problems = digests_of(source)
        problems += structure_problems(source.config, source.infos)
        infos = source.infos
        return VerifyReport(
            path=str(path),
            format=source.format,
            tensors=len(infos),
            bytes=sum(info.nbytes for info in infos),
            dtypes=dict(Counter(info.dtype for info in infos)),
            tied={info.name: info.tied_to for info in infos if info.tied_to is not None},
            fingerprint=fingerprint(digests) if len(digests) == len(infos) else "",
            seconds=time.perf_counter() - started,
            problems=tuple(problems),
            notes=source.notes,
            not_held=source.not_held,
            digests=digests,
        )


def digests_of(source: Source, names: Iterable[str] | None = None) -> tuple[dict[str, str], list[str]]:
    """Digest of each tensor that can be read, and a sentence for each that cannot. On all cores."""
    wanted = list(source.names if names is None else names)

    def one(name: str) -> tuple[str, str, str]:
        try:
            return name, source.digest(name), ""
        except CheckpointError as exc:
            return name, "", _sentence(exc, source.path)

    with ThreadPoolExecutor(cores()) as pool:
        results = list(pool.map(one, wanted))
    problems = list(dict.fromkeys(problem for _, _, problem in results if problem))
    return {name: digest for name, digest, problem in results if not problem}, problems


def structure_problems(config: Mapping[str, object] | None, infos: Sequence[TensorInfo]) -> list[str]:
    """What in the tensors contradicts a Hugging Face configuration; only what is certain is looked at."""
    if config is None:
        return []
    shapes = {info.name: info.shape for info in infos}
    problems = []
    vocabulary = config.get("vocab_size")
    width = config.get("hidden_size", config.get("d_model", config.get("n_embd")))
    for name in ("model.embed_tokens.weight", "model.decoder.embed_tokens.weight", "transformer.wte.weight"):
        known = isinstance(vocabulary, int) and isinstance(width, int)
        if known and name in shapes and shapes[name] != (vocabulary, width):
            problems.append(f"{name!r} has shape {shapes[name]}, the configuration says {(vocabulary, width)}")
    for prefix, key in (
        ("model.layers", "num_hidden_layers"),
        ("model.encoder.layers", "encoder_layers"),
        ("model.decoder.layers", "decoder_layers"),
    ):
        wanted = config.get(key)
        have = {int(m[2]) for name in shapes if (m := _LAYER.match(name)) and m[1] == prefix}
        if have and isinstance(wanted, int) and have != set(range(wanted)):
            problems.append(f"{prefix} has {len(have)} layers, the configuration says {wanted} ({key})")
    tied = tied_name(config)
    if tied is not None and tied[1] in shapes and tied[0] in shapes and shapes[tied[0]] != shapes[tied[1]]:
        problems.append(f"{tied[0]!r} is tied to {tied[1]!r}, but their shapes differ")
    return problems


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _sentence(exc: CheckpointError, path: Path) -> str:
    return exc.what if exc.where in ("", str(path)) else f"{exc.where}: {exc.what}"
