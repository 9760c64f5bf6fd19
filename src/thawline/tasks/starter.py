"""A first recipe for a model and a data set, with a comment on every key that people change."""

from __future__ import annotations

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
  # lr: {{"{first}.**": 0.1}}   # multiples of optim.lr
  # thaw:
  #   - {{after: 2 epochs, train: ["encoder.**"], lr: 0.1}}
optim:
  name: adamw
  lr: {lr}
  weight_decay: 0.01
  clip: {clip}
  schedule: {schedule}
run:
  epochs: 3
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
            first="model.decoder",
            lr="1.0e-5",
            clip="1.0",
            schedule="{name: cosine, warmup: 100 steps}",
            accumulate=1,
            options="options:\n  language: en            # what the model is prompted with\n",
        )
    raise RecipeError(
        f"{str(model)!r} holds neither train.yaml (WeNet) nor config.json (Hugging Face)",
        fix="give the directory of the model to start from",
    )


def _wenet(model: Path, *, train: str, valid: str, name: str) -> str:
    settings: Any = read_yaml(model / "train.yaml").data
    dataset = dict(settings.get("dataset_conf") or {})
    batch = dataset.pop("batch_conf", None) or {}
    kept = {k: v for k, v in dataset.items() if k not in ("shuffle", "shuffle_conf", "sort", "sort_conf", "cycle")}
    optim = settings.get("optim_conf") or {}
    rate = optim.get("lr", 1e-3)
    warmup = (settings.get("scheduler_conf") or {}).get("warmup_steps", 1000)
    schedule = f"{{name: warmuplr, warmup: {warmup} steps}}"
    return _TEMPLATE.format(
        name=name,
        model=model,
        train=train,
        valid=valid,
        batch=_batch(batch),
        conf="".join(f"  {line}\n" for line in dump_yaml({"conf": kept}).splitlines()) if kept else "",
        train_names="[ctc, decoder]",
        first="decoder",
        lr=rate if isinstance(rate, (int, float)) else rate[-1],
        clip=settings.get("grad_clip", 5),
        schedule=schedule,
        accumulate=settings.get("accum_grad", 1),
        options="",
    )


def _batch(conf: dict[str, Any]) -> str:
    if conf.get("batch_type") == "dynamic":
        return f"{{frames: {conf.get('max_frames_in_batch', 12000)}}}"
    if conf.get("batch_type") == "bucket":
        return f"{{bucket_boundaries: {conf['bucket_boundaries']}, bucket_sizes: {conf['bucket_batch_sizes']}}}"
    return f"{{size: {conf.get('batch_size', 8)}}}"
