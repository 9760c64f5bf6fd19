"""Any model by its path: a model directory, a run, a checkpoint, or a delta over its base; whole or not at all."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from thawline.ckpt.delta import BaseRef, Delta, read_delta
from thawline.ckpt.formats.thawline_run import is_delta
from thawline.ckpt.load import read_checkpoint, read_newest
from thawline.ckpt.transfer import fetched
from thawline.core.config import near_names, read_yaml
from thawline.core.index import is_adapter
from thawline.errors import CheckpointError
from thawline.models.wenet.cmvn import read_cmvn
from thawline.models.wenet.config import read_config
from thawline.models.wenet.model import build
from thawline.tasks.speech_weights import load_recogniser, remember_
from thawline.tasks.speech_weights import widened as widened
from thawline.train.recipe import read_recipe
from thawline.train.rundir import RunDirectory


@dataclass(frozen=True, slots=True)
class Location:
    """Where the parts of a model lie.

    home:    the directory (or weights file) that says what the network is: train.yaml, config.json
    weights: what is opened for the tensors
    base:    what gives the tensors that `weights` leaves out; None where it leaves out none
    run:     the run directory whose recipe says how the base was changed (units, adapters, GroupNorm); None otherwise
    """

    home: Path
    weights: Path
    base: Path | None = None
    run: Path | None = None


def locate(path: Path | str, base: Path | str | None = None) -> Location:
    """Find the parts of the model at `path`. Raises CheckpointError where it is none, or lacks its base."""
    path = Path(path).expanduser().absolute()
    given = None if base is None else Path(base).expanduser().absolute()
    for place in (path, given):
        if place is not None and not place.exists():
            near = near_names(place.name, [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else [])
            hint = f"did you mean {place.parent / near[0]}?" if near else "check the path"
            raise CheckpointError("no such file or directory", where=str(place), fix=hint)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        raise CheckpointError(
            "this describes a run or a model, and is none",
            where=str(path),
            fix="give the folder of the run or the model",
        )
    run = RunDirectory(path)
    if run.begun:
        if run.finished and given is None:
            return Location(run.model, run.model)
        return _over(path, given or read_recipe(run.recipe).path("model"), path)
    if (path / "delta.safetensors").is_file():
        owner = path.parent.parent
        begun = RunDirectory(owner).begun
        home = given or (read_recipe(owner / "recipe.yaml").path("model") if begun else None)
        return _over(path, home or Path(read_delta(path / "delta.safetensors").base.path), owner if begun else None)
    if path.is_file() and is_delta(path):
        return _over(path, given or Path(read_delta(path).base.path), None)
    return Location(path, path, given)


def _over(weights: Path, base: Path, run: Path | None) -> Location:
    if not base.exists() or base.samefile(weights):
        raise CheckpointError(
            f"it changes a base that is not there any more: {base}",
            where=str(weights),
            fix="say where it is with --base",
        )
    home = locate(base)
    return Location(home.home, weights, base, run)


def load(path: Path | str, base: Path | str | None = None) -> nn.Module:
    """The model at `path`, in eval mode: a WeNet directory (train.yaml, final.pt, units.txt), a Hugging Face
    directory, OpenAI's Whisper .pt, a run directory, a checkpoint or a delta (with `base`, unless the base is still
    where it was), a WeNet LoRA file (with the `base` it was trained from), VideoChat2's parts.

    Both may be URLs (s3://...). Every tensor is accounted for. Raises CheckpointError naming what is missing,
    unexpected or damaged, BaseMismatch (exit code 4) where a delta is put over another base than its own.
    """
    with fetched(path) as here, nullcontext() if base is None else fetched(base) as under:
        return _load(here, under)


def _load(path: Path, base: Path | None) -> nn.Module:
    from thawline.tasks import kinds, vision_classifier  # both stand on this module

    if kinds.kind_of(path, base) == "vision":
        return vision_classifier.load_classifier(path, base)[0]
    from thawline.tasks import videochat_loading

    chat, under = Path(path), None if base is None else Path(base)
    if videochat_loading.is_meant(chat, under):
        return videochat_loading.load_model(chat, under)
    return load_located(locate(path, base))


def draw(home: Path) -> nn.Module:
    """The network that a WeNet directory describes, with fresh weights from torch's global generator.

    No weights need to be there; global CMVN is read from its file.
    """
    file = home / "train.yaml"
    if not file.is_file():
        raise CheckpointError(
            "there is no train.yaml that says what to draw", where=str(home), fix="init: random needs a WeNet directory"
        )
    config = read_config(read_yaml(file).data, where=str(file))
    statistics = None
    if config.cmvn_file:
        statistics = read_cmvn(home / Path(config.cmvn_file).name, is_json=config.cmvn_is_json)
    return build(config, statistics)


def load_located(place: Location) -> nn.Module:
    """Build the network that `place.home` describes and fill it strictly."""
    if place.run is not None:
        return _of_run(place, place.run)
    delta = _delta_of(place.weights)
    if delta is None:
        return load_recogniser(place.home, weights=place.weights, base=place.base)
    assert place.base is not None
    if not delta.adapters and any(is_adapter(name) and name not in delta.base.digests for name in delta.tensors):
        raise CheckpointError(
            "it holds LoRA adapters, and not what they are scaled by: it was written by an older Thawline, which left "
            "that to the recipe of the run",
            where=str(place.weights),
            fix="give the run's folder or its checkpoint there; thawline export RUN makes a model that stands alone",
        )
    from thawline.tasks.restoring import restore_

    model = load(place.base)
    restore_(model, delta, BaseRef.of(model, path=str(place.base)), source=str(place.weights))
    return model.eval()


def _of_run(place: Location, run: Path) -> nn.Module:
    from thawline.tasks.restoring import restored  # a task may itself load its base by this module

    assert place.base is not None
    notes: list[str] = []
    if place.weights == run:
        checkpoint = read_newest(RunDirectory(run).checkpoints, report=notes.append)
    else:
        checkpoint = read_checkpoint(place.weights)
    _, model = restored(run, place.base, checkpoint)
    remember_(model, notes)
    return model


def _delta_of(weights: Path) -> Delta | None:
    """The delta at a path: a checkpoint of a run that is elsewhere, or a delta file; None where it is neither."""
    if weights.is_dir() and (weights / "delta.safetensors").is_file():
        return read_checkpoint(weights).difference
    return read_delta(weights) if weights.is_file() and is_delta(weights) else None
