"""Any model by its path: a model directory, a run, a checkpoint, or a delta over its base; whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from thawline.ckpt.delta import read_delta
from thawline.ckpt.formats.thawline_run import is_delta
from thawline.ckpt.load import load_strict_
from thawline.ckpt.source import open_source
from thawline.ckpt.tensors import SourceTensors
from thawline.core.config import near_names, read_yaml
from thawline.errors import CheckpointError
from thawline.models import family
from thawline.models.wenet.cmvn import read_cmvn
from thawline.models.wenet.config import read_config
from thawline.models.wenet.model import build
from thawline.train.law import shape_
from thawline.train.recipe import read_recipe
from thawline.train.rundir import RunDirectory


@dataclass(frozen=True, slots=True)
class Location:
    """Where the parts of a model lie.

    home:    the directory (or weights file) that says what the network is: train.yaml, config.json
    weights: what is opened for the tensors
    base:    what gives the tensors that `weights` leaves out; None where it leaves out none
    run:     the run directory whose plan may have changed the structure (adapters, GroupNorm); None otherwise
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
    if not base.exists():
        raise CheckpointError(
            f"it changes a base that is not there any more: {base}",
            where=str(weights),
            fix="say where it is with --base",
        )
    home = locate(base)
    return Location(home.home, weights, base, run)


def load(path: Path | str, base: Path | str | None = None) -> nn.Module:
    """The model at `path`, in eval mode: a WeNet directory (train.yaml, final.pt, units.txt), a Hugging Face
    directory, a run directory, a checkpoint or a delta (with `base`, unless the base is still where it was).

    Every tensor is accounted for. Raises CheckpointError naming what is missing, unexpected or damaged, BaseMismatch
    (exit code 4) where a delta is put over another base than its own.
    """
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
    model = family.build_empty(family.sniff(place.home))
    if place.run is not None:
        recipe = read_recipe(place.run / "recipe.yaml")
        shape_(model, recipe.plan, seed=recipe.run.seed)
    with open_source(place.weights, base=place.base) as source:
        load_strict_(model, _widened(SourceTensors(source), model), source=str(place.weights))
    return model.eval()


def _widened(given: Mapping[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """Half precision becomes fp32 where the model is in fp32, which is exact; nothing else is cast."""
    wanted = model.state_dict()
    tensors: dict[str, Any] = {}
    for name, tensor in given.items():
        exact = name in wanted and str(wanted[name].dtype) == "torch.float32"
        half = str(tensor.dtype) in ("torch.float16", "torch.bfloat16")
        tensors[name] = tensor.float() if exact and half else tensor
    return tensors
