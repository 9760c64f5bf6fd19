"""Stage 1 of VideoChat2 as a task: clips and captions are brought together over a frozen vision transformer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thawline.core.config import read_yaml
from thawline.data.conversation import read_dialogues
from thawline.data.videochat import ClipSettings
from thawline.data.videochat_captions import CaptionBatch, CaptionSamples
from thawline.errors import CheckpointError, DataError, RecipeError
from thawline.models.videochat.alignment_config import AlignmentConfig, alignment_from_upstream
from thawline.models.videochat.alignment_loading import New
from thawline.models.videochat.script import read_script
from thawline.models.videochat.switches import SwitchedPlan, plan_of_stage1
from thawline.tasks.videochat_alignment_home import AlignmentHome, is_alignment
from thawline.tasks.videochat_settings import (
    PRESET,
    ClipConf,
    PartsOptions,
    path_of,
    refuse_parts_of_random_start,
    settled,
    upstream_values,
)
from thawline.train.recipe import Recipe
from thawline.train.rundir import RunDirectory
from thawline.train.task import Evaluation, PlainSums, Samples, SumTerm

NO_DECAY = ("@bias", "@norm", "**.{q,v}_bias", "query_tokens", "temp", "vision_temp_embed")
"""What upstream keeps from weight decay in stage 1 (`VideoChat2_qformer.no_weight_decay`)."""
TOP = 5


class AlignmentOptions(PartsOptions):
    """`options` of a stage-1 recipe. Paths are relative to the recipe; `model` is BERT's directory.

    `parts` are UMT's file (`l16_25m.pth`), BERT's where they do not lie in `model`, or a stage-1 file.
    """

    config: str | dict[str, Any] = ""
    """Upstream's `model` and `criterion` sections, written here, or the file that holds them: JSON, YAML, or upstream's
    script (`config_7b_stage1.py`), which is read and not run."""
    new: tuple[New, ...] = ()
    """What begins from initial values on purpose."""
    max_words: int = 32
    """Tokens of a caption; longer ones lose their end."""
    compat: Literal["thawline", "upstream"] = "thawline"
    """upstream: the frozen vision transformer is said to follow model.train(); it has no dropout, so no number
    changes."""
    freeze_vision_encoder: bool = True
    """Upstream's switch, in force with `plan: {preset: switches}`."""


class CaptionConf(ClipConf):
    """`data.conf` of a stage-1 recipe."""


class AlignmentTask:
    """Training a stage-1 model. Made anew for each run; remembers the home of what it built."""

    name = "videochat_stage1"

    def __init__(self) -> None:
        self.options = AlignmentOptions()
        self.notes: tuple[str, ...] = ()
        self.home: AlignmentHome | None = None

    def complete(self, recipe: Recipe) -> Recipe:
        """The recipe with its paths absolute and the plan that its switch means written out."""
        options: AlignmentOptions = recipe.bind_part(AlignmentOptions, "options")
        plan = recipe.plan
        if plan.preset == PRESET:
            switched: SwitchedPlan = plan_of_stage1(
                freeze_vision_encoder=options.freeze_vision_encoder, compat=options.compat
            )
            self.notes = switched.notes
            changes: dict[str, Any] = {"preset": None, "train": (*switched.train, *plan.train)}
            if not plan.no_decay:
                changes["no_decay"] = NO_DECAY
            plan = plan.model_copy(update=changes)
        conf: CaptionConf = recipe.bind_part(CaptionConf, "data", "conf")
        return settled(recipe, options, conf, plan=plan, switches=("freeze_vision_encoder",), paths=("config",))

    def build(self, recipe: Recipe) -> nn.Module:
        self.options = recipe.bind_part(AlignmentOptions, "options")
        drawn = recipe.init == "random"
        refuse_parts_of_random_start(recipe, self.options.parts)
        self.home = home = home_of(recipe, self.options)
        model, notes = home.open(seed=recipe.run.seed, random_weights=drawn)
        self.notes = tuple(dict.fromkeys((*self.notes, *notes)))
        return model

    def samples(self, recipe: Recipe, model: nn.Module, split: str) -> CaptionSamples:
        conf: CaptionConf = recipe.bind_part(CaptionConf, "data", "conf")
        assert self.home is not None, "the task has built no model yet"
        return CaptionSamples(
            read_dialogues(recipe.path("data", split), media_root=conf.media_folder()),
            tokenizer=self.home.tokenizer(),
            settings=self.home.clips,
            training=split == "train",
            seed=recipe.run.seed,
        )

    def weights(self, model: nn.Module, batch: CaptionBatch) -> Mapping[str, float]:
        return batch.weights

    def loss(self, model: nn.Module, batch: CaptionBatch) -> PlainSums:
        c: AlignmentConfig = model.config  # type: ignore[assignment]
        found = model(batch.clips, batch.text_ids, batch.text_mask, batch.owners)
        terms = {
            "contrastive": (c.contrastive, found.contrastive, "captions"),
            "matching": (c.matching, found.matching, "pairs"),
            "captioning": (c.captioning, found.captioning, "words"),
        }
        count = torch.tensor(float(found.captions))
        return PlainSums(
            {name: SumTerm(weight * total, per) for name, (weight, total, per) in terms.items() if weight},
            {"matched": (found.matched, count), "judged": (found.judged, torch.tensor(float(max(found.pairs, 1))))},
        )

    def evaluate(self, model: nn.Module, samples: Samples, batches: Iterator[Any]) -> Evaluation:
        return evaluate(model, batches)

    def export(self, model: nn.Module, folder: Path) -> None:
        assert self.home is not None, "the task has built no model yet"
        self.home.export(model, folder)


def evaluate(model: Any, batches: Iterator[CaptionBatch]) -> Evaluation:
    """How well a caption finds its clip among all of them, and the losses; a row a caption.

    recall1, recall5: share of captions whose own clip is the likeliest of all, or among the five likeliest
    loss: the three losses, each over its own count, weighted and summed. False partners are the likeliest ones of the
    micro-batch, so that the figure follows from the model and the order of samples alone.
    """
    config: AlignmentConfig = model.config
    totals = {"contrastive": 0.0, "matching": 0.0, "captioning": 0.0}
    counts = dict.fromkeys(totals, 0.0)
    clips: dict[str, Tensor] = {}
    captions: list[Tensor] = []
    keys: list[str] = []
    media: list[str] = []
    for batch in batches:
        found = model(batch.clips, batch.text_ids, batch.text_mask, batch.owners)
        for name, count in (("contrastive", found.captions), ("matching", found.pairs), ("captioning", found.words)):
            if getattr(config, name):
                totals[name] += float(getattr(found, name))
                counts[name] += float(count)
        keys += batch.keys
        media += batch.media
        clips.update(zip(batch.media, found.clip_vectors, strict=True))
        captions.append(found.caption_vectors)
    if not keys:
        raise DataError("no sample could be read", fix="look at the reasons given for the bad samples")
    alike = model.similarity(torch.stack(list(clips.values())), torch.cat(captions)).T.cpu()  # (captions, clips)
    number = {name: i for i, name in enumerate(clips)}
    own = alike.gather(1, torch.tensor([[number[name]] for name in media]))
    places = (alike > own).sum(1).tolist()  # how many clips are likelier
    metrics = {f"{name}_loss": totals[name] / counts[name] for name in totals if counts[name]}
    metrics["loss"] = sum(getattr(config, name) * totals[name] / counts[name] for name in totals if counts[name])
    metrics |= {f"recall{n}": sum(place < n for place in places) / len(places) for n in (1, TOP)}
    rows = [{"key": key, "place": place + 1} for key, place in zip(keys, places, strict=True)]
    return Evaluation({**metrics, "samples": float(len(keys))}, rows)


def home_of(recipe: Recipe, options: AlignmentOptions) -> AlignmentHome:
    """The parts that a recipe names. Raises RecipeError for what is missing or cannot be meant."""
    model = recipe.path("model")
    run = RunDirectory(model)
    if run.begun and run.finished:
        model = run.model
    conf: CaptionConf = recipe.bind_part(CaptionConf, "data", "conf")
    if is_alignment(model):
        home = AlignmentHome.of(model)
    else:
        home = AlignmentHome(
            path=model,
            config=_config(recipe, options, model),
            bert=model,
            parts=(*((model,) if _has_weights(model) else ()), *options.part_paths()),
            new=options.new,
        )
    clips = ClipSettings(
        frames=home.config.vision.num_frames,
        size=conf.size or home.config.vision.img_size,
        sampling=conf.sampling,
        augment=conf.augment,
    )
    return dataclasses.replace(home, clips=clips)


def _config(recipe: Recipe, options: AlignmentOptions, bert: Path) -> AlignmentConfig:
    path = bert / "config.json"
    try:
        sizes = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as exc:
        raise CheckpointError(
            f"BERT's configuration cannot be read: {exc}",
            where=str(path),
            fix="model: the directory of bert-base-uncased (config.json, vocab.txt, and its weights)",
        ) from exc
    sections = _sections(recipe, options)
    with upstream_values(f"{options.where('config') or 'options.config'}, with {path}"):
        return alignment_from_upstream(
            sections.get("model") or {}, sections.get("criterion") or {}, bert=sizes, max_words=options.max_words
        )


def _sections(recipe: Recipe, options: AlignmentOptions) -> Mapping[str, Any]:
    if isinstance(options.config, dict):
        return options.config
    if not options.config:
        raise RecipeError(
            "the model's shape is not known",
            where=recipe.where("model"),
            fix="options.config: upstream's sections model and criterion, or the file that holds them",
        )
    path = path_of(options, "config")
    if path.suffix == ".py" and path.is_file():
        text = path.read_text(encoding="utf-8")
        return {name: read_script(text, name=name, where=str(path)) for name in ("model", "criterion")}
    data = read_yaml(path).data
    return data if isinstance(data, dict) else {}


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
