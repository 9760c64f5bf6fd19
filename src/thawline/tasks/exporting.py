"""The result of a run, or one of its checkpoints, as a model that stands alone.

What a task exports (adapters merged, units and configuration beside the weights) is its own matter; any other form is
made from that by conversion.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from thawline.ckpt import store
from thawline.ckpt.adapters import CONFIG
from thawline.ckpt.convert import ConversionReport, convert, refuse_places, write
from thawline.ckpt.load import Checkpoint, checkpoints, read_checkpoint, read_newest
from thawline.ckpt.remote import is_url
from thawline.ckpt.save import step_name
from thawline.ckpt.source import open_source
from thawline.ckpt.transfer import fetched, sent
from thawline.core.index import is_adapter
from thawline.errors import CheckpointError, RecipeError
from thawline.freeze.adapters import ADAPTER
from thawline.tasks.restoring import restored
from thawline.train.evaluation import best_step
from thawline.train.recipe import read_recipe
from thawline.train.rundir import RunDirectory

_FACTOR = re.compile(rf"(.+)\.(lora_(?:embedding_)?[AB])\.{ADAPTER}(\.weight)?")


def export(
    run: Path | str,
    dst: Path | str,
    *,
    to: str | None = None,
    step: int | None = None,
    only: str | None = None,
    base: Path | str | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> ConversionReport:
    """Write what a run has made as a stand-alone model at `dst`. Both may be URLs.

    to:   a target of `convert`; "peft": the adapters of a plan with `lora`; "videochat2": Ask-Anything's .pth; None:
          the form of the model that the run began with
    step: of a kept checkpoint; None: the result, or of an unfinished run what that would be by now: its best checkpoint
          if the recipe names a metric for it, else its newest
    only: "weights" as trained, "ema" their averages; None: what the run's result would be
    base: where the base is now, if it has moved

    Raises CheckpointError, or RecipeError where `run` is no run directory; nothing is left at `dst` then.
    """
    as_it_lies = step is None and only is None and to != "peft"
    tag = None if step is None else step_name(step)
    with ExitStack() as opened:
        here = opened.enter_context(fetched(run, tag=tag, result=as_it_lies, every=step is None))
        files = RunDirectory(here.absolute())
        if not files.begun:
            raise RecipeError(f"{str(run)!r} is not a run directory", fix="for other checkpoints: thawline convert")
        refuse_places(f"{run}/checkpoints" if is_url(run) else files.checkpoints, dst, base=base, force=force)
        under = None if base is None else opened.enter_context(fetched(base))
        if to == "peft":
            return _adapters(files, _checkpoint(files, step).path, dst, under, force)
        model = opened.enter_context(standing_alone(files, step, only, under))
        if to == "videochat2":
            model /= "upstream.pth"
            if not model.is_file():
                raise CheckpointError("is no VideoChat2: it has no upstream.pth", where=str(run))
        report = convert(model, dst, to=to or own_form(model), dtype=dtype, force=force)
        return replace(report, source=str(run))


def _adapters(
    files: RunDirectory, checkpoint: Path, dst: Path | str, base: Path | str | None, force: bool
) -> ConversionReport:
    """The adapters of a plan with `lora` as a folder that peft loads."""
    recipe = read_recipe(files.recipe)
    lora = recipe.plan.lora
    if lora is None:
        raise CheckpointError("its plan has no lora", where=str(files.recipe), fix="export it in another form")
    place = Path(base).absolute() if base is not None else recipe.path("model")
    with sent(dst, force=force) as target, open_source(checkpoint, base=place) as source:
        names = {name: match for name in source.names if (match := _FACTOR.fullmatch(name))}
        others = [info.name for info in source.infos if info.origin == "delta" and not is_adapter(info.name)]
        if others:
            raise CheckpointError(
                f"{len(others)} tensors besides the adapters were trained, which a peft adapter cannot hold: "
                f"{', '.join(others[:5])}",
                where=str(checkpoint),
                fix="export it merged (without --to peft)",
            )
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": str(place),
            "r": lora.r,
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
            "use_rslora": lora.rslora,
            "target_modules": sorted({match[1] for match in names.values()}),
            "bias": "none",
            "inference_mode": True,
        }
        with store.atomic_dir(target, force=force) as folder:
            report = write(
                source.only(names), folder / "adapter_model.safetensors", to="safetensors",
                rename={name: f"base_model.model.{m[1]}.{m[2]}{m[3] or ''}" for name, m in names.items()},
            )  # fmt: skip
            store.write_file(folder / CONFIG, [(json.dumps(config, indent=2) + "\n").encode()])
    written = tuple(f"{dst}/{name}" for name in ("adapter_model.safetensors", CONFIG))
    return replace(report, source=str(files.path), target=str(dst), to="peft", files=written)


def own_form(model: Path) -> str:
    """The target of `convert` that a model directory is in already."""
    if (model / "train.yaml").is_file():
        return "wenet"
    return "hf" if (model / "config.json").is_file() else "safetensors"


@contextmanager
def standing_alone(files: RunDirectory, step: int | None, only: str | None, base: Path | str | None) -> Iterator[Path]:
    """A directory with the model as the run's task exports it: its result as it lies there, or made for this."""
    if step is None and only is None and files.finished:
        yield files.model
        return
    recipe = read_recipe(files.recipe)
    checkpoint = _checkpoint(files, step)
    averaged = only == "ema" or (only is None and bool(checkpoint.ema))
    place = Path(base).absolute() if base is not None else recipe.path("model")
    task, model = restored(files.path, place, checkpoint, averaged=averaged)
    with tempfile.TemporaryDirectory(prefix="thawline-") as folder:
        task.export(model, Path(folder))
        yield Path(folder)


def _checkpoint(files: RunDirectory, step: int | None) -> Checkpoint:
    if step is None:
        newest = read_newest(files.checkpoints, report=lambda line: None)
        best = best_step(read_recipe(files.recipe), newest.state["run"]["history"])
        if best is None or best == newest.step:
            return newest
        step = best
    path = files.checkpoints / step_name(step)
    if not path.is_dir():
        kept = ", ".join(str(s) for s, _ in sorted(checkpoints(files.checkpoints))) or "none"
        raise CheckpointError(f"no checkpoint of step {step}", where=str(files.checkpoints), fix=f"kept are: {kept}")
    return read_checkpoint(path)
