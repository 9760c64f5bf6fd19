"""Checkpoints of torch.distributed.checkpoint: FSDP2, accelerate's `pytorch_model_fsdp_N`, Lightning.

`.metadata` is a pickle that lists, for every tensor, boxes of it and the byte range that holds each; the files
`__RANK_N.distcp` are complete small torch files one after another. Layout: torch/distributed/checkpoint/metadata.py and
filesystem.py of torch 2.13. Optimizer state lies beside the weights under another first key and is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

from thawline.ckpt.formats.mapped import MappedFile, inside
from thawline.ckpt.formats.pickle_names import TORCH_DTYPES, Inert, Name, TensorRef
from thawline.ckpt.formats.pieces import Boxes, Linear, Part, Plan, Planned, TensorInfo, elements
from thawline.ckpt.formats.torch_archive import open_archive
from thawline.ckpt.formats.unpickle import unpickle
from thawline.errors import CheckpointError

_WEIGHT_KEYS: Final = ("model", "state_dict", "module", "model_state_dict", "net")
_PACKAGE: Final = "torch.distributed.checkpoint.metadata"
_END_BYTES: Final = 2048
_ACCELERATE = re.compile(r"pytorch_model_fsdp(?:_\d+)?")


def looks_like(path: Path) -> bool:
    """Whether a folder is such a checkpoint, or accelerate's folder around one."""
    return path.is_dir() and ((path / ".metadata").is_file() or bool(_inner(path)))


def plan(path: Path, *, key: str | None = None) -> Plan:
    """What the checkpoint holds.

    key: the first key under which the weights lie; needed only if it is none of the usual ones.
    Raises CheckpointError naming the file and the cause.
    """
    folder, how = path, "torch distributed"
    if not (path / ".metadata").is_file():
        inner = _inner(path)
        if len(inner) != 1:
            raise CheckpointError(
                f"holds {len(inner)} models", where=str(path), fix=f"convert one of: {', '.join(inner)}"
            )
        folder, how = inside(path, inner[0]), "accelerate fsdp"
    elif (path / "meta.pt").is_file():
        how = "lightning distributed"
    metadata = _Metadata(folder)
    wanted = metadata.weights(key)
    files = _Files(folder)
    metadata.fetch(set(wanted.values()), files)
    tensors = {name: metadata.tensor(fqn, name, files) for name, fqn in wanted.items()}
    skipped = metadata.skipped(wanted)
    return Plan(
        format=how,
        tensors=tensors,
        files=files.opened(),
        notes=(f"not weights, left out: {skipped}",) if skipped else (),
        widen=False,
    )


def _inner(path: Path) -> list[str]:
    try:
        entries = sorted(path.iterdir())
    except OSError:
        return []
    return [e.name for e in entries if _ACCELERATE.fullmatch(e.name) and (e / ".metadata").is_file()]


class _Metadata:
    def __init__(self, folder: Path) -> None:
        self.path = inside(folder, ".metadata")
        file = MappedFile(self.path)
        value, _ = unpickle(file.view(0, file.size), where=str(self.path))
        file.close()
        if not _is(value, f"{_PACKAGE}.Metadata"):
            raise self.bad("is no metadata of torch.distributed.checkpoint")
        self.tensors = self._mapping(value.get("state_dict_metadata"))
        self.paths = value.get("planner_data") if isinstance(value.get("planner_data"), dict) else {}
        self.places: dict[tuple[str, tuple[int, ...] | None], Inert] = {}
        for index, place in self._mapping(value.get("storage_data")).items():
            if not _is(index, f"{_PACKAGE}.MetadataIndex") or not isinstance(place, Inert):
                raise self.bad("lists storage in a way that is not known")
            name, offset = index.get("fqn"), index.get("offset")
            if not isinstance(name, str) or not isinstance(offset, tuple | None):
                raise self.bad("has a damaged index")
            self.places[name, offset] = place

    def bad(self, what: str, fix: str = "copy the checkpoint again, or use another one") -> CheckpointError:
        return CheckpointError(what, where=str(self.path), fix=fix)

    def _mapping(self, value: Any) -> Mapping[Any, Any]:
        if not isinstance(value, dict):
            raise self.bad("lists nothing")
        return value

    def _route(self, fqn: str) -> tuple[str, ...]:
        """The keys that lead to a tensor. Names hold dots, so only the planner's own record is used."""
        route = self.paths.get(fqn)
        if isinstance(route, tuple) and route and all(isinstance(step, str | int) for step in route):
            return tuple(str(step) for step in route)
        return (fqn,)

    def weights(self, key: str | None) -> dict[str, str]:
        """Name of every weight -> its name in the metadata."""
        routes = {
            fqn: self._route(fqn)
            for fqn, entry in self.tensors.items()
            if _is(entry, f"{_PACKAGE}.TensorStorageMetadata")
        }
        if not routes:
            raise self.bad("lists no tensor", "give a checkpoint of a model")
        seen: set[str] = set()
        while True:
            roots = {route[0] for route in routes.values()}
            seen |= roots
            chosen = [key] if key in roots else [name for name in _WEIGHT_KEYS if name in roots]
            nested = all(len(route) > 1 for fqn, route in routes.items() if route[0] in chosen)
            if chosen and nested:
                routes = {fqn: route[1:] for fqn, route in routes.items() if route[0] == chosen[0]}
                break
            if len(roots) == 1 and all(len(route) > 1 for route in routes.values()):
                routes = {fqn: route[1:] for fqn, route in routes.items()}  # one wrapper around everything
                if key is not None and key in roots:
                    break
                continue
            if all(len(route) == 1 for route in routes.values()):
                break
            raise self.bad(
                f"has the first keys {', '.join(sorted(roots))}, and none is known to hold weights",
                "say which one does (--tag)",
            )
        if key is not None and key not in seen:
            raise self.bad(f"has no first key {key!r}", f"choose one of: {', '.join(sorted(seen)[:8])}")
        named = {".".join(route): fqn for fqn, route in routes.items()}
        if len(named) != len(routes):
            raise self.bad("has two tensors of one name")
        return named

    def skipped(self, wanted: Mapping[str, str]) -> str:
        """The first keys of what was left out, with counts."""
        kept = set(wanted.values())
        counts: dict[str, int] = {}
        for fqn in self.tensors:
            if fqn not in kept:
                root = self._route(fqn)[0]
                counts[root] = counts.get(root, 0) + 1
        return ", ".join(f"{root} ({count})" for root, count in sorted(counts.items()))

    def fetch(self, wanted: Collection[str], files: _Files) -> None:
        """Ask for both ends of every chunk, where its torch file has its directory and pickle: the disk serves many
        requests at once, and we wait for one at a time."""
        for (fqn, _), place in self.places.items():
            offset, length = place.get("offset"), place.get("length")
            if fqn in wanted and isinstance(offset, int) and isinstance(length, int):
                file = files.open(place.get("relative_path"))
                file.soon(offset, min(offset + _END_BYTES, offset + length))
                file.soon(max(offset, offset + length - _END_BYTES), offset + length)

    def tensor(self, fqn: str, name: str, files: _Files) -> Planned:
        entry = self.tensors[fqn]
        shape, chunks = entry.get("size"), entry.get("chunks")
        properties = entry.get("properties")
        dtype = _dtype(properties)
        if not isinstance(shape, tuple) or not isinstance(chunks, list) or dtype is None:
            raise self.bad(f"tensor {name!r} has a damaged entry")
        total = elements(shape, where=str(self.path))
        boxes = []
        for chunk in chunks:
            start, size = chunk.get("offsets"), chunk.get("sizes")
            if not isinstance(start, tuple) or not isinstance(size, tuple) or not len(start) == len(size) == len(shape):
                raise self.bad(f"tensor {name!r} has a damaged chunk")
            if any(at + extent > whole for at, extent, whole in zip(start, size, shape, strict=True)):
                raise self.bad(f"a chunk of tensor {name!r} reaches outside its shape {shape}")
            if elements(size, where=str(self.path)) or not total:
                boxes.append((start, size, self._chunk(fqn, name, start, size, dtype, files)))
        self._tiles(name, shape, total, boxes)
        info = TensorInfo(name=name, dtype=dtype, shape=shape, origin="sharded tensor")
        return Planned(info=info, parts=_joined(shape, boxes))

    def _chunk(
        self, fqn: str, name: str, start: tuple[int, ...], size: tuple[int, ...], dtype: str, files: _Files
    ) -> Linear:
        place = self.places.get((fqn, start))
        if place is None:
            raise self.bad(f"states no place for the chunk of tensor {name!r} at {start}")
        file_name, offset, length = place.get("relative_path"), place.get("offset"), place.get("length")
        if place.get("transform_descriptors"):
            raise self.bad(f"tensor {name!r} is stored compressed, which is not supported", "save it uncompressed")
        if not isinstance(offset, int) or not isinstance(length, int) or offset < 0 or length < 0:
            raise self.bad(f"states a damaged place for tensor {name!r}")
        file = files.open(file_name)
        if offset + length > file.size:
            raise CheckpointError(
                f"is cut short: tensor {name!r} lies at bytes {offset} to {offset + length}, the file has {file.size}",
                where=str(file.path),
                fix="copy the file again, or use another checkpoint",
            )
        archive = open_archive(file.path, file, offset, length)
        ref = archive.value
        if not isinstance(ref, TensorRef) or ref.shape != size or ref.dtype != dtype:
            raise CheckpointError(
                f"the chunk of tensor {name!r} at byte {offset} is not {dtype} of shape {size}",
                where=str(file.path),
                fix="the files are not from one checkpoint: use another one",
            )
        part = archive.place(ref)
        if not isinstance(part, Linear):
            raise self.bad(f"a chunk of tensor {name!r} is not contiguous", "save it again")
        return part

    def _tiles(
        self,
        name: str,
        shape: tuple[int, ...],
        total: int,
        boxes: list[tuple[tuple[int, ...], tuple[int, ...], Linear]],
    ) -> None:
        """Boxes fill the tensor once: their volumes add up and no two overlap."""
        have = sum(data.count for _, _, data in boxes)
        if have != total:
            raise self.bad(f"tensor {name!r} of shape {shape} has {total} elements, its chunks {have}")
        # Sorted by the first axis, only neighbours that share rows have to be compared.
        ordered = sorted(boxes, key=lambda box: box[0])
        for i, (start, size, _) in enumerate(ordered):
            for other, extent, _ in ordered[i + 1 :]:
                if shape and other[0] >= start[0] + size[0]:
                    break
                if all(a < b + y and b < a + x for a, x, b, y in zip(start, size, other, extent, strict=True)):
                    raise self.bad(f"chunks of tensor {name!r} overlap at {other}")


class _Files:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, MappedFile] = {}

    def open(self, name: Any) -> MappedFile:
        path = inside(self._folder, name)
        if name not in self._open:
            self._open[name] = MappedFile(path)
        return self._open[name]

    def opened(self) -> tuple[MappedFile, ...]:
        return tuple(self._open.values())


def _joined(shape: tuple[int, ...], boxes: list[tuple[tuple[int, ...], tuple[int, ...], Linear]]) -> tuple[Part, ...]:
    """Boxes that are whole rows are contiguous stretches of the tensor, one after another."""
    ordered = sorted(boxes, key=lambda box: box[0])
    if all(size[1:] == shape[1:] for _, size, _ in ordered):
        return tuple(data for _, _, data in ordered)
    return (Boxes(shape, tuple(ordered)),)


def _is(value: Any, name: str) -> bool:
    return isinstance(value, Inert) and str(value.name) == name


def _dtype(properties: Any) -> str | None:
    """The element type of TensorProperties, whose state is a tuple that begins with it."""
    state = properties.state if isinstance(properties, Inert) else None
    found = state.get("dtype") if isinstance(state, dict) else state[0] if isinstance(state, tuple) and state else None
    return TORCH_DTYPES.get(found.name) if isinstance(found, Name) else None
