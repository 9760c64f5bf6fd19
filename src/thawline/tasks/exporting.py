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

from torch import nn

from thawline.ckpt import store
from thawline.ckpt.adapters import CONFIG
from thawline.ckpt.convert import ConversionReport, convert, refuse_places, write
from thawline.ckpt.formats.thawline_run import base_of_bare_delta
from thawline.ckpt.load import Checkpoint, checkpoints, read_checkpoint, read_newest
from thawline.ckpt.remote import is_url
from thawline.ckpt.save import step_name
from thawline.ckpt.source import Source, open_source, refuse_absent
from thawline.ckpt.transfer import fetched, sent
from thawline.core.adapter import NAME as ADAPTER
from thawline.core.index import is_adapter
from thawline.errors import CheckpointError, RecipeError
from thawline.freeze.lora import has_adapters, merged_copy
from thawline.freeze.plan import Lora
from thawline.tasks import videochat_export
from thawline.tasks.kinds import kind_of
from thawline.tasks.loading import load, locate
from thawline.tasks.restoring import restored
from thawline.tasks.speech_home import SpeechHome
from thawline.tasks.vision import VisionTask
from thawline.tasks.vision_classifier import load_classifier
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
    """Write what a run has made, or a delta that was taken out of one, as a stand-alone model at `dst`. Both may be
    URLs.

    to:   a target of `convert`; "peft": the adapters of a plan with `lora`; "videochat2": Ask-Anything's .pth; None:
          the form of the model that the run began with
    step: of a kept checkpoint; None: the result, or of an unfinished run what that would be by now: its best checkpoint
          if the recipe names a metric for it, else its newest
    only: "weights" as trained, "ema" their averages; None: what the run's result would be
    base: where the base is now, if it has moved

    Raises CheckpointError, or RecipeError where `run` is neither; nothing is left at `dst` then.
    """
    as_it_lies = step is None and only is None and to != "peft"
    tag = None if step is None else step_name(step)
    with ExitStack() as opened:
        here = opened.enter_context(fetched(run, tag=tag, result=as_it_lies, every=step is None))
        files = RunDirectory(here.absolute())
        under = None if base is None else opened.enter_context(fetched(base))
        refuse_absent(here)
        if not files.begun:
            place = under or base_of_bare_delta(here)
            if place is None or base_of_bare_delta(here) is None:
                raise RecipeError(
                    f"{str(run)!r} is not a run directory, nor a delta", fix="for other checkpoints: thawline convert"
                )
            if step is not None or only is not None:
                raise RecipeError("a delta is of one step, without averages", fix="leave --step and --only out")
            refuse_places(run, dst, base=base, force=force)
            if to == "peft":
                return _adapters(run, here, place, dst, force)
            model = opened.enter_context(delta_standing_alone(here, under))
        else:
            refuse_places(f"{run}/checkpoints" if is_url(run) else files.checkpoints, dst, base=base, force=force)
            if to == "peft":
                recipe = read_recipe(files.recipe)
                if recipe.plan.lora is None:
                    raise CheckpointError(
                        "its plan has no lora", where=str(files.recipe), fix="export it in another form"
                    )
                place = under.absolute() if under is not None else recipe.path("model")
                return _adapters(run, _checkpoint(files, step).path, place, dst, force, recipe.plan.lora)
            model = opened.enter_context(standing_alone(files, step, only, under))
        if to == "videochat2":
            model /= "upstream.pth"
            if not model.is_file():
                raise CheckpointError("is no VideoChat2: it has no upstream.pth", where=str(run))
        try:
            report = convert(model, dst, to=to or own_form(model), dtype=dtype, force=force)
        except CheckpointError as exc:
            exc.where = exc.where.replace(str(model), str(run))  # the folder that was made for this is no one's
            raise
        return replace(report, source=str(run))


def _adapters(
    run: Path | str, checkpoint: Path, place: Path, dst: Path | str, force: bool, lora: Lora | None = None
) -> ConversionReport:
    """The adapters of a checkpoint or a delta as a folder that peft loads.

    lora: of the run's plan, for checkpoints that do not record it
    """
    with sent(dst, force=force) as target, open_source(checkpoint, base=place, apart=True) as source:
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
            **_settings(source, lora),
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
    return replace(report, source=str(run), target=str(dst), to="peft", files=written)


def _settings(source: Source, lora: Lora | None) -> dict[str, object]:
    """What a peft configuration says of the adapters' scale, as the checkpoint records it, or else the plan."""
    recorded = list(source.adapters.values())
    if recorded:
        first = recorded[0]
        if any(replace(adapter, also=first.also) != first for adapter in recorded):
            raise CheckpointError(
                "its adapters are of several settings",
                where=str(source.path),
                fix="export it merged (without --to peft)",
            )
        rank, alpha, dropout, rslora = first.rank, first.alpha, first.dropout, first.rslora
    elif lora is not None:
        rank, alpha, dropout, rslora = lora.r, lora.alpha, lora.dropout, lora.rslora
    else:
        raise CheckpointError(
            "holds no LoRA adapters whose scale it records", where=str(source.path), fix="export it in another form"
        )
    return {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": rslora}


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


@contextmanager
def delta_standing_alone(path: Path, base: Path | None) -> Iterator[Path]:
    """A directory with the model that a delta makes of its base, as the task of that base exports it."""
    from thawline.tasks import videochat_loading

    model: nn.Module
    with tempfile.TemporaryDirectory(prefix="thawline-") as folder:
        if videochat_loading.is_meant(path, base):
            opened, chat = videochat_loading.open_chat(path, base)
            videochat_export.export(opened.model, chat, Path(folder), trained=_tensors_of(path))
        elif kind_of(path, base) == "vision":
            task = VisionTask()
            model, task.home = load_classifier(path, base)
            task.export(model, Path(folder))
        else:
            model = load(path, base)
            plain = merged_copy(model) if has_adapters(model) else model
            SpeechHome.of(locate(path, base).home).export(plain, Path(folder))
        yield Path(folder)


def _tensors_of(path: Path) -> frozenset[str]:
    with open_source(path, alone=True, apart=True) as source:
        return frozenset(info.name for info in source.infos if info.origin == "delta")


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
