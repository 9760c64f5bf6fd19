"""DeepSpeed checkpoints of ZeRO stages 0 to 3: full-precision masters put together from the ranks' shards.

Layouts as DeepSpeed 0.19 writes them (deepspeed/runtime/engine.py `_get_zero_ckpt_name`, `_save_checkpoint`;
runtime/zero/stage_1_and_2.py and stage3.py `state_dict`; the reading side is utils/zero_to_fp32.py):

    latest                                              the tag
    TAG/mp_rank_00_model_states.pt                      stages 0, 1, 2
    TAG/zero_pp_rank_R_mp_rank_00_model_states.pt       stage 3, every rank
    TAG/[bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt
    TAG/zero/NAME/fp32.pt                               a universal checkpoint (ds_to_universal) instead of the last

Stages 1 and 2: group g is the concatenation of its parameters in the order of `param_shapes[g]`, cut into equal
partitions. Stage 3: every parameter of n elements gives every rank ceil(n / N) elements; a rank's flat groups, one
after another, hold those pieces. Shards that do not belong together (counts, steps, shapes) are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from thawline.ckpt.formats.pickle_names import Inert, TensorRef
from thawline.ckpt.formats.pieces import ITEM_BYTES, Linear, Part, Plan, Planned, TensorInfo, chunks, elements, regions
from thawline.ckpt.formats.zero_shards import Shards, choose, is_tag, sidecars, tags_of
from thawline.errors import CheckpointError

MASTER: Final = "master weights"
MODULE: Final = "module"
FROZEN: Final = "frozen fragment"
BUFFER: Final = "buffer"


def looks_like(path: Path) -> bool:
    """Whether a folder is a DeepSpeed checkpoint, or the folder of one tag."""
    return path.is_dir() and ((path / "latest").is_file() or is_tag(path) or bool(tags_of(path)))


def plan(path: Path, *, tag: str | None = None) -> Plan:
    """What a DeepSpeed checkpoint holds.

    tag: which of several checkpoints below `path`; without it the file `latest` says, or there is only one.
    Raises CheckpointError if shards are missing, damaged, or come from different runs.
    """
    folder, notes = choose(path, tag)
    shards = Shards.open(folder)
    stage, how = shards.stage, f"zero-{shards.stage} ({shards.world} ranks)"
    if shards.universal:
        tensors, not_held = _universal(shards)
        how = "universal"
    elif stage == 3:
        tensors, not_held = _stage_3(shards)
    elif stage in (1, 2):
        tensors, not_held = _stage_1_or_2(shards)
    else:
        tensors, not_held = _stage_0(shards, notes)
    if any(name.startswith("_forward_module.") for name in tensors):
        notes.append("the prefix '_forward_module.' of old Lightning versions was removed")
        tensors = {
            name.removeprefix("_forward_module."): tensor.renamed(
                name.removeprefix("_forward_module."),
                tied_to=tensor.info.tied_to and tensor.info.tied_to.removeprefix("_forward_module."),
            )
            for name, tensor in tensors.items()
        }
    if not tensors:
        raise CheckpointError("holds no tensor", where=str(folder), fix="give another checkpoint")
    return Plan(
        format=f"deepspeed {how}",
        tensors=tensors,
        files=tuple(archive.file for archive in shards.archives()),
        notes=tuple(notes),
        not_held=not_held,
        sidecars=sidecars(folder),
        widen=True,
    )


def moments(path: Path) -> tuple[dict[str, Planned], int]:
    """Adam's moments of what trained under stage 1, 2 or 3, as "<parameter>/exp_avg" and "<parameter>/exp_avg_sq", and
    how many updates they have seen.

    ZeRO keeps them in flat tensors beside the flat masters, cut as those are. Raises CheckpointError where there are
    none, besides what `plan` raises.
    """
    shards = Shards.open(choose(path, None)[0])
    if shards.stage == 0 or not shards.optim:
        raise shards.bad(
            "holds no moments cut as its master weights are", fix="ZeRO 1, 2 or 3 with its *_optim_states.pt has them"
        )
    cut = _cut_pieces if shards.stage == 3 else _cut_groups
    if shards.stage != 3:
        _check_cut(shards, _module(shards), _cut_groups(shards, _flat_masters(shards)))
    entries = [shards.entries(rank) for rank in range(shards.world)]
    found: dict[str, Planned] = {}
    for key in ("exp_avg", "exp_avg_sq"):
        flats = [_flat(shards, rank, key, [entry.get(key) for entry in own]) for rank, own in enumerate(entries)]
        found |= {f"{name}/{key}": tensor.renamed(f"{name}/{key}") for name, tensor in cut(shards, flats).items()}
    updates = max((step for step in shards.steps(0) if step is not None), default=0)
    return found, int(updates)


# --- stages ---

_Result = tuple[dict[str, Planned], dict[str, str]]


def _stage_0(shards: Shards, notes: list[str]) -> _Result:
    """Everything is in `module`; a half-precision run keeps masters in lists without names, found by their rounding."""
    archive = shards.model[0]
    tensors = _module(shards)
    optimizer = shards.state("optimizer")
    groups = optimizer.get("fp32_groups") if isinstance(optimizer, dict) else None
    if groups is None:
        if isinstance(optimizer, dict) and "fp32_groups_flat" in optimizer:
            notes.append(
                "the full-precision masters of this fp16 run are stored without names or borders; the weights are the "
                "half-precision ones of the module"
            )
        return tensors, {}
    candidates = {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.info.origin == MODULE and tensor.info.tied_to is None and tensor.info.dtype in ("BF16", "F16")
    }
    masters = [
        archive.plan("", ref, MASTER)
        for group in _groups(groups, shards)
        for ref in _groups(group, shards)
        if isinstance(ref, TensorRef)
    ]
    # A master belongs to the parameter that is its rounding. Parameters with the same bits (zero biases) are taken in
    # the module's order, which is the order in which optimizers get them.
    by_bits: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in candidates.items():
        by_bits.setdefault((tensor.info.dtype, tensor.info.shape, _rounded(tensor, tensor.info.dtype)), []).append(name)
    dtypes = sorted({tensor.info.dtype for tensor in candidates.values()})
    for master in masters:
        keys = [(dtype, master.info.shape, _rounded(master, dtype)) for dtype in dtypes]
        key = next((key for key in keys if by_bits.get(key)), None)
        if key is None:
            raise shards.bad(
                f"a master tensor of shape {master.info.shape} rounds to no parameter of the module: it mixes runs"
            )
        name = by_bits[key].pop(0)
        tensors[name] = master.renamed(name)
    for name, tensor in tensors.items():
        if tensor.info.tied_to in candidates:
            tensors[name] = tensors[tensor.info.tied_to].renamed(name, tied_to=tensor.info.tied_to)
    return tensors, {}


def _stage_1_or_2(shards: Shards) -> _Result:
    masters = _cut_groups(shards, _flat_masters(shards))
    tensors = _module(shards)
    not_held: dict[str, str] = {}
    frozen = _frozen_whole(shards, not_held)
    found = _complete(shards, tensors, masters, frozen)
    _check_cut(shards, tensors, masters)
    return found, not_held


def _stage_3(shards: Shards) -> _Result:
    not_held: dict[str, str] = {}
    masters = _cut_pieces(shards, _flat_masters(shards))
    return _complete(shards, _module(shards), masters, _frozen_pieces(shards, not_held)), not_held


_PerRank = Sequence[Sequence[Planned]]
"""The flat tensors of every rank: masters, or the moments beside them."""


def _cut_groups(shards: Shards, per_rank: _PerRank) -> dict[str, Planned]:
    """Stages 1 and 2: what flat tensors hold of each parameter that trains."""
    found: dict[str, Planned] = {}
    for group, shapes in enumerate(_shape_groups(shards)):
        runs = _Runs()
        for rank, flats in enumerate(per_rank):
            if group >= len(flats):
                raise shards.bad(f"has {len(flats)} groups, the model states list more", shards.optim[rank].file.path)
            runs.add(flats[group])
        position = 0
        paddings = shards.optimizer(0).get("param_alignment_paddings")
        for index, (name, shape) in enumerate(shapes.items()):
            count = elements(shape, where=str(shards.folder))
            found[name] = _planned(name, runs.dtype, shape, runs.cut(position, count, name, shards), MASTER)
            position += count
            if isinstance(paddings, list) and group < len(paddings) and isinstance(paddings[group], list):
                position += _whole(paddings[group][index]) if index < len(paddings[group]) else 0
        # Older versions keep the padding that makes the group divisible; it is less than what divides it.
        if not 0 <= runs.total - position < 2 * shards.world:
            raise shards.bad(
                f"group {group} has {runs.total} master elements, its parameters need {position}: the shards are not "
                "from this run"
            )
    return found


def _cut_pieces(shards: Shards, per_rank: _PerRank) -> dict[str, Planned]:
    """Stage 3: the same, where every rank holds a piece of every parameter."""
    ranks = []
    for flats in per_rank:
        runs = _Runs()
        for flat in flats:
            runs.add(flat)
        ranks.append(runs)
    found: dict[str, Planned] = {}
    position = 0
    for shapes in _shape_groups(shards):
        for name, shape in shapes.items():
            count = elements(shape, where=str(shards.folder))
            piece = -(-count // shards.world)
            parts: list[Part] = []
            for rank, runs in enumerate(ranks):
                own = max(min(piece, count - rank * piece), 0)
                parts += runs.cut(position, own, name, shards)
            found[name] = _planned(name, ranks[0].dtype, shape, tuple(parts), MASTER)
            position += piece
    for rank, runs in enumerate(ranks):
        if runs.total != position:
            raise shards.bad(
                f"has {runs.total} master elements, the parameters need {position}: the shards are not from this run",
                shards.optim[rank].file.path,
            )
    return found


def _universal(shards: Shards) -> _Result:
    """Masters whole, one file each; frozen parameters and buffers in the copied model states."""
    masters: dict[str, Planned] = {}
    for shapes in _shape_groups(shards):
        for name, shape in shapes.items():
            archive = shards.universal.get(name)
            if archive is None:
                raise shards.bad(f"has no file zero/{name}/fp32.pt", fix="make the universal checkpoint again")
            value = archive.value
            ref = value.get("param") if isinstance(value, dict) else value
            if not isinstance(ref, TensorRef):
                raise shards.bad("holds no tensor", archive.file.path)
            tensor = archive.plan(name, ref, MASTER)
            if tensor.info.elements != elements(shape, where=archive.where):
                raise shards.bad(f"has shape {tensor.info.shape} instead of {shape}", archive.file.path)
            masters[name] = _planned(name, tensor.info.dtype, shape, tensor.parts, MASTER)
    not_held: dict[str, str] = {}
    frozen = _frozen_pieces(shards, not_held) if shards.stage == 3 else _frozen_whole(shards, not_held)
    return _complete(shards, _module(shards), masters, frozen), not_held


class _Runs:
    """Flat tensors one after another, seen as one sequence of elements."""

    def __init__(self) -> None:
        self._runs: list[tuple[int, Linear]] = []
        self.total = 0
        self.dtype = "F32"

    def add(self, flat: Planned) -> None:
        for part in flat.parts:
            if not isinstance(part, Linear):
                raise CheckpointError(f"a flat group is not contiguous (shape {flat.info.shape})", fix="copy it again")
            self._runs.append((self.total, part))
            self.total += part.count
        self.dtype = flat.info.dtype

    def cut(self, start: int, count: int, name: str, shards: Shards) -> tuple[Linear, ...]:
        """Where elements [start, start + count) lie."""
        if start + count > self.total:
            raise shards.bad(f"parameter {name!r} needs master elements up to {start + count}, there are {self.total}")
        parts = []
        item = ITEM_BYTES[self.dtype]
        for begin, run in self._runs:
            low, high = max(start, begin), min(start + count, begin + run.count)
            if low < high:
                parts.append(Linear(run.region, run.offset + (low - begin) * item, high - low))
        return tuple(parts)


# --- parts of the states ---


def _module(shards: Shards) -> dict[str, Planned]:
    module = shards.state("module")
    if not isinstance(module, dict):
        raise shards.bad("has no module", shards.model[0].file.path)
    buffers = shards.state("buffer_names")
    named = set(buffers) if isinstance(buffers, list) else set()
    tensors = shards.model[0].plan_state_dict(module, MODULE)
    return {name: t.renamed(name, origin=BUFFER) if name in named else t for name, t in tensors.items()}


def _shape_groups(shards: Shards) -> list[dict[str, tuple[int, ...]]]:
    groups = shards.state("param_shapes")
    if isinstance(groups, dict):
        groups = [groups]
    found = []
    for group in _groups(groups, shards):
        if not isinstance(group, dict) or not all(
            isinstance(name, str) and isinstance(shape, tuple) for name, shape in group.items()
        ):
            raise shards.bad("states parameter shapes that are none", shards.model[0].file.path)
        found.append(group)
    return found


def _groups(value: Any, shards: Shards) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise shards.bad("states no parameter groups", shards.model[0].file.path)
    return list(value)


def _flat_masters(shards: Shards) -> _PerRank:
    key = "fp32_flat_groups" if shards.stage == 3 else "single_partition_of_fp32_groups"
    return [_flat(shards, rank, key, shards.optimizer(rank).get(key)) for rank in range(shards.world)]


def _flat(shards: Shards, rank: int, key: str, flats: object) -> list[Planned]:
    archive = shards.optim[rank]
    if not isinstance(flats, list) or not all(isinstance(flat, TensorRef) for flat in flats):
        raise shards.bad(f"has no {key}", archive.file.path)
    return [archive.plan(f"{key}[{i}]", flat, MASTER) for i, flat in enumerate(flats)]


def _frozen_shapes(shards: Shards) -> dict[str, tuple[int, ...]]:
    shapes = shards.state("frozen_param_shapes")
    if shapes is None:
        return {}
    if not isinstance(shapes, dict) or not all(
        isinstance(name, str) and isinstance(shape, tuple) for name, shape in shapes.items()
    ):
        raise shards.bad("states frozen shapes that are none", shards.model[0].file.path)
    return shapes


_NOT_SAVED: Final = "frozen, and left out when the checkpoint was saved (exclude_frozen_parameters)"


def _frozen_whole(shards: Shards, not_held: dict[str, str]) -> dict[str, Planned]:
    """Frozen parameters under stage 2: whole tensors of rank 0."""
    fragments = shards.state("frozen_param_fragments") or {}
    found = {}
    for name, shape in _frozen_shapes(shards).items():
        ref = fragments.get(name) if isinstance(fragments, dict) else None
        if not isinstance(ref, TensorRef):
            not_held[name] = _NOT_SAVED
            continue
        tensor = shards.model[0].plan(name, ref, FROZEN)
        if tensor.info.elements != elements(shape, where=str(shards.folder)):
            raise shards.bad(f"frozen parameter {name!r} has shape {tensor.info.shape} instead of {shape}")
        found[name] = _planned(name, tensor.info.dtype, shape, tensor.parts, FROZEN)
    return found


def _frozen_pieces(shards: Shards, not_held: dict[str, str]) -> dict[str, Planned]:
    """Frozen parameters under stage 3: every rank holds ceil(n / N) elements, the last ones padded."""
    found = {}
    for name, shape in _frozen_shapes(shards).items():
        count = elements(shape, where=str(shards.folder))
        piece = -(-count // shards.world)
        parts: list[Part] = []
        dtype = ""
        for rank, archive in enumerate(shards.model):
            fragments = archive.value.get("frozen_param_fragments") or {}
            ref = fragments.get(name) if isinstance(fragments, dict) else None
            if not isinstance(ref, TensorRef):
                continue
            part = archive.place(ref)
            if not isinstance(part, Linear) or part.count < piece or dtype not in ("", ref.dtype):
                raise shards.bad(f"the piece of frozen parameter {name!r} has shape {ref.shape}", archive.file.path)
            dtype = ref.dtype
            own = max(min(piece, count - rank * piece), 0)
            parts.append(Linear(part.region, part.offset, own))
        if len(parts) not in (0, shards.world):
            raise shards.bad(f"{len(parts)} of {shards.world} ranks have a piece of frozen parameter {name!r}")
        if parts:
            found[name] = _planned(name, dtype, shape, tuple(parts), FROZEN)
        else:
            not_held[name] = _NOT_SAVED
    return found


def _complete(
    shards: Shards, module: dict[str, Planned], masters: dict[str, Planned], frozen: dict[str, Planned]
) -> dict[str, Planned]:
    """All tensors in the module's order: masters, frozen fragments, ties, buffers, and what only the module has."""
    shared = shards.state("shared_params")
    aliases = dict(shared) if isinstance(shared, dict) else {}
    for name, tensor in module.items():
        if tensor.info.tied_to is not None and tensor.info.elements:
            aliases.setdefault(name, tensor.info.tied_to)
    first = frozen | masters  # what was frozen after it had trained is in both; its master has all digits
    found: dict[str, Planned] = {}
    for name in [*module, *(n for n in (*first, *aliases) if n not in module)]:
        if name in first:
            found[name] = first[name]
            continue
        kept = aliases.get(name)
        if kept is not None:
            # Either name may be the one that was kept; the module's order decides which came first in it.
            if kept in first or kept in module:
                found[name] = (first.get(kept) or module[kept]).renamed(name, tied_to=kept)
                continue
            raise shards.bad(f"{name!r} is tied to {kept!r}, which is not there")
        tensor = module[name]
        if shards.stage == 3 and tensor.info.origin != BUFFER and tensor.info.shape == (0,):
            raise shards.bad(f"parameter {name!r} is in the module but in no rank's shard")
        kin = next((n for n, kept in aliases.items() if kept == name and n in first), None)
        found[name] = first[kin].renamed(name, tied_to=kin) if kin is not None else tensor
    return found


_PROBE: Final = 256
_INFINITE: Final = {"BF16": 0x7F80, "F16": 0x7C00}
"""The bits of infinity; what is above them, without its sign, is no number."""


def _check_cut(shards: Shards, module: Mapping[str, Planned], masters: Mapping[str, Planned]) -> None:
    """Stages 1 and 2: the module holds the roundings of the masters.

    The first elements of each tensor show shards of another run. Where a rank records another cut
    (`param_slice_mappings`) than the parameter shapes give, all elements are compared: with `round_robin_gradients`
    DeepSpeed 0.19 flattens in the order of the shapes and records the order before, so that its own
    `safe_get_full_fp32_param` returns pieces of other parameters.
    """
    disputed = _disputed(shards)
    limit = None if disputed else _PROBE
    pairs = {
        name: (master, module[name])
        for name, master in masters.items()
        if name in module and module[name].info.dtype in ("F32", "BF16", "F16") and master.info.dtype == "F32"
    }
    unproven = next((name for name in masters if name not in pairs), None)
    if disputed and unproven is not None:
        raise shards.bad(f"{disputed}, and the module does not show which is right for {unproven!r}")
    for tensor in (tensor for pair in pairs.values() for tensor in pair):
        first = tensor.parts[0] if tensor.parts else None
        if isinstance(first, Linear):
            begin = first.offset
            first.region.soon(begin, begin + min(first.count, _PROBE) * ITEM_BYTES[tensor.stored or tensor.info.dtype])
    for name, (master, twin) in pairs.items():
        if twin.info.shape != master.info.shape:
            raise shards.bad(
                f"parameter {name!r} has shape {twin.info.shape} in the module, {master.info.shape} in the shards"
            )
        if _rounded(master, twin.info.dtype, limit) != _rounded(twin, twin.info.dtype, limit):
            for region in (*regions(master), *regions(twin)):
                region.check()  # a flipped byte is the likelier cause, and names the record
            raise shards.bad(
                f"{disputed}, and by the shapes {name!r} does not round to the module's values"
                if disputed
                else f"the master weights of {name!r} do not round to the module's values: model states and optimizer "
                "shards come from different runs or steps"
            )


def _disputed(shards: Shards) -> str:
    """Where the cut that a rank recorded (`param_slice_mappings`) differs from the parameter shapes'; "" if nowhere."""
    paddings = shards.optimizer(0).get("param_alignment_paddings")
    if isinstance(paddings, list) and any(any(group) for group in paddings if isinstance(group, list)):
        return ""  # the recorded starts then follow another rule
    sizes = [flat.info.elements for flat in _flat_masters(shards)[0]]  # the last rank's may be shorter
    for rank in range(shards.world):
        mappings = shards.optimizer(rank).get("param_slice_mappings")
        for group, shapes in enumerate(_shape_groups(shards)):
            if not isinstance(mappings, list) or group >= len(mappings) or not isinstance(mappings[group], dict):
                continue
            expected = _slices(shards, shapes, rank, sizes[group])
            stated = {
                name: (address.get("start"), address.get("numel"))
                for name, address in mappings[group].items()
                if isinstance(address, Inert)
            }
            wrong = sorted(name for name in stated.keys() | expected.keys() if stated.get(name) != expected.get(name))
            if wrong:
                return f"rank {rank} records another cut of group {group} than the parameter shapes, as of {wrong[0]!r}"
    return ""


def _slices(shards: Shards, shapes: Mapping[str, tuple[int, ...]], rank: int, size: int) -> dict[str, tuple[int, int]]:
    """Which parameters lie in a rank's partition of `size` elements: name -> (first element there, how many)."""
    found = {}
    position = 0
    low, high = rank * size, (rank + 1) * size
    for name, shape in shapes.items():
        count = elements(shape, where=str(shards.folder))
        start, stop = max(position, low), min(position + count, high)
        if start < stop:
            found[name] = (start - low, stop - start)
        position += count
    return found


def _rounded(tensor: Planned, dtype: str, limit: int | None = None) -> object:
    """The tensor's bits in `dtype`, as a value to compare: a digest, or the first `limit` elements themselves."""
    import numpy as np
    from blake3 import blake3

    from thawline.ckpt.formats.casting import cast

    hasher = blake3()
    taken = 0
    for chunk in chunks(tensor, 4 * limit if limit else 1 << 20):
        rounded = np.frombuffer(cast(chunk, tensor.info.dtype, dtype), dtype=np.uint8)
        count = len(rounded) // ITEM_BYTES[dtype]
        if dtype in _INFINITE:  # which NaN a NaN becomes differs between processors, and within torch
            halves = rounded.view("<u2")
            rounded = np.where((halves & 0x7FFF) > _INFINITE[dtype], 0x7FFF, halves).astype("<u2").view(np.uint8)
        if limit is not None:
            rounded = rounded[: (limit - taken) * ITEM_BYTES[dtype]]
        hasher.update(rounded.tobytes())
        taken += count
        if limit is not None and taken >= limit:
            break
    return hasher.digest()


def _planned(name: str, dtype: str, shape: tuple[int, ...], parts: tuple[Part, ...], origin: str) -> Planned:
    return Planned(info=TensorInfo(name=name, dtype=dtype, shape=tuple(shape), origin=origin), parts=parts)


def _whole(value: Any) -> int:
    return value if type(value) is int and value >= 0 else 0
