"""A first recipe for a model and a data set, with a comment on every key that people change."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thawline.core.config import dump_yaml, read_yaml, scalar_text
from thawline.errors import RecipeError
from thawline.tasks.foreign import WenetRun
from thawline.tasks.loading import locate
from thawline.tasks.videochat_starter import is_video_chat, videochat_recipe
from thawline.tasks.vision_starter import is_classifier, vision_recipe

_TEMPLATE = """\
# thawline plan {name}     shows what this would train
# thawline train {name}    trains it; the same command goes on after a stop
{terms}task: speech
model: {model}             # a WeNet directory, a Hugging Face Whisper directory, or a run directory
{start}data:
  train: {train}           # data.list, Kaldi folder, metadata.csv, Common Voice tsv, or a folder of audio and .txt
  valid: {valid}
  batch: {batch}           # {{size: 8}} utterances, or {{frames: 12000}} padded frames of 10 ms
{conf}plan:
  train: {train_names}     # dotted paths, globs, slices; everything else is frozen, and proved to be
  norms: pinned            # frozen normalisation keeps its statistics
{rates}  # thaw:
  #   - {{after: 2 epochs, train: ["encoder.**"], lr: 0.1}}
optim:
  name: {optim}
  lr: {lr}
  weight_decay: {weight_decay}
{moments}  clip: {clip}
  schedule: {schedule}
run:
  epochs: {epochs}
  seed: 7
  precision: {precision}
  accumulate: {accumulate}
  workers: 2
  checkpoint: {{every: 500 steps, keep: 3, best: valid/wer}}
{options}"""


def starter_recipe(model: Path, *, train: str, valid: str, name: str) -> str:
    """The text of a recipe for `model`. A WeNet directory's train.yaml gives its data, optimizer and schedule settings.

    Raises CheckpointError where nothing is there, RecipeError where `model` is neither a WeNet nor a Hugging Face
    directory, no image classifier, and nothing of VideoChat2.
    """
    locate(model)  # that there is something
    data = {"train": scalar_text(train), "valid": scalar_text(valid), "name": shell_word(name)}
    if is_video_chat(model):
        return videochat_recipe(model, **data)
    if is_classifier(model):
        return vision_recipe(model, **data)
    if (model / "train.yaml").is_file():
        return _wenet(model, **data)
    if (model / "config.json").is_file():
        return _TEMPLATE.format(
            **data,
            terms="",
            model=scalar_text(model),
            start="",
            batch="{size: 8}",
            conf="",
            train_names="[model.decoder]",
            rates=_RATES.format(first="model.decoder"),
            optim="adamw",
            lr="1.0e-5",
            weight_decay="0.01",
            moments="",
            precision="fp32",
            epochs=3,
            clip="1.0",
            schedule="{name: cosine, warmup: 100 steps}",
            accumulate=1,
            options="options:\n  language: en            # what the model is prompted with\n",
        )
    raise RecipeError(
        f"{str(model)!r} holds neither train.yaml (WeNet) nor config.json (Hugging Face)",
        fix="give the directory of the model to start from",
    )


_RATES = '  # lr: {{"{first}.**": 0.1}}   # multiples of optim.lr\n'


def shell_word(name: Path | str) -> str:
    """A file's name as a shell takes it; RECIPE for one that no single line of text can hold."""
    text = str(name)
    return shlex.quote(text) if text.isprintable() else "RECIPE"


def printable(text: str) -> str:
    """`text` on one line, as a comment may hold it: what cannot be printed by its code."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def continuing_recipe(run: WenetRun, *, train: str, valid: str, name: str) -> str:
    """The text of a recipe that goes on with a WeNet training: its settings, its counters, everything trains."""
    start = f"step: {run.step}" + ("" if run.epoch is None else f", epoch: {run.epoch}")
    start += "" if run.moments is None else f", optimizer: {scalar_text(run.moments)}"
    values = _wenet_values(run.settings) | {
        "terms": "".join(f"# {printable(term)}\n" for term in run.terms()),
        "start": f"start: {{{start}}}\n",
        "train_names": '["**"]',
        "epochs": max(int(run.settings["max_epoch"]), (run.epoch or 0) + 1),
    }
    data = {"train": scalar_text(train), "valid": scalar_text(valid), "name": shell_word(name)}
    return _TEMPLATE.format(model=scalar_text(run.weights), **data, **values)


def _wenet(model: Path, *, train: str, valid: str, name: str) -> str:
    settings: Any = read_yaml(model / "train.yaml").data
    values = _wenet_values(settings)
    values["rates"] = values["rates"] or _RATES.format(first="decoder")
    return _TEMPLATE.format(model=scalar_text(model), train=train, valid=valid, name=name, **values)


def _wenet_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a train.yaml says, as the template has it."""
    dataset = dict(settings.get("dataset_conf") or {})
    batch = dataset.pop("batch_conf", None) or {}
    kept = {k: v for k, v in dataset.items() if k not in _NOT_KEPT}
    optim = dict(settings.get("optim_conf") or {})
    rate, rates = _rates(optim)
    return {
        "terms": "",
        "start": "",
        "batch": _batch(batch),
        "conf": "".join(f"  {line}\n" for line in dump_yaml({"conf": kept}).splitlines()) if kept else "",
        "train_names": "[ctc, decoder]",
        "rates": rates,
        "optim": settings.get("optim") if settings.get("optim") in ("adam", "adamw") else "adamw",
        "lr": rate,
        "weight_decay": optim.get("weight_decay", 0.01 if settings.get("optim") == "adamw" else 0.0),
        "moments": "".join(f"  {key}: {optim[key]}\n" for key in ("betas", "eps") if key in optim),
        "clip": settings.get("grad_clip", 5),
        "schedule": _schedule(settings),
        "epochs": min(int(settings.get("max_epoch", 3)), 3),
        "precision": "bf16" if settings.get("dtype") == "bf16" else "fp32",
        "accumulate": settings.get("accum_grad", 1),
        "options": "",
    }


_NOT_KEPT = (
    "shuffle",
    "shuffle_conf",
    "sort",
    "sort_conf",
    "cycle",
    "list_shuffle",
    "list_shuffle_conf",
    "speaker_conf",
    "language_conf",
    "prefetch",
    "pad_feat",
)
"""What the recipe says elsewhere, or what has no effect here."""


def _rates(optim: Mapping[str, Any]) -> tuple[float, str]:
    """optim.lr, and plan.lr where WeNet has a rate per module: `lr: [a, b, c]` for `modules: [m, n]` and the rest."""
    rate = optim.get("lr", 1e-3)
    if isinstance(rate, (int, float)):
        return float(rate), ""
    rest = float(rate[-1])
    factors = {f"{m}.**": float(r) / rest for m, r in zip(optim.get("modules") or [], rate, strict=False)}
    inside = ", ".join(f'"{module}": {factor:g}' for module, factor in factors.items())
    return rest, f"  lr: {{{inside}}}   # multiples of optim.lr; they count for what train and thaw name\n"


def _schedule(settings: Mapping[str, Any]) -> str:
    """The schedule as near as there is one: WarmupLR is here; NoamHoldAnnealing becomes warm-up, hold and decay."""
    conf = settings.get("scheduler_conf") or {}
    warmup = conf.get("warmup_steps", 1000)
    if isinstance(warmup, list):
        warmup = warmup[-1]
    if settings.get("scheduler", "warmuplr").lower() == "noamholdannealing":
        rise = f"{warmup} steps" if warmup else "5%"
        return f"{{name: wsd, warmup: {rise}, decay: 50%}}   # nearest to WeNet's {settings['scheduler']}"
    return f"{{name: warmuplr, warmup: {warmup} steps}}"


def _batch(conf: dict[str, Any]) -> str:
    if conf.get("batch_type") == "dynamic":
        return f"{{frames: {conf.get('max_frames_in_batch', 12000)}}}"
    if conf.get("batch_type") == "bucket":
        return f"{{bucket_boundaries: {conf['bucket_boundaries']}, bucket_sizes: {conf['bucket_batch_sizes']}}}"
    return f"{{size: {conf.get('batch_size', 8)}}}"
