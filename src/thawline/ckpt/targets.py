"""Writing a set of tensors in each target's form: laid out from metadata, streamed on all cores, read again.

The `to_*` functions know a target each and end with the files they made; `Engine` copies and compares for them. What to
write (names, element types, what is left out) was decided before, in `convert`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from blake3 import blake3

from thawline.ckpt import store, whisper_files
from thawline.ckpt.engine import Engine, Job, Work, run_all, same_values, unlike
from thawline.ckpt.formats import huggingface, safetensors_header, thawline_run, torch_layout
from thawline.ckpt.formats.mapped import MappedFile
from thawline.ckpt.formats.pieces import Planned
from thawline.ckpt.formats.torch_archive import open_archive
from thawline.ckpt.remote import is_url
from thawline.ckpt.source import open_source
from thawline.ckpt.tensor_digest import digest_of
from thawline.ckpt.verify import structure_problems
from thawline.core.digest import fingerprint
from thawline.errors import CheckpointError

_DIGEST_LENGTH: Final = 64


def _safetensors_into(
    engine: Engine,
    file: store.Direct,
    names: Sequence[str],
    extra: Mapping[str, str],
    path: Path,
    *,
    digests: bool = True,
) -> None:
    """Write one safetensors file and compare it; `path` is for messages."""
    infos = [engine.work.jobs[name].info for name in names]
    ties = {info.name: info.tied_to for info in infos if info.tied_to is not None and info.tied_to in names}
    metadata = {"format": "pt", **extra}
    if ties:
        metadata["thawline.tied"] = json.dumps(ties, separators=(",", ":"), ensure_ascii=False)
    if digests:
        # Digests have one length, so the header's size is known before they are.
        metadata[safetensors_header.DIGESTS] = _json(dict.fromkeys(names, "0" * _DIGEST_LENGTH))
    _, places = safetensors_header.make_header(infos, metadata)
    engine.copy(file, places)
    if digests:
        metadata[safetensors_header.DIGESTS] = _json({name: engine.digests[name] for name in names})
    head, _ = safetensors_header.make_header(infos, metadata)
    file.write_at(memoryview(head), 0)
    written = MappedFile(path, file.descriptor)
    try:
        found, stated = safetensors_header.read_header(written)
        if set(found) != set(names) or stated != metadata:
            raise unlike(min(set(found) ^ set(names), default="(header)"), "another header", path)
        engine.compare(found, path, file)
    finally:
        written.close()


def to_safetensors(engine: Engine, dst: Path, force: bool) -> list[Path]:
    names = list(engine.work.jobs)
    need = sum(job.info.nbytes for job in engine.work.jobs.values())
    with store.atomic_file(dst, force=force, need_bytes=need) as file:
        _safetensors_into(engine, store.Direct.of(file), names, {}, dst)
        engine.finish(names, dst)
    return [dst]


def to_torch(engine: Engine, dst: Path, force: bool, to: str) -> list[Path]:
    work = engine.work
    dims = whisper_files.dims_of(work) if to == "whisper" else None
    as_folder = to == "wenet" and dst.suffix == ""
    key = {"whisper": "model_state_dict", "videochat2": "model"}.get(to, "")
    layout = torch_layout.lay_out([job.info for job in work.jobs.values()], key=key, dims=dims)
    if as_folder:
        with store.atomic_dir(dst, force=force, need_bytes=layout.size) as folder:
            with store.new_file(folder / "final.pt") as file:
                _torch_into(engine, file, layout, dst / "final.pt", key=key)
            carried = _carry(work.source.sidecars, folder, dst)
            for name, content in work.companions.items():
                store.write_file(folder / name, [content])
            return [dst / "final.pt", *carried, *(dst / name for name in work.companions)]
    sidecar = _configuration(work) if to == "wenet" else None
    beside = dst.with_suffix(".yaml")
    if sidecar is not None and os.path.lexists(beside) and not force:
        raise CheckpointError("exists already", where=str(beside), fix="choose another name, or --force")
    with store.atomic_file(dst, force=force, need_bytes=layout.size) as file:
        _torch_into(engine, store.Direct.of(file), layout, dst, key=key)
        if sidecar is not None:
            # Before the weights get their name: whoever sees the weights finds the configuration.
            with store.atomic_file(beside, force=force) as configuration:
                configuration.write(sidecar)
    return [dst, beside] if sidecar is not None else [dst]


def _configuration(work: Work) -> bytes | None:
    """WeNet's train.yaml, as it lies beside the source or as it was made."""
    path = work.source.sidecars.get("train.yaml")
    return path.read_bytes() if path is not None else work.companions.get("train.yaml")


def _torch_into(engine: Engine, file: store.Direct, layout: torch_layout.TorchLayout, path: Path, *, key: str) -> None:
    """Write one torch file and compare it; `path` is for messages."""
    engine.copy(file, {name: begin for name, (_, begin) in layout.places.items()}, checksums=True)
    checksums = {}
    for name, (number, _) in layout.places.items():
        if name in engine.checksums:
            checksums[number] = engine.checksums[name]
    for offset, data in layout.headers(checksums):
        file.write_at(memoryview(data), offset)
    file.write_at(memoryview(layout.directory(checksums)), layout.size)
    archive = open_archive(path, MappedFile(path, file.descriptor))
    try:
        state = archive.value[key] if key else archive.value
        found = archive.plan_state_dict(state)
        engine.compare(found, path, file)
        engine.finish(found, path)
    finally:
        archive.file.close()


def to_huggingface(engine: Engine, dst: Path, force: bool, shard_bytes: int) -> list[Path]:
    work = engine.work
    config = whisper_files.huggingface_config(work)
    tied = huggingface.tied_name(config) if config is not None else None
    names = [name for name in work.jobs if tied is None or name != tied[0] or tied[1] not in work.jobs]
    if len(names) < len(work.jobs) and tied is not None:
        alias, kept = work.jobs[tied[0]], work.jobs[tied[1]]
        if not same_values(alias.tensor, kept.tensor):
            raise CheckpointError(
                f"the configuration ties {tied[0]!r} to {tied[1]!r}, but their values differ",
                where=str(work.source.path),
                fix='set "tie_word_embeddings": false in config.json',
            )
    problems = structure_problems(config, [job.info for job in work.jobs.values()])
    if problems:
        raise CheckpointError("; ".join(problems), where=str(work.source.path), fix="correct config.json")
    shards = _shards(work, names, shard_bytes)
    total = sum(work.jobs[name].info.nbytes for name in names)
    with store.atomic_dir(dst, force=force, need_bytes=total) as folder:
        files = []
        for shard, members in shards.items():
            with store.new_file(folder / shard) as file:
                _safetensors_into(engine, file, members, {}, dst / shard)
            files.append(dst / shard)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": total},
                "weight_map": {name: shard for shard, members in shards.items() for name in members},
            }
            text = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
            store.write_file(folder / "model.safetensors.index.json", [text.encode()])
            files.append(dst / "model.safetensors.index.json")
        sidecars = {name: path for name, path in work.source.sidecars.items() if name in huggingface.SIDECARS}
        if config is not None:
            store.write_file(folder / "config.json", [(json.dumps(config, indent=2, sort_keys=True) + "\n").encode()])
            files.append(dst / "config.json")
            sidecars.pop("config.json", None)
        files += _carry(sidecars, folder, dst)
        engine.finish(names, dst)
        if tied is not None and len(names) < len(work.jobs):
            # Not stored, but every reader gives it: it counts as a tensor of the result.
            engine.digests[tied[0]] = engine.digests[tied[1]]
    return files


def _shards(work: Work, names: Sequence[str], limit: int) -> dict[str, list[str]]:
    groups: list[list[str]] = [[]]
    size = 0
    for name in names:
        nbytes = work.jobs[name].info.nbytes
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def to_delta(engine: Engine, dst: Path, force: bool, base: Path, label: str) -> list[Path]:
    """What differs from a base, in the form that `ckpt.delta` reads."""
    work = engine.work
    if work.source.format == thawline_run.ALONE:
        raise CheckpointError(
            "is itself a delta, and what it was made over is not there",
            where=str(work.source.path),
            fix=f"make it whole first: thawline convert {work.source.path} FULL --to safetensors --base BASE",
        )
    with open_source(base, below=True) as under:
        base_digests = _digests(under.plan.tensors, engine)
        mine = {
            name: replace(job.tensor, info=job.info, stored=job.tensor.info.dtype) for name, job in work.jobs.items()
        }
        digests = _digests(mine, engine)
        if not set(digests) & set(base_digests):
            raise CheckpointError(
                f"shares no tensor name with the base {base}",
                where=str(work.source.path),
                fix="give the base it was trained from, or a table of names (--rename)",
            )
        # A source that leaves frozen tensors out does not thereby remove them.
        complete = not work.source.not_held
        by_digest = {value: name for name, value in sorted(base_digests.items(), reverse=True)}
        copied = {n: by_digest[d] for n, d in digests.items() if n not in base_digests and d in by_digest}
        changed = {n: d for n, d in digests.items() if base_digests.get(n) != d and n not in copied}
        removed = sorted(set(base_digests) - set(digests)) if complete else []
        # A reader of the delta gives an alias the other's bytes, so what the source says of ties has to be true.
        tied = {name: work.jobs[name].info.tied_to for name in changed}
        aliases = {name: kept for name, kept in tied.items() if kept in changed and digests[name] == digests[kept]}
        stored = [name for name in changed if name not in aliases]
        result = {n: d for n, d in base_digests.items() if n not in removed} | {
            n: digests[n] for n in (*copied, *changed)
        }
        reference = {
            "fingerprint": fingerprint(base_digests),
            "path": label if is_url(label) else os.path.abspath(label),
            "below": list(under.below),
            "digests": dict(sorted(base_digests.items())),
        }
        metadata = {
            "format": "pt",
            "thawline": thawline_run.KIND,
            "base": _json(reference),
            "result": fingerprint(result),
            "digests": _json(dict(sorted(changed.items()))),
            "aliases": _json(aliases),
            "copied": _json(dict(sorted(copied.items()))),
            "removed": _json(removed),
            "merged": "null",
        }
        metadata["check"] = str(blake3(json.dumps(dict(sorted(metadata.items()))).encode()).hexdigest())
        for name in stored:
            job = work.jobs[name]
            work.jobs[name] = Job(job.tensor, replace(job.info, tied_to=None))
        with store.atomic_file(dst, force=force) as file:
            _safetensors_into(engine, store.Direct.of(file), stored, metadata, dst, digests=False)
            engine.finish(stored, dst)
            for alias, kept in aliases.items():
                assert kept is not None
                engine.digests[alias] = engine.digests[kept]
    return [dst]


def _digests(tensors: Mapping[str, Planned], engine: Engine) -> dict[str, str]:
    found: dict[str, str] = {}

    def one(name: str) -> None:
        found[name] = digest_of(tensors[name], engine.chunk)

    run_all(engine.workers, [(one, (name,)) for name in tensors])
    return found


def _carry(sidecars: Mapping[str, Path], folder: Path, dst: Path) -> list[Path]:
    for name, path in sidecars.items():
        store.write_file(folder / name, [path.read_bytes()])
    return [dst / name for name in sidecars]


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
