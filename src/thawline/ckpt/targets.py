"""Writing a set of tensors in each target's form: laid out from metadata, streamed on all cores, read again.

`Engine` copies and compares; the `to_*` functions know a target each and end with the files they made. What to write
(names, element types, what is left out) was decided before, in `convert`.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from blake3 import blake3

from thawline.ckpt import store
from thawline.ckpt.formats import huggingface, safetensors_header, thawline_run, torch_layout, whisper_names
from thawline.ckpt.formats.casting import FLOATING, cast, is_exact, overflowed
from thawline.ckpt.formats.pieces import MappedFile, Planned, Region, TensorInfo, chunks, regions
from thawline.ckpt.formats.torch_archive import open_archive
from thawline.ckpt.source import Source, digest, open_source
from thawline.ckpt.verify import DIGESTS, cores, structure_problems
from thawline.core.digest import fingerprint
from thawline.errors import CheckpointError

_LARGEST_CHUNK: Final = 1 << 20  # larger ones leave the processor's cache between hashing and writing
_SMALLEST_CHUNK: Final = 64 << 10
_DIGEST_LENGTH: Final = 64


@dataclass(frozen=True, slots=True)
class Job:
    """One tensor of the target: its data, and name, element type and shape as they will be."""

    tensor: Planned
    info: TensorInfo


@dataclass(frozen=True, slots=True)
class Work:
    source: Source
    jobs: dict[str, Job]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]


def same_values(one: Planned, other: Planned) -> bool:
    if one.parts == other.parts:
        return True
    same = one.info.dtype == other.info.dtype and one.info.shape == other.info.shape
    return same and all(a == b for a, b in zip(chunks(one), chunks(other), strict=True))


class Engine:
    """Copies tensors to their places on all cores, and remembers the digest of what it wrote."""

    def __init__(self, work: Work, memory: int) -> None:
        self.work = work
        self.workers = min(cores(), 16)
        # A conversion holds a chunk, its widened copy and a temporary per worker.
        self.chunk = max(min(memory // (self.workers * 6), _LARGEST_CHUNK), _SMALLEST_CHUNK)
        self.digests: dict[str, str] = {}
        self.checksums: dict[str, int] = {}
        self.verified = False
        self._stamps = _stamps(work.source)

    def copy(self, descriptor: int, places: Mapping[str, int], *, checksums: bool = False) -> None:
        """Write each named tensor at its place; tensors at one place are written once.

        Every source region's own checksum is compared meanwhile. The largest tensors go first, so that no core is left
        with one at the end. Raises CheckpointError or OSError of the first failure, after stopping the others.
        """
        # An empty tensor has the place of the one after it without being it.
        spots = {name: (place, "" if self.work.jobs[name].info.nbytes else name) for name, place in places.items()}
        first: dict[tuple[int, str], str] = {}
        for name, spot in spots.items():
            first.setdefault(spot, name)
        names = sorted(first.values(), key=lambda name: -self.work.jobs[name].info.nbytes)
        stretches: dict[int, Region] = {}
        for name in names:
            for region in regions(self.work.jobs[name].tensor):
                stretches[id(region)] = region
        checks = sorted(stretches.values(), key=lambda region: -region.nbytes)

        def one(name: str) -> None:
            self._one(descriptor, places[name], self.work.jobs[name], checksums)

        _all(self.workers, [(region.check, ()) for region in checks] + [(one, (name,)) for name in names])
        for name, spot in spots.items():
            self.digests[name] = self.digests[first[spot]]

    def _one(self, descriptor: int, place: int, job: Job, checksum: bool) -> None:
        have, want = job.tensor.info.dtype, job.info.dtype
        narrows = have != want and not is_exact(have, want)
        hasher = _hasher(job.info)
        crc = lost = 0
        for chunk in chunks(job.tensor, self.chunk):
            data = chunk if have == want else cast(chunk, have, want)
            if narrows:
                lost += overflowed(chunk, have, data, want)
            hasher.update(data)
            if checksum:
                crc = zlib.crc32(data, crc)
            _write_at(descriptor, data, place)
            place += len(data)
        if lost:
            raise CheckpointError(
                f"{lost} values of {job.info.name!r} are too large for {want}",
                where=str(self.work.source.path),
                fix="choose bf16 or fp32",
            )
        self.digests[job.info.name] = str(hasher.hexdigest())
        self.checksums[job.info.name] = crc

    def compare(self, have: Mapping[str, Planned], where: Path) -> None:
        """Read a finished target again. Raises CheckpointError if anything differs from what was streamed."""
        jobs = {name: self.work.jobs[name] for name in self.digests if name in have}

        def one(name: str) -> None:
            found, job = have[name], jobs[name]
            if (found.info.dtype, found.info.shape) != (job.info.dtype, job.info.shape):
                raise _unlike(name, f"{found.info.dtype} {found.info.shape}", where)
            for region in regions(found):
                # The bytes are compared by digest; that the stated CRC-32 is theirs was seen when they were written.
                if region.crc is None or region.crc != self.checksums.get(job.info.tied_to or name):
                    region.check()
            if digest(found.info.dtype, found.info.shape, chunks(found, self.chunk)) != self.digests[name]:
                raise _unlike(name, "other bytes", where)

        _all(self.workers, [(one, (name,)) for name in sorted(jobs, key=lambda name: -jobs[name].info.nbytes)])

    def finish(self, names: Iterable[str], where: Path) -> None:
        """State that all of `names`, and no other, were found in the target, and that the source did not change."""
        found = set(names)
        if found != set(self.digests):
            raise _unlike(min(found ^ set(self.digests)), "missing or unexpected", where)
        _refuse_changed(self._stamps)
        self.verified = True


def _stamps(source: Source) -> dict[Path, tuple[int, int]]:
    found = {}
    for file in source.plan.files:
        info = os.stat(file.path)
        found[file.path] = info.st_size, info.st_mtime_ns
    return found


def _refuse_changed(stamps: Mapping[Path, tuple[int, int]]) -> None:
    for path, stamp in stamps.items():
        info = os.stat(path)
        if (info.st_size, info.st_mtime_ns) != stamp:
            raise CheckpointError(
                "was written to while it was converted", where=str(path), fix="wait for the run, then convert again"
            )


def _all(workers: int, tasks: Sequence[tuple[Callable[..., None], tuple[object, ...]]]) -> None:
    """Run all tasks; on the first failure drop those not begun and raise it."""
    with ThreadPoolExecutor(workers) as pool:
        running: list[Future[None]] = [pool.submit(task, *args) for task, args in tasks]
        try:
            for future in running:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write_at(descriptor: int, data: memoryview, place: int) -> None:
    while len(data):
        taken = os.pwrite(descriptor, data, place)
        data = data[taken:]
        place += taken


def _hasher(info: TensorInfo) -> blake3:
    return blake3(f"{info.dtype}[{','.join(map(str, info.shape))}]".encode() + b"\0")


def _unlike(name: str, found: str, where: Path) -> CheckpointError:
    return CheckpointError(
        f"reading the result again gives {found} for tensor {name!r}; nothing was kept",
        where=str(where),
        fix="the storage may be failing: try another disk",
    )


# --- targets ---


def _safetensors_into(
    engine: Engine,
    descriptor: int,
    names: Sequence[str],
    extra: Mapping[str, str],
    path: Path,
    *,
    digests: bool = True,
) -> None:
    """Write one safetensors file through an open descriptor and compare it."""
    infos = [engine.work.jobs[name].info for name in names]
    ties = {info.name: info.tied_to for info in infos if info.tied_to is not None and info.tied_to in names}
    metadata = {"format": "pt", **extra}
    if ties:
        metadata["thawline.tied"] = json.dumps(ties, separators=(",", ":"), ensure_ascii=False)
    if digests:
        # Digests have one length, so the header's size is known before they are.
        metadata[DIGESTS] = _json(dict.fromkeys(names, "0" * _DIGEST_LENGTH))
    _, places = safetensors_header.make_header(infos, metadata)
    engine.copy(descriptor, places)
    if digests:
        metadata[DIGESTS] = _json({name: engine.digests[name] for name in names})
    head, _ = safetensors_header.make_header(infos, metadata)
    _write_at(descriptor, memoryview(head), 0)
    file = MappedFile(path, descriptor)
    try:
        found, stated = safetensors_header.read_header(file)
        if set(found) != set(names) or stated != metadata:
            raise _unlike(min(set(found) ^ set(names), default="(header)"), "another header", path)
        engine.compare(found, path)
    finally:
        file.close()


def to_safetensors(engine: Engine, dst: Path, force: bool) -> list[Path]:
    names = list(engine.work.jobs)
    need = sum(job.info.nbytes for job in engine.work.jobs.values())
    with store.atomic_file(dst, force=force, need_bytes=need) as file:
        _safetensors_into(engine, file.fileno(), names, {}, dst)
        engine.finish(names, dst)
    return [dst]


def to_torch(engine: Engine, dst: Path, force: bool, to: str) -> list[Path]:
    work = engine.work
    dims = _dims(work) if to == "whisper" else None
    as_folder = to == "wenet" and dst.suffix == ""
    layout = torch_layout.lay_out([job.info for job in work.jobs.values()], dims=dims)
    if as_folder:
        with store.atomic_dir(dst, force=force, need_bytes=layout.size) as folder:
            descriptor = store.SYSTEM.create(folder / "final.pt")
            try:
                _torch_into(engine, descriptor, layout, dst / "final.pt", nested=dims is not None)
            finally:
                os.close(descriptor)
            return [dst / "final.pt", *_carry(work.source.sidecars, folder, dst)]
    sidecar = work.source.sidecars.get("train.yaml") if to == "wenet" else None
    beside = dst.with_suffix(".yaml")
    if sidecar is not None and os.path.lexists(beside) and not force:
        raise CheckpointError("exists already", where=str(beside), fix="choose another name, or --force")
    with store.atomic_file(dst, force=force, need_bytes=layout.size) as file:
        _torch_into(engine, file.fileno(), layout, dst, nested=dims is not None)
        if sidecar is not None:
            # Before the weights get their name: whoever sees the weights finds the configuration.
            with store.atomic_file(beside, force=force) as configuration:
                configuration.write(sidecar.read_bytes())
    return [dst, beside] if sidecar is not None else [dst]


def _torch_into(engine: Engine, descriptor: int, layout: torch_layout.TorchLayout, path: Path, *, nested: bool) -> None:
    """Write one torch file through an open descriptor and compare it."""
    engine.copy(descriptor, {name: begin for name, (_, begin) in layout.places.items()}, checksums=True)
    checksums = {}
    for name, (number, _) in layout.places.items():
        if name in engine.checksums:
            checksums[number] = engine.checksums[name]
    for offset, data in layout.headers(checksums):
        _write_at(descriptor, memoryview(data), offset)
    _write_at(descriptor, memoryview(layout.directory(checksums)), layout.size)
    archive = open_archive(path, MappedFile(path, descriptor))
    try:
        state = archive.value["model_state_dict"] if nested else archive.value
        found = archive.plan_state_dict(state)
        engine.compare(found, path)
        engine.finish(found, path)
    finally:
        archive.file.close()


def to_huggingface(engine: Engine, dst: Path, force: bool, shard_bytes: int) -> list[Path]:
    work = engine.work
    config = _huggingface_config(work)
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
            descriptor = store.SYSTEM.create(folder / shard)
            try:
                _safetensors_into(engine, descriptor, members, {}, dst / shard)
            finally:
                os.close(descriptor)
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


def to_delta(engine: Engine, dst: Path, force: bool, base: Path) -> list[Path]:
    """What differs from a base, in the form that `ckpt.delta` reads."""
    work = engine.work
    with open_source(base) as under:
        below: tuple[str, ...] = ()
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
        aliases = {name: work.jobs[name].info.tied_to for name in changed if work.jobs[name].info.tied_to in changed}
        stored = [name for name in changed if name not in aliases]
        result = {n: d for n, d in base_digests.items() if n not in removed} | {
            n: digests[n] for n in (*copied, *changed)
        }
        reference = {
            "fingerprint": fingerprint(base_digests),
            "path": str(base),
            "below": list(below),
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
            _safetensors_into(engine, file.fileno(), stored, metadata, dst, digests=False)
            engine.finish(stored, dst)
            for alias, kept in aliases.items():
                assert kept is not None
                engine.digests[alias] = engine.digests[kept]
    return [dst]


def _digests(tensors: Mapping[str, Planned], engine: Engine) -> dict[str, str]:
    found: dict[str, str] = {}

    def one(name: str) -> None:
        tensor = tensors[name]
        for region in regions(tensor):
            region.check()
        found[name] = digest(tensor.info.dtype, tensor.info.shape, chunks(tensor, engine.chunk))

    _all(engine.workers, [(one, (name,)) for name in tensors])
    return found


def _carry(sidecars: Mapping[str, Path], folder: Path, dst: Path) -> list[Path]:
    for name, path in sidecars.items():
        store.write_file(folder / name, [path.read_bytes()])
    return [dst / name for name in sidecars]


# --- Whisper's configuration ---


def _dims(work: Work) -> dict[str, int]:
    config = work.source.config or {}
    dims = config.get("dims")
    if isinstance(dims, dict) and all(isinstance(v, int) for v in dims.values()) and not _dims_differ(work, dims):
        return dict(dims)
    return whisper_names.dims_of({name: job.tensor for name, job in work.jobs.items()}, _heads(work))


def _dims_differ(work: Work, dims: Mapping[str, int]) -> bool:
    found = whisper_names.dims_of({name: job.tensor for name, job in work.jobs.items()}, (1, 1))
    wrong = [key for key, value in found.items() if not key.endswith("_head") and dims.get(key) != value]
    if wrong:
        raise CheckpointError(
            f"its dims say {wrong[0]} = {dims.get(wrong[0])}, its tensors say {found[wrong[0]]}",
            where=str(work.source.path),
            fix="the file is damaged, or was put together by hand",
        )
    return False


def _heads(work: Work) -> tuple[int, int] | None:
    """Attention heads of encoder and decoder, where a configuration is beside the weights."""
    config = work.source.config or {}
    dims = config.get("dims")
    if isinstance(dims, dict):
        pair = dims.get("n_audio_head"), dims.get("n_text_head")
    else:
        pair = config.get("encoder_attention_heads"), config.get("decoder_attention_heads")
    sidecar = work.source.sidecars.get("train.yaml")
    if pair == (None, None) and sidecar is not None:
        from thawline.core.config import read_yaml

        value = read_yaml(sidecar).data
        if isinstance(value, dict):
            sides = [value.get(key) for key in ("encoder_conf", "decoder_conf")]
            found = [side.get("attention_heads") if isinstance(side, dict) else None for side in sides]
            pair = found[0], found[1]
    encoder, decoder = pair
    return (encoder, decoder) if isinstance(encoder, int) and isinstance(decoder, int) else None


def _huggingface_config(work: Work) -> dict[str, object] | None:
    """The configuration to write: the source's own, or a Whisper's from its sizes."""
    config = work.source.config
    dtypes = Counter(job.info.dtype for job in work.jobs.values() if job.info.dtype in FLOATING)
    main = dtypes.most_common(1)[0][0] if dtypes else "F32"
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    if config is not None and "model_type" in config:
        stated = "torch_dtype" if "torch_dtype" in config else "dtype"
        return {**config, stated: names[main]}
    if whisper_names.spelling(work.jobs) != "huggingface":
        return None
    openai = whisper_names.respell({n: job.tensor for n, job in work.jobs.items()}, "huggingface", "openai")
    dims = config.get("dims") if config is not None else None
    sizes = dict(dims) if isinstance(dims, dict) else whisper_names.dims_of(openai, _heads(work))
    ffn = openai["encoder.blocks.0.mlp.0.bias"].info.shape[0]
    return whisper_names.huggingface_config(sizes, ffn, main)


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
