"""A first recipe for a model and a data set, with a comment on every key that people change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thawline.core.config import dump_yaml, read_yaml
from thawline.errors import RecipeError

_TEMPLATE = """\
# thawline plan {name}     shows what this would train
# thawline train {name}    trains it; the same command goes on after a stop
task: speech
model: {model}             # a WeNet directory, a Hugging Face Whisper directory, or a run directory
data:
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
  clip: {clip}
  schedule: {schedule}
run:
  epochs: {epochs}
  seed: 7
  precision: fp32
  accumulate: {accumulate}
  workers: 2
  checkpoint: {{every: 500 steps, keep: 3, best: valid/wer}}
{options}"""


def starter_recipe(model: Path, *, train: str, valid: str, name: str) -> str:
    """The text of a recipe for `model`. A WeNet directory's train.yaml gives its data, optimizer and schedule settings.

    Raises RecipeError where `model` is neither a WeNet nor a Hugging Face directory.
    """
    if (model / "train.yaml").is_file():
        return _wenet(model, train=train, valid=valid, name=name)
    if (model / "config.json").is_file():
        return _TEMPLATE.format(
            name=name,
            model=model,
            train=train,
            valid=valid,
            batch="{size: 8}",
            conf="",
            train_names="[model.decoder]",
            rates=_RATES.format(first="model.decoder"),
            optim="adamw",
            lr="1.0e-5",
            weight_decay="0.01",
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


def _wenet(model: Path, *, train: str, valid: str, name: str) -> str:
    settings: Any = read_yaml(model / "train.yaml").data
    dataset = dict(settings.get("dataset_conf") or {})
    batch = dataset.pop("batch_conf", None) or {}
    kept = {k: v for k, v in dataset.items() if k not in _NOT_KEPT}
    optim = dict(settings.get("optim_conf") or {})
    rate, rates = _rates(optim)
    return _TEMPLATE.format(
        name=name,
        model=model,
        train=train,
        valid=valid,
        batch=_batch(batch),
        conf="".join(f"  {line}\n" for line in dump_yaml({"conf": kept}).splitlines()) if kept else "",
        train_names="[ctc, decoder]",
        rates=rates or _RATES.format(first="decoder"),
        optim=settings.get("optim") if settings.get("optim") in ("adam", "adamw") else "adamw",
        lr=rate,
        weight_decay=optim.get("weight_decay", 0.01 if settings.get("optim") == "adamw" else 0.0),
        clip=settings.get("grad_clip", 5),
        schedule=_schedule(settings),
        epochs=min(int(settings.get("max_epoch", 3)), 3),
        accumulate=settings.get("accum_grad", 1),
        options="",
    )


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
