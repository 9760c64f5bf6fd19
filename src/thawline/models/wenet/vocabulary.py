"""Fine-tuning to other units: rows of shared tokens are kept, rows of new ones are drawn deliberately."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from thawline.core.rng import derive
from thawline.errors import RecipeError
from thawline.models.wenet.decoder import BiTransformerDecoder, TransformerDecoder
from thawline.models.wenet.model import U2Model


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyChange:
    """What became of every row.

    kept:    (old id, new id) in the order of new ids
    new:     new ids whose rows were drawn
    dropped: old ids whose rows are gone
    tensors: names of the tensors that changed their shape
    """

    size: int
    kept: tuple[tuple[int, int], ...]
    new: tuple[int, ...]
    dropped: tuple[int, ...]
    tensors: tuple[str, ...]


def resize_vocabulary_(model: U2Model, mapping: Mapping[int, int], size: int, key: int) -> VocabularyChange:
    """Give `model` a vocabulary of `size` tokens: row old goes to row mapping[old], in CTC and in both decoders.

    A new row is drawn from a normal distribution with the mean and deviation, per dimension, of the rows that were kept
    (Hewitt 2021, "Initializing new word embeddings"), a new bias is their mean. Each row has its own random stream,
    derived from `key`, the tensor's name and the new id, so it does not depend on what else is new. Tied weights stay
    tied.

    Raises RecipeError for ids outside either vocabulary, two tokens for one row, and where blank, sos or eos would be
    lost; Whisper's vocabulary belongs to its tokenizer and is refused.
    """
    config = model.config
    if config.is_whisper:
        raise RecipeError("Whisper's vocabulary cannot be changed", fix="keep its tokenizer")
    _check(mapping, size, config.vocabulary)
    for name, old in (("blank", config.blank), ("sos", config.sos), ("eos", config.eos)):
        if old not in mapping:
            raise RecipeError(
                f"the new units have no {name} (old id {old})",
                where="units",
                fix="keep <blank> and <sos/eos> in units.txt",
            )
    kept = tuple(sorted(mapping.items(), key=lambda pair: pair[1]))
    taken = set(mapping.values())
    new = tuple(i for i in range(size) if i not in taken)
    changed: list[str] = []
    made: dict[int, nn.Parameter] = {}  # old parameter -> new one, for tied weights
    for name, module, leaf in list(_rows(model)):
        old_rows: nn.Parameter = getattr(module, leaf)
        if id(old_rows) not in made:
            rows = _resized(old_rows.detach(), kept, new, size, derive(key, "vocabulary", name))
            made[id(old_rows)] = nn.Parameter(rows, requires_grad=old_rows.requires_grad)
        setattr(module, leaf, made[id(old_rows)])
        if isinstance(module, nn.Embedding):
            module.num_embeddings = size
        elif isinstance(module, nn.Linear):
            module.out_features = size
        changed.append(name)
    model.config = replace(
        config,
        vocabulary=size,
        blank=mapping[config.blank],
        sos=mapping[config.sos],
        eos=mapping[config.eos],
        special_tokens={k: mapping[v] for k, v in config.special_tokens.items() if v in mapping},
    )
    model.ctc.blank = model.config.blank
    dropped = tuple(i for i in range(config.vocabulary) if i not in mapping)
    return VocabularyChange(size=size, kept=kept, new=new, dropped=dropped, tensors=tuple(changed))


def resized_values(values: Mapping[str, Any], change: VocabularyChange) -> dict[str, Any]:
    """The train.yaml (as plain data) that describes the changed model."""
    mapping = dict(change.kept)
    out = {**values, "output_dim": change.size, "vocab_size": change.size}
    ctc = dict(values.get("ctc_conf") or {})
    ctc["ctc_blank_id"] = mapping[int(ctc.get("ctc_blank_id", 0))]
    tokenizer = dict(values.get("tokenizer_conf") or {})
    special = dict(tokenizer.get("special_tokens") or {})
    old = int(values["output_dim"])
    for name in ("<sos>", "<eos>"):  # absent ones mean the last id, which is another id now
        special.setdefault(name, old - 1)
    tokenizer["special_tokens"] = {k: mapping[v] for k, v in special.items() if v in mapping}
    return {**out, "ctc_conf": ctc, "tokenizer_conf": tokenizer}


def _rows(model: U2Model) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, module, attribute) of every tensor with a row per token."""
    for leaf in ("weight", "bias"):
        yield f"ctc.ctc_lo.{leaf}", model.ctc.ctc_lo, leaf
    decoders: list[tuple[str, TransformerDecoder]] = []
    if isinstance(model.decoder, BiTransformerDecoder):
        decoders = [
            ("decoder.left_decoder", model.decoder.left_decoder),
            ("decoder.right_decoder", model.decoder.right_decoder),
        ]
    elif model.decoder is not None:
        decoders = [("decoder", model.decoder)]
    for prefix, decoder in decoders:
        yield f"{prefix}.embed.0.weight", decoder.embed[0], "weight"
        for leaf in ("weight", "bias"):
            yield f"{prefix}.output_layer.{leaf}", decoder.output_layer, leaf


def _resized(rows: Tensor, kept: tuple[tuple[int, int], ...], new: tuple[int, ...], size: int, key: int) -> Tensor:
    out = rows.new_empty(size, *rows.shape[1:])
    source = torch.tensor([old for old, _ in kept], device=rows.device)
    shared = rows[source]
    out[torch.tensor([to for _, to in kept], device=rows.device)] = shared
    mean = shared.float().mean(0)
    deviation = shared.float().std(0, correction=0)
    for row in new:
        if rows.ndim == 1:
            out[row] = mean.to(rows.dtype)
            continue
        generator = torch.Generator().manual_seed(derive(key, row))
        noise = torch.randn(rows.shape[1:], generator=generator).to(rows.device)
        out[row] = (mean + deviation * noise).to(rows.dtype)
    return out


def _check(mapping: Mapping[int, int], size: int, vocabulary: int) -> None:
    seen: dict[int, int] = {}
    for old, to in mapping.items():
        if not 0 <= old < vocabulary:
            raise RecipeError(f"old id {old} is outside the vocabulary of {vocabulary}", where="mapping")
        if not 0 <= to < size:
            raise RecipeError(f"new id {to} is outside the vocabulary of {size}", where="mapping")
        if to in seen:
            raise RecipeError(f"old ids {seen[to]} and {old} both go to {to}", where="mapping")
        seen[to] = old
