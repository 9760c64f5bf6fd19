"""What a stage-1 model of VideoChat2 is made of, and upstream's configuration of it read with nothing passed over.

Names are those of `video_chat2/scripts/videochat_vicuna/config_7b_stage1.py`. This module imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from thawline.errors import RecipeError
from thawline.models.videochat.config import (
    QFormerConfig,
    VisionConfig,
    bert_sizes,
    refuse_unknown,
    vision_from_upstream,
)

_MODEL_KEYS = frozenset(
    {
        "vision_encoder", "vit_add_ln", "embed_dim", "temp", "qformer_num_query_tokens", "agg_method", "drop_path_rate",
        "qformer_hidden_dropout_prob", "qformer_attention_probs_dropout_prob",
    }
)  # fmt: skip
_WITHOUT_EFFECT = frozenset({"model_cls", "text_encoder", "freeze_vision_encoder", "requires_raw_text"})
_CRITERION_KEYS = frozenset({"loss_weight", "vtm_hard_neg", "vtm_add_text_cls", "vtm_cat_text_cls"})
_LOSSES = {"vtc": "contrastive", "vtm": "matching", "cap": "captioning"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AlignmentConfig:
    """A whole stage-1 model.

    embed_dim:   width of the space in which clips and captions are compared
    temperature: where the divisor of similarities begins; it is trained
    aggregate:   of the similarities of a clip's queries with a caption: their mean, or the largest
    match_by:    what tells a true pair from a false one: the mean of the queries, or that with the caption's [CLS]
                 added to it ("add") or beside it ("cat")
    hard_negatives: false partners are drawn by likeness, not evenly
    contrastive, matching, captioning: weights of the three losses; 0 leaves one out
    label_smoothing: of the captioning loss
    max_words:   tokens of a caption, [CLS] and [SEP] included
    """

    vision: VisionConfig = VisionConfig()
    qformer: QFormerConfig = QFormerConfig(extra_queries=0, padding="right")
    embed_dim: int = 768
    temperature: float = 0.07
    aggregate: Literal["mean", "max"] = "mean"
    match_by: Literal["queries", "add", "cat"] = "cat"
    hard_negatives: bool = True
    contrastive: float = 1.0
    matching: float = 1.0
    captioning: float = 1.0
    label_smoothing: float = 0.1
    max_words: int = 32

    def __post_init__(self) -> None:
        if self.aggregate not in ("mean", "max"):
            raise RecipeError(f"agg_method {self.aggregate!r} is not known", fix="mean, or max")
        if min(self.contrastive, self.matching, self.captioning) < 0 or not any(
            (self.contrastive, self.matching, self.captioning)
        ):
            raise RecipeError("the weights of the three losses are not negative, and one of them is above 0")
        if not 2 <= self.max_words <= self.qformer.max_positions:
            raise RecipeError(f"captions of {self.max_words} tokens do not fit {self.qformer.max_positions} positions")

    def to_json(self) -> dict[str, Any]:
        """Plain data; `alignment_from_json` gives the value back."""
        return dataclasses.asdict(self)


def alignment_from_json(data: Mapping[str, Any], *, where: str = "") -> AlignmentConfig:
    """The configuration that `AlignmentConfig.to_json` wrote. Raises RecipeError for unknown keys and odd values.

    >>> alignment_from_json(AlignmentConfig(embed_dim=16).to_json()).embed_dim
    16
    """
    try:
        inner = dict(data)
        inner["vision"], inner["qformer"] = VisionConfig(**inner["vision"]), QFormerConfig(**inner["qformer"])
        return AlignmentConfig(**inner)
    except (TypeError, KeyError) as exc:
        raise RecipeError(f"the model's configuration cannot be read: {exc}", where=where) from exc


def alignment_from_upstream(
    model: Mapping[str, Any], criterion: Mapping[str, Any], *, bert: Mapping[str, Any], max_words: int = 32
) -> AlignmentConfig:
    """The configuration that upstream's `model` and `criterion` sections mean.

    bert: the BERT config.json that the Q-Former takes its sizes from
    Raises RecipeError for a key that neither shapes the model nor is known to have no effect on it, and for a loss that
    upstream's stage 1 names and does not have (mlm, mvm).
    """
    refuse_unknown(model, _MODEL_KEYS | _WITHOUT_EFFECT, "the model section")
    refuse_unknown(criterion, _CRITERION_KEYS, "the criterion section")
    weights: dict[str, float] = {}
    for name, weight in dict(criterion.get("loss_weight") or {}).items():
        if name in _LOSSES:
            weights[_LOSSES[name]] = float(weight)
        elif weight:
            raise RecipeError(f"loss_weight.{name} has no effect upstream", fix=f"known: {', '.join(_LOSSES)}")
    seen = {**model.get("vision_encoder", {}), "vit_add_ln": bool(model.get("vit_add_ln", True))}
    qformer = QFormerConfig(
        **bert_sizes(bert),
        queries=int(model.get("qformer_num_query_tokens", 32)),
        extra_queries=0,
        hidden_dropout=float(model.get("qformer_hidden_dropout_prob", 0.1)),
        attention_dropout=float(model.get("qformer_attention_probs_dropout_prob", 0.1)),
        drop_path_rate=float(model.get("drop_path_rate", 0.0)),
        vocab_size=int(bert.get("vocab_size", 30522)) + 1,
        padding="right",
    )
    match_by: Literal["queries", "add", "cat"] = "queries"
    if criterion.get("vtm_add_text_cls", False):
        match_by = "add"
    elif criterion.get("vtm_cat_text_cls", False):
        match_by = "cat"
    return AlignmentConfig(
        vision=vision_from_upstream(seen),
        qformer=qformer,
        embed_dim=int(model.get("embed_dim", 768)),
        temperature=float(model.get("temp", 0.07)),
        aggregate=model.get("agg_method", "mean"),
        match_by=match_by,
        hard_negatives=bool(criterion.get("vtm_hard_neg", True)),
        max_words=max_words,
        **weights,
    )
