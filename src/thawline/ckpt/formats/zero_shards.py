"""The files of a DeepSpeed checkpoint: which folder is meant, its shards opened, and whether they belong together.

Shards that are incomplete, or of different runs, steps or world sizes, are refused. What they hold is put together in
`zero`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from thawline.ckpt.formats.mapped import inside
from thawline.ckpt.formats.pickle_names import Inert
from thawline.ckpt.formats.torch_archive import TorchArchive, open_archive
from thawline.errors import CheckpointError

_MAX_RANKS: Final = 1 << 20

_OPTIM = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OTHER_PARALLEL = re.compile(r"(?:layer_\d+-model_|expert_\d+_|layer_\d+_expert_).*\.pt")


# --- which folder ---


def is_tag(folder: Path) -> bool:
    try:
        return any(_MODEL.fullmatch(entry.name) for entry in folder.iterdir())
    except OSError:
        return False


def tags_of(path: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and is_tag(entry))
    except OSError:
        return []


def choose(path: Path, tag: str | None) -> tuple[Path, list[str]]:
    if tag is None and is_tag(path):
        return path, []
    tags = tags_of(path)
    listed = ", ".join(tags) or "none"
    if tag is not None:
        if tag not in tags:
            raise CheckpointError(f"has no checkpoint {tag!r}", where=str(path), fix=f"choose one of: {listed}")
        return inside(path, tag), []
    latest = path / "latest"
    if latest.is_file():
        with open(latest, "rb") as file:
            named = file.read(4096).decode("utf-8", "replace").strip()
        if named in ("", ".", "..") or "/" in named or "\\" in named or "\0" in named:
            raise CheckpointError(
                f"the file 'latest' does not name a folder: {named!r}", where=str(path), fix=f"ask for a tag: {listed}"
            )
        folder = inside(path, named)
        if named in tags:
            return folder, []
        raise CheckpointError(
            f"the file 'latest' names {named!r}, which is not there", where=str(path), fix=f"ask for a tag: {listed}"
        )
    if len(tags) == 1:
        return inside(path, tags[0]), [f"the file 'latest' is missing; there is one checkpoint, {tags[0]!r}"]
    raise CheckpointError(
        "the file 'latest' is missing and several checkpoints are there"
        if tags
        else "no DeepSpeed checkpoint is in this folder",
        where=str(path),
        fix=f"ask for a tag: {listed}",
    )


def sidecars(folder: Path) -> dict[str, Path]:
    """The configuration that WeNet writes beside a DeepSpeed folder: EXP/TAG.yaml or EXP/train.yaml."""
    for candidate in (folder.parent / f"{folder.name}.yaml", folder.parent / "train.yaml"):
        if candidate.is_file():
            return {"train.yaml": candidate}
    return {}


# --- the shards ---


@dataclass(frozen=True, slots=True)
class Shards:
    folder: Path
    model: tuple[TorchArchive, ...]
    optim: tuple[TorchArchive, ...]
    stage: int
    universal: Mapping[str, TorchArchive]

    @property
    def world(self) -> int:
        """Number of ranks that wrote the checkpoint."""
        value = self.state("dp_world_size")
        if value is None:
            return max(len(self.optim), 1)
        if type(value) is not int or not 1 <= value <= _MAX_RANKS:
            raise self.bad(f"states {value!r} ranks", self.model[0].file.path)
        return value

    def archives(self) -> tuple[TorchArchive, ...]:
        return (*self.model, *self.optim, *self.universal.values())

    def state(self, key: str) -> Any:
        """An entry of rank 0's model states."""
        return self.model[0].value.get(key)

    def optimizer(self, rank: int) -> Mapping[str, Any]:
        state = self.optim[rank].value.get("optimizer_state_dict")
        if not isinstance(state, dict):
            raise self.bad("has no optimizer state", self.optim[rank].file.path)
        return state

    def bad(self, what: str, path: Path | None = None, fix: str = "") -> CheckpointError:
        return CheckpointError(
            what,
            where=str(path or self.folder),
            fix=fix or "use another checkpoint; the training run itself goes on from its own files",
        )

    @classmethod
    def open(cls, folder: Path) -> Shards:
        model, optim, others = _listing(folder)
        if others:
            raise CheckpointError(
                f"holds model-parallel or mixture-of-experts files ({others[0]}), which are not supported",
                where=str(folder),
                fix="merge them with the tools of the framework that wrote them",
            )
        if not model:
            raise CheckpointError("has no model states", where=str(folder), fix="copy the folder again")
        models = tuple(_open_shard(folder, model[rank]) for rank in sorted(model))
        optims = tuple(_open_shard(folder, optim[rank]) for rank in sorted(optim))
        universal = {} if optim else _open_universal(folder)
        per_rank = any(name.startswith("zero_pp_rank_") for name in model.values())
        stage = (3 if per_rank else 2) if universal else _stage(models[0], optims)
        shards = cls(folder, models, optims, stage, universal)
        shards._check(sorted(model), sorted(optim))
        return shards

    def _check(self, model_ranks: Sequence[int], optim_ranks: Sequence[int]) -> None:
        """Refuse shards that are incomplete or do not belong together."""
        world = self.world
        wanted = list(range(world))
        if self.stage > 0 and not self.universal and list(optim_ranks) != wanted:
            raise self.bad(
                f"was written by {world} ranks; optimizer shards (*_optim_states.pt) are there of "
                f"{_ranks(optim_ranks)}{_missing(wanted, optim_ranks)}",
                fix="bring the missing shards back; without them the masters are not whole",
            )
        if self.stage == 3 and list(model_ranks) != wanted:
            raise self.bad(
                f"was written by {world} ranks; model shards (*_model_states.pt) are there of "
                f"{_ranks(model_ranks)}{_missing(wanted, model_ranks)}",
                fix="bring the missing shards back; without them frozen parameters are not whole",
            )
        if self.state("mp_world_size") not in (None, 1):
            raise self.bad(
                f"was written with {self.state('mp_world_size')} model-parallel ranks, which is not supported"
            )
        for key in ("param_shapes", "frozen_param_shapes", "global_steps", "dp_world_size", "ds_version"):
            for archive in self.model[1:]:
                mine, theirs = _plain(archive.value.get(key)), _plain(self.state(key))
                if mine and theirs and mine != theirs:  # some versions fill in only rank 0's
                    raise self.bad(
                        f"does not belong to the same run as {self.model[0].file.path.name}: {key} differs",
                        archive.file.path,
                    )
        for rank, archive in enumerate(self.optim):
            self._check_optimizer(rank, archive.file.path)

    def _check_optimizer(self, rank: int, path: Path) -> None:
        first, state = self.optimizer(0), self.optimizer(rank)
        other = f"does not belong to the same run as {self.optim[0].file.path.name}"
        counts = state.get("partition_count")
        listed = counts if isinstance(counts, list) else [counts]
        if any(count != self.world for count in listed if count is not None):
            raise self.bad(f"states partition counts {counts}, the checkpoint has {self.world} ranks", path)
        if _enum(state.get("zero_stage")) != _enum(first.get("zero_stage")):
            raise self.bad(f"{other}: the ZeRO stage differs", path)
        for archive, what in ((self.optim[0], "ds_version"), (self.optim[0], "ds_config")):
            if _plain(self.optim[rank].value.get(what)) != _plain(archive.value.get(what)):
                raise self.bad(f"{other}: {what} differs", path)
        for group in state.get("ds_zero_partition_groups") or ():
            if not isinstance(group, dict) or group.get("partition_count", self.world) != self.world:
                raise self.bad("is partitioned differently per group, which is not supported", path)
        mine, theirs = list(self.steps(rank)), list(self.steps(0))
        if mine != theirs:
            raise self.bad(f"{other}: optimizer steps {_brief(mine)} against {_brief(theirs)}", path)

    def entries(self, rank: int) -> list[Mapping[str, Any]]:
        """The optimizer's state of each flat group on one rank."""
        state = self.optimizer(rank)
        base = state.get("base_optimizer_state") or state.get("optimizer_state_dict")
        entries = base.get("state") if isinstance(base, dict) else base
        values = entries.values() if isinstance(entries, dict) else entries if isinstance(entries, list) else ()
        return [entry for entry in values if isinstance(entry, dict)]

    def steps(self, rank: int) -> Iterator[float | None]:
        """The optimizer's step counters on one rank."""
        for entry in self.entries(rank):
            if "step" in entry:
                yield self.optim[rank].scalar(entry["step"])


def _listing(folder: Path) -> tuple[dict[int, str], dict[int, str], list[str]]:
    model: dict[int, str] = {}
    optim: dict[int, str] = {}
    others: list[str] = []
    for name in sorted(entry.name for entry in folder.iterdir()):
        if match := _OPTIM.fullmatch(name):
            found, rank, parallel = optim, int(match[1]), int(match[2])
        elif match := _MODEL.fullmatch(name):
            found, rank, parallel = model, int(match[1] or 0), int(match[2])
        elif _OTHER_PARALLEL.fullmatch(name):
            others.append(name)
            continue
        else:
            continue
        if parallel:
            others.append(name)
        elif rank in found:
            raise CheckpointError(
                f"has two shards of rank {rank}: {found[rank]} and {name}",
                where=str(folder),
                fix="keep the files of one run only",
            )
        else:
            found[rank] = name
    return model, optim, others


def _open_shard(folder: Path, name: str) -> TorchArchive:
    archive = open_archive(inside(folder, name))
    if not isinstance(archive.value, dict):
        raise CheckpointError("is no DeepSpeed shard", where=archive.where, fix="copy the file again")
    return archive


def _open_universal(folder: Path) -> dict[str, TorchArchive]:
    """The masters of a universal checkpoint by name; empty if it is none."""
    zero = folder / "zero"
    if not zero.is_dir():
        return {}
    names = sorted(entry.name for entry in zero.iterdir() if (entry / "fp32.pt").is_file())
    return {name: open_archive(inside(folder, f"zero/{name}/fp32.pt")) for name in names}


def _stage(model: TorchArchive, optims: Sequence[TorchArchive]) -> int:
    for archive in optims:
        state = archive.value.get("optimizer_state_dict")
        found = _enum(state.get("zero_stage")) if isinstance(state, dict) else None
        if type(found) is int and found in (1, 2, 3):
            return found
        if found is None and isinstance(state, dict) and "single_partition_of_fp32_groups" in state:
            return 1  # runtime/bf16_optimizer.py cuts as stage 1 does, and does not say so
        raise CheckpointError(f"states the ZeRO stage {found!r}", where=archive.where, fix="copy the file again")
    config = model.value.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    stated = zero.get("stage", 0) if isinstance(zero, dict) else 0
    if stated in (1, 2, 3):
        raise CheckpointError(
            f"is a ZeRO-{stated} checkpoint without any optimizer shard, where its full-precision weights are",
            where=str(model.file.path.parent),
            fix="bring the *_optim_states.pt files back",
        )
    return 0


def _enum(value: Any) -> Any:
    return value.args[0] if isinstance(value, Inert) and value.args else value


def _plain(value: Any) -> Any:
    """A value that compares by content: inert objects compare by identity."""
    if isinstance(value, Inert):
        return str(value.name), _plain(list(value.args)), _plain(value.state)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _ranks(ranks: Sequence[int]) -> str:
    return f"ranks {', '.join(map(str, ranks))}" if ranks else "none"


def _missing(wanted: Sequence[int], have: Sequence[int]) -> str:
    missing = sorted(set(wanted) - set(have))
    return f"; rank {', '.join(map(str, missing))} is missing" if missing else ""


def _brief(steps: Sequence[float | None]) -> str:
    return ", ".join(sorted({"unknown" if step is None else f"{step:g}" for step in steps})) or "none"
