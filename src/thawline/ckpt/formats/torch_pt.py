"""Single files written by torch.save: what is inside, and where in it the weights lie.

Known insides: a flat state dict (WeNet), `{"state_dict": ...}` (Lightning), `{"model": ...}` (VideoChat2 and many),
`{"dims", "model_state_dict"}` (OpenAI Whisper), `{"module": ...}` (DeepSpeed's model states alone). Where an averaged
copy (EMA) lies beside the weights, it is given when asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from thawline.ckpt.formats.pickle_names import TensorRef
from thawline.ckpt.formats.pieces import Plan
from thawline.ckpt.formats.torch_archive import is_torch_file, open_archive
from thawline.errors import CheckpointError

_WEIGHTS: Final = ("state_dict", "model_state_dict", "model", "module", "weights", "params")
_EMA: Final = ("ema_state_dict", "model_ema", "ema", "ema_model", "state_dict_ema", "averaged_model", "ema_weights")
_NESTED: Final = ("state_dict", "model", "params", "shadow_params", "module")


def looks_like(path: Path) -> bool:
    """Whether the file begins like one of torch's."""
    if not path.is_file():
        return False
    try:
        with open(path, "rb") as file:
            return is_torch_file(file.read(8))
    except OSError:
        return False


def plan(path: Path, *, only: str = "weights") -> Plan:
    """What the file holds.

    only: "weights", or "ema" for the averaged copy
    Raises CheckpointError naming the file and the cause.
    """
    archive = open_archive(path)
    value = archive.value
    if isinstance(value, TensorRef):
        raise CheckpointError("holds a single tensor, not a state dict", where=str(path), fix="give a state dict")
    if not isinstance(value, dict):
        raise CheckpointError(
            f"holds {type(value).__name__}, not a state dict", where=str(path), fix="save model.state_dict()"
        )
    state, how, notes = _find(value, only, path)
    if how == "model states of deepspeed":
        notes.append(
            "these are the weights in training precision; the full-precision ones are in the optimizer shards beside"
        )
    tensors = archive.plan_state_dict(state, "ema" if only == "ema" else "file")
    if not tensors:
        raise CheckpointError(
            "holds no tensors under names",
            where=str(path),
            fix=f"its entries are: {', '.join(map(str, list(value)[:8]))}",
        )
    others = [str(name) for name, item in state.items() if not isinstance(item, TensorRef)]
    unnamed = [repr(name) for name, item in state.items() if isinstance(item, TensorRef) and not isinstance(name, str)]
    if unnamed:
        notes.append(f"tensors whose names are no text, left out: {_first_few(unnamed)}")
    if others:
        notes.append(f"not tensors, left out: {_first_few(others)}")
    dims = value.get("dims")
    config = {"dims": dims} if isinstance(dims, dict) and how == "openai whisper" else None
    sidecars = {}
    for candidate in (path.with_suffix(".yaml"), path.parent / "train.yaml"):
        if candidate.is_file():
            sidecars = {"train.yaml": candidate}
            break
    return Plan(
        format=how, tensors=tensors, files=(archive.file,), notes=tuple(notes), sidecars=sidecars, config=config
    )


def _find(value: Mapping[Any, Any], only: str, path: Path) -> tuple[Mapping[Any, Any], str, list[str]]:
    """The state dict inside, what the file is, and notes."""
    if only == "ema":
        for key in _EMA:
            inner = value.get(key)
            for state in (inner, *(inner.get(name) for name in _NESTED if isinstance(inner, dict))):
                if isinstance(state, dict) and any(isinstance(item, TensorRef) for item in state.values()):
                    return state, f"averaged weights ({key})", []
        raise CheckpointError(
            f"has no averaged weights; looked for {', '.join(_EMA)}",
            where=str(path),
            fix="convert the weights themselves, or save the average under one of these names",
        )
    if any(isinstance(item, TensorRef) for item in value.values()):
        return value, "torch state dict", []
    for key in _WEIGHTS:
        state = value.get(key)
        if not isinstance(state, dict) or not any(isinstance(item, TensorRef) for item in state.values()):
            continue
        rest = [str(name) for name in value if name != key]
        notes = [f"not weights, left out: {', '.join(rest[:8])}"] if rest else []
        if "pytorch-lightning_version" in value:
            return state, "lightning", notes
        if key == "model_state_dict" and "dims" in value:
            return state, "openai whisper", []
        if key == "module" and "ds_version" in value:
            return state, "model states of deepspeed", notes
        return state, f"torch file ({key})", notes
    raise CheckpointError(
        f"holds no weights under a name that is known ({', '.join(_WEIGHTS)})",
        where=str(path),
        fix=f"its entries are: {', '.join(map(str, list(value)[:8]))}",
    )


def _first_few(names: list[str]) -> str:
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
