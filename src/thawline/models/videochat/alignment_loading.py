"""Where the tensors of a stage-1 model come from: a vision transformer's file, BERT's, or a stage-1 file of upstream's.

Stage 1 begins with two strangers. UMT's file (`l16_25m.pth`) holds the vision transformer without a prefix and with
blocks that VideoChat2 does not run; BERT's holds words and layers, and nothing that looks at frames. Upstream loads
both with `strict=False`. Here every tensor of the model has a supplier, or is named among what begins anew. Names and
shapes only; torch is never imported.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from thawline.errors import CheckpointError

Shapes = Mapping[str, Sequence[int]]
New = Literal["queries", "crossattention", "heads", "vision_layernorm"]

_NEW: Mapping[New, re.Pattern[str]] = {
    "queries": re.compile(r"^query_tokens$"),
    "crossattention": re.compile(r"\.crossattention\."),
    "heads": re.compile(r"^(vision_temp_embed$|temp$|vision_proj\.|text_proj\.|itm_head\.)"),
    "vision_layernorm": re.compile(r"^vision_layernorm\."),
}
_BERT = re.compile(r"^(bert\.)?(embeddings|encoder)\.")
_BERT_LEFT_OUT = re.compile(r"^(bert\.)?(embeddings\.(token_type_embeddings|position_ids)|pooler)|^cls\.seq_")
_FEED_FORWARD = re.compile(r"\.(intermediate|output)\.(?=dense|LayerNorm)")
WORDS = "qformer.bert.embeddings.word_embeddings.weight"
"""BERT's matrix has a row less than the model's: that of `[DEC]`, which begins anew."""
_ROWS = (WORDS, "qformer.cls.predictions.bias", "qformer.cls.predictions.decoder.weight",
         "qformer.cls.predictions.decoder.bias")  # fmt: skip
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class Supply:
    """What one file gives: name in the model -> name in the file; left_out: names in the file that no stage-1 model
    has a place for, known to be in such files."""

    label: str
    tensors: Mapping[str, str]
    left_out: tuple[str, ...] = ()


def supply_of(label: str, file: Shapes, model: Shapes) -> Supply:
    """What a file of any of the three kinds gives to the model.

    Raises CheckpointError where it is none of them, or a tensor has another shape than in the model.
    """
    if "query_tokens" in file:
        given, left_out = _own(label, file, model)
    elif any(name.startswith(("encoder.blocks.", "vision_encoder.encoder.blocks.")) for name in file):
        given, left_out = _vision(file, model)
    elif any(_BERT.match(name) for name in file):
        given, left_out = _bert(file, model)
    else:
        raise CheckpointError(
            f"its tensors ({_some(list(file))}) are of no vision transformer, no BERT and no stage-1 model",
            where=label,
            fix="give UMT's file (l16_25m.pth), bert-base-uncased's weights, or umt_l16_qformer.pth",
        )
    for target, name in given.items():
        there, here = tuple(file[name]), tuple(model[target])
        if there != here and not (target in _ROWS and (there[0] + 1, *there[1:]) == here):
            raise CheckpointError(f"{name} has shape {there}, and {here} in the model ({target})", where=label)
    return Supply(label, given, left_out)


def begin_anew(model: Iterable[str], supplies: Sequence[Supply], new: Collection[New]) -> tuple[str, ...]:
    """Tensors that no file supplies. Raises CheckpointError for those of them that nobody said begin anew."""
    supplied = {name for supply in supplies for name in supply.tensors}
    absent = [name for name in model if name not in supplied and not name.endswith(".position_ids")]
    missing = [name for name in absent if not any(_NEW[part].search(name) for part in new)]
    if missing:
        parts = [part for part, pattern in _NEW.items() if any(pattern.search(name) for name in missing)]
        rest = [name for name in missing if not any(p.search(name) for p in _NEW.values())]
        fix = f"options.new: [{', '.join(parts)}] begins them here" if parts else ""
        if rest:
            fix = "; ".join(filter(None, (f"a file with {rest[0]} is needed among model and options.parts", fix)))
        raise CheckpointError(
            f"{len(missing)} tensors come from no file: {_some(missing)}",
            where=" + ".join(s.label for s in supplies),
            fix=fix,
        )
    return tuple(absent)


def _own(label: str, file: Shapes, model: Shapes) -> tuple[dict[str, str], tuple[str, ...]]:
    unknown = [name for name in file if name not in model]
    if unknown:
        raise CheckpointError(f"{len(unknown)} tensors have no place in a stage-1 model: {_some(unknown)}", where=label)
    return {name: name for name in file}, ()


def _vision(file: Shapes, model: Shapes) -> tuple[dict[str, str], tuple[str, ...]]:
    named = {name if name.startswith("vision_encoder.") else f"vision_encoder.{name}": name for name in file}
    return {t: n for t, n in named.items() if t in model}, tuple(n for t, n in named.items() if t not in model)


def _bert(file: Shapes, model: Shapes) -> tuple[dict[str, str], tuple[str, ...]]:
    given: dict[str, str] = {}
    left_out: list[str] = []
    for name in file:
        if _BERT_LEFT_OUT.search(name):
            left_out.append(name)
            continue
        bare = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        target = "qformer." + (bare if bare.startswith(("bert.", "cls.")) else f"bert.{bare}")
        query = _FEED_FORWARD.sub(r".\1_query.", target)  # upstream copies them: the queries begin as words do
        targets = [t for t in dict.fromkeys((target, query)) if t in model]
        given.update((t, name) for t in targets)
        if not targets:
            left_out.append(name)
    bias = "qformer.cls.predictions.bias"
    if bias in given:
        given.setdefault("qformer.cls.predictions.decoder.bias", given[bias])
    if WORDS in given:
        given.setdefault("qformer.cls.predictions.decoder.weight", given[WORDS])
    return given, tuple(left_out)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
