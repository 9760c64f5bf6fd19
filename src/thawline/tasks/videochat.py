"""The video-chat task: VideoChat2 models on instruction files about videos and images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import nn

from thawline.core import hub
from thawline.data.conversation import Dialogues, Format, read_dialogues
from thawline.data.conversation_templates import TEMPLATES, Targets
from thawline.data.videochat import ChatBatch, ChatSamples, ClipSettings
from thawline.errors import RecipeError
from thawline.freeze.inspect import index_of
from thawline.freeze.plan import FreezePlan
from thawline.freeze.resolve import resolve_all
from thawline.models.videochat.build import Opened
from thawline.models.videochat.names import Part
from thawline.models.videochat.switches import SwitchedPlan, Switches, plan_of
from thawline.tasks.videochat_export import Extra, export
from thawline.tasks.videochat_home import NAME, NORMALISATIONS, ChatHome
from thawline.tasks.videochat_recognition import home_at, read_section, recognises, section_of
from thawline.tasks.videochat_settings import (
    PRESET,
    ClipConf,
    PartsOptions,
    path_of,
    refuse_parts_of_random_start,
    settled,
)
from thawline.train.recipe import Recipe
from thawline.train.task import Evaluation, LossSums, PlainSums, Samples, SumTerm

NO_DECAY = ("@bias", "@norm", "**.{q,v}_bias")
"""What upstream keeps from weight decay: one-dimensional parameters and biases (`utils/optimizer.py`)."""

_PATHS = ("llm", "bert", "config")


class VideoChatOptions(PartsOptions):
    """`options` of a video-chat recipe. Paths are relative to the recipe.

    Where `model` is a directory that describes itself (`videochat.json`) or holds the parts, `llm`, `bert`, `config`
    and `stage` are taken from there; `parts` come on top.
    """

    llm: str = ""
    """The language model's directory; empty where `model` is it."""
    bert: str = ""
    """The directory of the Q-Former's vocabulary (bert-base-uncased); needed from stage 3 on."""
    config: str | dict[str, Any] = ""
    """Upstream's `model` section, written here, or the path of the file that holds it: JSON, YAML, or one of upstream's
    scripts (`config_7b_stage3.py`), which is read and not run."""
    new: tuple[Part, ...] = ()
    """What starts from initial values on purpose: extra_queries and projection in stage 2, lora in stage 3."""
    stage: Literal[2, 3, "hd"] | None = None
    """2: captions, no text in the Q-Former, no adapters; 3: instructions; hd: clips cut into tiles. Empty: by the
    parts."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the language model's weights. What trains in it is better kept in float32."""
    compat: Literal["thawline", "upstream"] = "thawline"
    """upstream: extra_query_tokens train beside a frozen Q-Former, the bos token's number is written in place of its
    embedding, positions count over padding, Phi-3 is adapted where Mistral's names fit, role names are learnt."""
    freeze_vit: bool | None = None
    freeze_qformer: bool | None = None
    freeze_mhra: bool | None = None
    freeze_llm: bool | None = None
    freeze_lora: bool | None = None
    """Upstream's switches, in force with `plan: {preset: switches}`; unset ones as in `config`, else upstream's."""
    export: tuple[Extra, ...] = ("upstream", "merged")
    """What lies beside the exported model: `upstream.pth` as Ask-Anything saves it, and `merged/`, the language model
    with its adapters added in, as a Hugging Face directory (as large as the language model)."""

    @property
    def switches_set(self) -> list[str]:
        return [name for name in Switches.__dataclass_fields__ if getattr(self, name) is not None]


class ChatConf(ClipConf):
    """`data.conf` of a video-chat recipe: how the instruction file and its clips are read."""

    format: Format = "auto"
    frames: int | None = Field(default=None, ge=1)
    """Frames a video; empty: as the model's configuration says."""
    normalisation: Literal["imagenet", "clip"] | None = None
    """Of pixels; empty: as the model says, else ImageNet's, which VideoChat2 is trained with (its demos use CLIP's)."""
    say_times: bool | None = None
    """Say in the conversation when the frames were taken; empty: as the model says, else yes."""
    shuffle_turns: bool = True
    """Another order of the questions of a clip each time, in training."""
    targets: Targets | None = None
    """What is learnt; empty: answers, or what upstream learns with `compat: upstream`."""


class VideoChatTask:
    """Fine-tuning a VideoChat2 model. Made anew for each run; remembers the home and its tokenizers."""

    name = "videochat"

    def __init__(self) -> None:
        self.options = VideoChatOptions()
        self.notes: tuple[str, ...] = ()
        self._home: ChatHome | None = None
        self._opened: Opened | None = None
        self._plan: FreezePlan | None = None
        self._drawn = False

    def complete(self, recipe: Recipe) -> Recipe:
        """The recipe with its paths absolute and the plan that its switches mean written out.

        Raises RecipeError where switches and a plan of its own contradict each other.
        """
        options: VideoChatOptions = recipe.bind_part(VideoChatOptions, "options")
        plan = recipe.plan
        if plan.preset == PRESET:
            plan, switched = switched_plan(recipe, options)
            self.notes = switched.notes
        elif options.switches_set:
            first = options.switches_set[0]
            raise RecipeError(
                f"{first} is set, and the plan says itself what trains",
                where=options.where(first),
                fix=f"write plan: {{preset: {PRESET}}}, or leave the switches out",
            )
        conf: ChatConf = recipe.bind_part(ChatConf, "data", "conf")
        return settled(recipe, options, conf, plan=plan, switches=Switches.__dataclass_fields__, paths=_PATHS)

    def build(self, recipe: Recipe) -> nn.Module:
        self.options = recipe.bind_part(VideoChatOptions, "options")
        self._plan = recipe.plan
        self._home = home = home_of(recipe, self.options)
        self._drawn = recipe.init == "random"
        refuse_parts_of_random_start(recipe, home.parts)
        self._opened, report = home.open(seed=recipe.run.seed, random_weights=self._drawn, command=self._command)
        if report is not None:
            self.notes = tuple(dict.fromkeys((*self.notes, *report.undecidable)))
        return self._opened.model

    def samples(self, recipe: Recipe, model: nn.Module, split: str) -> ChatSamples:
        home, opened = self._built()
        conf: ChatConf = recipe.bind_part(ChatConf, "data", "conf")
        dialogues = read_dialogues(recipe.path("data", split), media_root=conf.media_folder(), format=conf.format)
        upstream = self.options.compat == "upstream"
        return chat_samples(
            home,
            opened,
            dialogues,
            settings=clip_settings(home, conf),
            training=split == "train",
            seed=recipe.run.seed,
            shuffle_turns=conf.shuffle_turns,
            targets=conf.targets or ("upstream" if upstream else "answers"),
        )

    def weights(self, model: nn.Module, batch: ChatBatch) -> Mapping[str, float]:
        return batch.weights

    def loss(self, model: nn.Module, batch: ChatBatch) -> LossSums:
        found = model(batch.clips, batch.prompts, batch.text_ids, batch.text_mask)
        return PlainSums({"answers": SumTerm(found.sum, "tokens")}, {"accuracy": (found.correct, found.tokens)})

    def evaluate(self, model: nn.Module, samples: Samples, batches: Iterator[Any]) -> Evaluation:
        return evaluate(model, batches)

    def export(self, model: nn.Module, folder: Path) -> None:
        home = self._built()[0]
        names = tuple(dict(model.named_parameters()))
        if self._plan is not None and not self._drawn:
            phases = resolve_all(self._plan.expanded(index_of(model)), index_of(model))
            trained = {name for phase in phases for name in phase.trainable_names}
            names = tuple(name for name in names if name in trained)
        export(model, home, folder, trained=names, whole=self._drawn, extras=self.options.export)

    def _built(self) -> tuple[ChatHome, Opened]:
        if self._home is None or self._opened is None:
            raise RuntimeError("the task has built no model yet")
        return self._home, self._opened

    def _command(self, order: Any) -> str:
        return "in the recipe, options.parts: [" + ", ".join(o for o in order if not o.startswith("<lang")) + "]"


def chat_samples(
    home: ChatHome,
    opened: Opened,
    dialogues: Dialogues,
    *,
    settings: ClipSettings,
    training: bool,
    seed: int = 0,
    shuffle_turns: bool = True,
    targets: Targets = "answers",
) -> ChatSamples:
    """The samples of an instruction file as a model reads them: its template, its tokenizers, its lengths."""
    return ChatSamples(
        dialogues,
        template=TEMPLATES[home.config.family],
        tokenizer=opened.tokenizer,
        instruction_tokenizer=opened.instruction_tokenizer,
        settings=settings,
        training=training,
        seed=seed,
        max_text_tokens=home.config.max_text_tokens,
        padding=home.config.qformer.padding,
        shuffle_turns=shuffle_turns,
        targets=targets,
        visual_tokens=home.config.qformer.all_queries,
    )


def evaluate(model: Any, batches: Iterator[ChatBatch]) -> Evaluation:
    """Loss and accuracy a learnt token over `batches`, and a row for each micro-batch of a single sample.

    loss: nats, mean over all learnt tokens; accuracy: share of them that teacher forcing gets right
    """
    total = correct = tokens = 0.0
    samples = 0
    rows: list[dict[str, Any]] = []
    for batch in batches:
        found = model(batch.clips, batch.prompts, batch.text_ids, batch.text_mask)
        part, right, count = float(found.sum), float(found.correct), float(found.tokens)
        total, correct, tokens, samples = total + part, correct + right, tokens + count, samples + len(batch.keys)
        if len(batch.keys) == 1:
            rows.append({"key": batch.keys[0], "loss": part / count, "accuracy": right / count, "tokens": int(count)})
    return Evaluation(
        {
            "loss": total / tokens if tokens else 0.0,
            "accuracy": correct / tokens if tokens else 0.0,
            "samples": float(samples),
            "tokens": tokens,
        },
        rows,
    )


def home_of(recipe: Recipe, options: VideoChatOptions) -> ChatHome:
    """The parts of the model that a recipe names. Raises RecipeError for what is missing or cannot be meant."""
    model = hub.local(recipe.path("model"))
    parts = options.part_paths()
    stage = 3 if options.stage == "hd" else options.stage
    if recognises(model):
        home = home_at(model)
        if parts or options.stage is not None or options.new:
            home = _respelt(home, model, options, parts, stage)
    else:
        home = ChatHome.assemble(
            path=model,
            llm=path_of(options, "llm") if options.llm else model,
            bert=path_of(options, "bert") if options.bert else None,
            upstream=_section(recipe, options),
            parts=parts,
            new=options.new,
            stage=stage,
            hd=options.stage == "hd",
        )
    changes: dict[str, Any] = {}
    if options.dtype != "float32":
        changes["dtype"] = options.dtype
    if options.compat == "upstream":
        changes["config"] = home.config.as_upstream()
    conf: ChatConf = recipe.bind_part(ChatConf, "data", "conf")
    return dataclasses.replace(home, clips=clip_settings(home, conf), **changes)


def clip_settings(home: ChatHome, conf: ChatConf) -> ClipSettings:
    """How clips become tensors: the home's own settings with what the recipe says over them."""
    changes: dict[str, Any] = {"sampling": conf.sampling, "augment": conf.augment}
    changes |= {n: getattr(conf, n) for n in ("frames", "size", "say_times") if getattr(conf, n) is not None}
    if conf.normalisation is not None:
        changes["normalisation"] = NORMALISATIONS[conf.normalisation]
    return dataclasses.replace(home.clips, **changes)


def switched_plan(recipe: Recipe, options: VideoChatOptions) -> tuple[FreezePlan, SwitchedPlan]:
    """The plan of `preset: switches` written out, and what of the switches surprises."""
    home = home_of(recipe, options)
    section = _written_section(recipe, options)
    chosen: dict[str, Any] = {}
    for name in Switches.__dataclass_fields__:
        value = getattr(options, name)
        if value is None and name in section:
            value = bool(section[name])
        if value is not None:
            chosen[name] = value
    switched = plan_of(Switches(**chosen), home.config, compat=options.compat)
    plan = recipe.plan
    changes: dict[str, Any] = {"preset": None, "train": (*switched.train, *plan.train)}
    changes["may_rest"] = (*switched.may_rest, *plan.may_rest)
    if not plan.no_decay:
        changes["no_decay"] = NO_DECAY
    return plan.model_copy(update=changes), switched


def _respelt(
    home: ChatHome, model: Path, options: VideoChatOptions, parts: tuple[Path, ...], stage: int | None
) -> ChatHome:
    """A recognised home with what the options add to it."""
    if options.stage is None or (model / NAME).is_file():
        return dataclasses.replace(home, parts=(*home.parts, *parts), new=(*home.new, *options.new))
    chain = (*home.parts, *(p for p in parts if p not in home.parts))
    return ChatHome.assemble(
        path=model,
        llm=home.llm,
        bert=model / "bert" if (model / "bert").is_dir() else None,
        upstream=read_section(model / "config.json"),
        parts=chain,
        new=options.new,
        stage=stage,
        hd=options.stage == "hd",
    )


def _section(recipe: Recipe, options: VideoChatOptions) -> Mapping[str, Any]:
    section = _written_section(recipe, options)
    if not section:
        raise RecipeError(
            "the model's shape is not known: a language model is named, and no model section of upstream's",
            where=recipe.where("model"),
            fix="options.config: the section itself, or a JSON or YAML file with it",
        )
    return section


def _written_section(recipe: Recipe, options: VideoChatOptions) -> Mapping[str, Any]:
    """The section that the recipe names, or that lies in the directory of parts; empty where there is none."""
    if isinstance(options.config, dict):
        return section_of(options.config, where=options.where("config"))
    if options.config:
        return read_section(path_of(options, "config"))
    model = recipe.path("model")
    if model.is_dir() and recognises(model) and not (model / NAME).is_file():
        return read_section(model / "config.json")
    return {}
