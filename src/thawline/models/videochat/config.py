"""What a VideoChat2 model is made of: typed, frozen, and read from upstream's configuration with nothing passed over.

The names are those of OpenGVLab/Ask-Anything (`video_chat2/scripts/*/config_7b_stage*.py`, `configs/*.json`). Where
upstream's own behaviour surprises, the field says so and `VideoChatConfig.as_upstream()` gives it back exactly. This
module imports no torch.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from thawline.errors import RecipeError

Family = Literal["mistral", "vicuna", "phi"]

FAMILIES: tuple[Family, ...] = ("mistral", "vicuna", "phi")

STEM: Mapping[Family, str] = {"mistral": "mistral", "vicuna": "llama", "phi": "phi"}
"""How upstream spells a family in names of tensors: `mistral_model`, `llama_proj`, ..."""

MODEL_TYPE: Mapping[str, Family] = {"mistral": "mistral", "llama": "vicuna", "phi3": "phi"}
"""`model_type` of a Hugging Face config.json -> family."""

LORA_TARGETS: Mapping[Family, tuple[str, ...]] = {
    "mistral": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"),
    "vicuna": ("q_proj", "v_proj"),
    "phi": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"),
}
"""Layers that carry adapters. Upstream lists Mistral's names for Phi-3 too, whose layers are called otherwise, so that
only o_proj, down_proj and lm_head are adapted there; `LoraConfig.allow_unmatched` allows that."""

# Keys of upstream's `model` section that do not shape the network built here.
_WITHOUT_EFFECT = frozenset(
    {
        "add_second_msg", "debug", "dynamic_config", "end_sym", "freeze_llm", "freeze_lora", "freeze_qformer",
        "freeze_vit", "img_prompt_path", "llama_model_path", "llm_bf16", "low_resource", "mistral_model_path",
        "model_cls", "phi_model_path", "prompt_path", "prompt_template", "random_shuffle",
        "return_question_instruction", "system", "use_flash_attention", "videochat2_model_path", "vit_blip_model_path",
        "start_token", "end_token", "img_start_token", "img_end_token", "gpt_model_path", "videochat_model_path",
    }
)  # fmt: skip
_VISION_WITHOUT_EFFECT = frozenset({"name", "d_model", "pretrained"})


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """The UMT vision transformer.

    img_size, patch_size: pixels
    depth:        blocks of the pretrained network; `blocks_run` of them are built
    return_index: which block's output is used, counted from the end; -2 leaves the last block away
    num_frames:   frames per clip the run is meant for; any other number works, its position table is computed
    checkpoint_blocks: the first so many blocks recompute their activations in the backward pass (never reentrant)
    """

    img_size: int = 224
    patch_size: int = 16
    width: int = 1024
    depth: int = 24
    heads: int = 16
    return_index: int = -2
    num_frames: int = 4
    tubelet_size: int = 1
    drop_path_rate: float = 0.0
    add_layernorm: bool = True
    with_ln: bool = False
    checkpoint_blocks: int = 0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise RecipeError(f"vision width {self.width} is not divisible by {self.heads} heads")
        if self.img_size % self.patch_size:
            raise RecipeError(f"img_size {self.img_size} is not a multiple of patch_size {self.patch_size}")
        if not 1 <= self.blocks_run <= self.depth:
            raise RecipeError(f"return_index {self.return_index} of {self.depth} blocks leaves {self.blocks_run}")

    @property
    def blocks_run(self) -> int:
        return self.depth + self.return_index + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class QFormerConfig:
    """The Q-Former: BERT whose queries attend to the frames in every `cross_attention_every`th layer.

    vocab_size: rows of the word embedding, the added `[DEC]` included (30523 for bert-base-uncased)
    text_input: whether the instruction's words run through it beside the queries (stage 3 on)
    padding:    side on which shorter instructions of a batch are padded
    positions:  "own" counts each instruction's positions from its own first token, so that a sample does not depend on
                its neighbours; "upstream" counts over the padding too, which moves left-padded instructions
    """

    hidden_size: int = 768
    layers: int = 12
    heads: int = 12
    intermediate_size: int = 3072
    vocab_size: int = 30523
    max_positions: int = 512
    layer_norm_eps: float = 1e-12
    cross_attention_every: int = 2
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    drop_path_rate: float = 0.1
    queries: int = 32
    extra_queries: int = 64
    text_input: bool = True
    padding: Literal["left", "right"] = "left"
    positions: Literal["own", "upstream"] = "own"

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads:
            raise RecipeError(f"Q-Former width {self.hidden_size} is not divisible by {self.heads} heads")
        if self.queries < 1 or self.extra_queries < 0:
            raise RecipeError(f"{self.queries} queries and {self.extra_queries} extra ones cannot be meant")

    @property
    def all_queries(self) -> int:
        """Visual tokens that one clip (or one tile of it) becomes."""
        return self.queries + self.extra_queries


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Adapters on the language model, made by peft. alpha / r scales them; alpha is in no checkpoint."""

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.1
    targets: tuple[str, ...] = ()
    allow_unmatched: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise RecipeError(f"a LoRA rank of {self.r} cannot be meant")


@dataclass(frozen=True, slots=True, kw_only=True)
class TileConfig:
    """The HD variant: a clip is cut into square tiles, each seen by itself, and once more as a whole.

    size:        side of a tile in pixels
    max_tiles:   tiles that a clip is resized to at most
    padding:     keep the aspect ratio and pad, instead of stretching to the nearest grid
    global_view: whether the whole clip, shrunk to one tile, is seen too (also where the clip is one tile)
    """

    size: int = 224
    max_tiles: int = 6
    padding: bool = False
    global_view: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoChatConfig:
    """A whole model. `family` decides names, templates and default LoRA targets.

    max_text_tokens: text tokens of one conversation, bos included; longer ones are cut at the end
    bos:  "embedding" puts the bos token's embedding first; "id" writes the token's number into every channel, as
          upstream's instruction-tuned models do in training (`inputs_embeds[:, :1] = bos_token_id`), not in its demos
    tiles: the HD variant, in which a clip is cut into tiles; None for one view of a clip
    """

    family: Family = "mistral"
    vision: VisionConfig = VisionConfig()
    qformer: QFormerConfig = QFormerConfig()
    lora: LoraConfig | None = None
    max_text_tokens: int = 512
    bos: Literal["embedding", "id"] = "embedding"
    tiles: TileConfig | None = None

    @property
    def llm_name(self) -> str:
        return f"{STEM[self.family]}_model"

    @property
    def projection_name(self) -> str:
        return f"{STEM[self.family]}_proj"

    def as_upstream(self) -> VideoChatConfig:
        """The same model with upstream's surprises: bos written as a number, positions over padding, LoRA list."""
        lora = self.lora
        if lora is not None and self.family == "phi":
            lora = dataclasses.replace(lora, targets=LORA_TARGETS["mistral"], allow_unmatched=True)
        return dataclasses.replace(
            self, bos="id", qformer=dataclasses.replace(self.qformer, positions="upstream"), lora=lora
        )

    def for_captions(self) -> VideoChatConfig:
        """The same model for stage 2: no instruction in the Q-Former, no adapters, the true bos embedding."""
        qformer = dataclasses.replace(self.qformer, text_input=False)
        return dataclasses.replace(self, qformer=qformer, lora=None, bos="embedding")

    def to_json(self) -> dict[str, Any]:
        """Plain data; `config_from_json` gives the value back."""
        return dataclasses.asdict(self)


def config_from_json(data: Mapping[str, Any], *, where: str = "") -> VideoChatConfig:
    """The configuration that `VideoChatConfig.to_json` wrote. Raises RecipeError for unknown keys and odd values.

    >>> config_from_json(VideoChatConfig(lora=LoraConfig(r=4)).to_json()).lora.r
    4
    """
    inner = dict(data)
    try:
        inner["vision"] = VisionConfig(**inner.get("vision", {}))
        inner["qformer"] = QFormerConfig(**inner.get("qformer", {}))
        if inner.get("lora") is not None:
            inner["lora"] = LoraConfig(**{**inner["lora"], "targets": tuple(inner["lora"].get("targets", ()))})
        if inner.get("tiles") is not None:
            inner["tiles"] = TileConfig(**inner["tiles"])
        made = VideoChatConfig(**inner)
    except (TypeError, AttributeError) as exc:
        raise RecipeError(f"the model's configuration cannot be read: {exc}", where=where) from exc
    if made.family not in FAMILIES:
        raise RecipeError(f"unknown family {made.family!r}", where=where, fix=f"known: {', '.join(FAMILIES)}")
    return made


def from_upstream(
    model: Mapping[str, Any], *, family: Family, bert: Mapping[str, Any] | None = None, vocab_size: int | None = None
) -> VideoChatConfig:
    """The configuration that upstream's `model` section means.

    family:     which class of upstream's reads it (it stands in `model_cls`, not in a setting)
    bert:       the Q-Former's BERT config.json; bert-base-uncased's sizes where None
    vocab_size: rows of the word embedding; the BERT vocabulary and one for `[DEC]` where None

    Raises RecipeError for a key that neither shapes the network nor is known to have no effect on it.
    """
    refuse_unknown(model, _MODEL_KEYS | _WITHOUT_EFFECT, "the model section")
    sizes = bert_sizes(bert) if bert is not None else {}
    rows = vocab_size if vocab_size is not None else int(dict(bert or {}).get("vocab_size", 30522)) + 1
    qformer = {field: model[key] for key, field in _QFORMER_KEYS.items() if key in model}
    qformer.setdefault("extra_queries", 32)
    qformer.setdefault("text_input", family == "vicuna")  # upstream's own defaults differ by class
    lora = None
    if model.get("use_lora", False):
        lora = LoraConfig(
            r=int(model.get("lora_r", 8)),
            alpha=float(model.get("lora_alpha", 32)),
            dropout=float(model.get("lora_dropout", 0.05)),
            targets=LORA_TARGETS[family],
        )
    tiles = None
    if "_hd_" in str(model.get("model_cls", "")):
        hd = dict(model.get("dynamic_config") or {})
        refuse_unknown(hd, frozenset({"local_size", "hd_num", "padding", "add_global"}), "dynamic_config")
        tiles = TileConfig(
            size=int(hd.get("local_size", 224)),
            max_tiles=int(hd.get("hd_num", 6)),
            padding=bool(hd.get("padding", False)),
            global_view=bool(hd.get("add_global", True)),
        )
    return VideoChatConfig(
        family=family,
        vision=vision_from_upstream(model.get("vision_encoder", {})),
        qformer=QFormerConfig(**sizes, **qformer, vocab_size=rows, padding="right" if family == "vicuna" else "left"),
        lora=lora,
        max_text_tokens=int(model.get("max_txt_len", 32)),
        tiles=tiles,
    )


_VISION_KEYS = {
    "img_size": "img_size",
    "patch_size": "patch_size",
    "encoder_embed_dim": "width",
    "encoder_depth": "depth",
    "encoder_num_heads": "heads",
    "return_index": "return_index",
    "num_frames": "num_frames",
    "tubelet_size": "tubelet_size",
    "drop_path_rate": "drop_path_rate",
    "vit_add_ln": "add_layernorm",
    "with_ln": "with_ln",
    "checkpoint_num": "checkpoint_blocks",
    "ckpt_num_frame": "",
}
_QFORMER_KEYS = {
    "num_query_token": "queries",
    "extra_num_query_token": "extra_queries",
    "qformer_hidden_dropout_prob": "hidden_dropout",
    "qformer_attention_probs_dropout_prob": "attention_dropout",
    "qformer_drop_path_rate": "drop_path_rate",
    "qformer_text_input": "text_input",
}
_BERT_KEYS = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_positions",
    "layer_norm_eps": "layer_norm_eps",
}
_MODEL_KEYS = frozenset(_QFORMER_KEYS) | {
    "vision_encoder", "max_txt_len", "use_lora", "lora_r", "lora_alpha", "lora_dropout",
}  # fmt: skip


def vision_from_upstream(section: Mapping[str, Any]) -> VisionConfig:
    """What upstream's `vision_encoder` section means. Raises RecipeError for an unknown key."""
    refuse_unknown(section, frozenset(_VISION_KEYS) | _VISION_WITHOUT_EFFECT | {"use_checkpoint"}, "vision_encoder")
    if int(section.get("ckpt_num_frame", 4)) != 4:
        raise RecipeError(
            f"ckpt_num_frame {section['ckpt_num_frame']} has no effect upstream: its position table is always that of "
            "4",
            fix="set ckpt_num_frame: 4, or leave it out",
        )
    vision = {field: section[key] for key, field in _VISION_KEYS.items() if key in section and field}
    if not section.get("use_checkpoint", False):
        vision["checkpoint_blocks"] = 0
    return VisionConfig(**vision)


def bert_sizes(bert: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `QFormerConfig` that a BERT config.json gives."""
    return {field: bert[key] for key, field in _BERT_KEYS.items() if key in bert}


def refuse_unknown(given: Mapping[str, Any], known: frozenset[str], what: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), sorted(known), n=1)
            raise RecipeError(
                f"{what} has an unknown key {key!r}",
                fix=f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}",
            )
