"""One Whisper, three spellings: parameter names in OpenAI's, WeNet's and Hugging Face's files, as plain data.

Rules are templates with `N` for a layer number. This module reads and writes no file and imports no torch; conversion
is told of these rules by value.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from thawline.core.whisper import LANGUAGES as LANGUAGES


@dataclass(frozen=True, slots=True, kw_only=True)
class NameRule:
    """One tensor under its three names.

    leading_axis: WeNet's shape has one more leading axis of size 1 (positional tables)
    """

    openai: str
    wenet: str
    huggingface: str
    leading_axis: bool = False


def _block(side: str) -> Iterator[NameRule]:
    """The rules of one layer of the encoder or decoder."""
    o, w, h = f"{side}.blocks.N", f"{side}.{side}s.N", f"model.{side}.layers.N"
    attentions = [("attn", "self_attn", "self_attn")]
    norms = [("attn_ln", "norm1", "self_attn_layer_norm")]
    if side == "decoder":
        attentions.append(("cross_attn", "src_attn", "encoder_attn"))
        norms.append(("cross_attn_ln", "norm2", "encoder_attn_layer_norm"))
    norms.append(("mlp_ln", "norm3" if side == "decoder" else "norm2", "final_layer_norm"))
    for ours, wenet, hf in attentions:
        for part, linear, proj in (
            ("query", "linear_q", "q_proj"),
            ("key", "linear_k", "k_proj"),
            ("value", "linear_v", "v_proj"),
            ("out", "linear_out", "out_proj"),
        ):
            for leaf in ("weight",) if part == "key" else ("weight", "bias"):
                yield NameRule(
                    openai=f"{o}.{ours}.{part}.{leaf}",
                    wenet=f"{w}.{wenet}.{linear}.{leaf}",
                    huggingface=f"{h}.{hf}.{proj}.{leaf}",
                )
    for ours, wenet, hf in (
        *norms,
        ("mlp.0", "feed_forward.w_1", "fc1"),
        ("mlp.2", "feed_forward.w_2", "fc2"),
    ):
        for leaf in ("weight", "bias"):
            yield NameRule(
                openai=f"{o}.{ours}.{leaf}",
                wenet=f"{w}.{wenet}.{leaf}",
                huggingface=f"{h}.{hf}.{leaf}",
            )


def _table() -> Iterator[NameRule]:
    for conv, index in (("conv1", 0), ("conv2", 2)):
        for leaf in ("weight", "bias"):
            yield NameRule(
                openai=f"encoder.{conv}.{leaf}",
                wenet=f"encoder.embed.conv.{index}.{leaf}",
                huggingface=f"model.encoder.{conv}.{leaf}",
            )
    yield NameRule(
        openai="encoder.positional_embedding",
        wenet="encoder.embed.pos_enc.pe",
        huggingface="model.encoder.embed_positions.weight",
        leading_axis=True,
    )
    yield from _block("encoder")
    for leaf in ("weight", "bias"):
        yield NameRule(
            openai=f"encoder.ln_post.{leaf}",
            wenet=f"encoder.after_norm.{leaf}",
            huggingface=f"model.encoder.layer_norm.{leaf}",
        )
    yield NameRule(
        openai="decoder.token_embedding.weight",
        wenet="decoder.embed.0.weight",
        huggingface="model.decoder.embed_tokens.weight",
    )
    yield NameRule(
        openai="decoder.positional_embedding",
        wenet="decoder.embed.1.pe",
        huggingface="model.decoder.embed_positions.weight",
        leading_axis=True,
    )
    yield from _block("decoder")
    for leaf in ("weight", "bias"):
        yield NameRule(
            openai=f"decoder.ln.{leaf}",
            wenet=f"decoder.after_norm.{leaf}",
            huggingface=f"model.decoder.layer_norm.{leaf}",
        )


NAME_RULES: tuple[NameRule, ...] = tuple(_table())
"""Every tensor of OpenAI's file, once, with `N` for the layer."""

TIED: Mapping[str, tuple[str, str]] = {
    "wenet": ("decoder.output_layer.weight", "decoder.embed.0.weight"),
    "huggingface": ("proj_out.weight", "model.decoder.embed_tokens.weight"),
}
"""Per spelling: (a second name, the name whose tensor it is). OpenAI's files hold the tensor once."""

WENET_ONLY: Mapping[str, str] = {
    "decoder.output_layer.bias": "zero: Whisper has no output bias",
    "ctc.ctc_lo.weight": "new: Whisper has no CTC head",
    "ctc.ctc_lo.bias": "new: Whisper has no CTC head",
}
"""WeNet tensors without a counterpart, and what a conversion must set them to."""

Spelling = Literal["openai", "wenet", "huggingface"]

_LAYER = re.compile(r"(\.(?:blocks|encoders|decoders|layers)\.)(\d+)(?=\.)")
_BY_NAME: Mapping[str, Mapping[str, NameRule]] = {
    spelling: {getattr(rule, spelling): rule for rule in NAME_RULES} for spelling in ("openai", "wenet", "huggingface")
}


def rule_of(name: str, spelling: Spelling) -> NameRule | None:
    """The rule of one tensor, or None for a name that is no Whisper tensor of this spelling."""
    return _BY_NAME[spelling].get(_LAYER.sub(r"\1N", name))


def translate(name: str, source: Spelling, target: Spelling) -> str | None:
    """The same tensor's name in another spelling; None where there is none (tied copies, WeNet's CTC head).

    >>> translate("decoder.blocks.3.mlp_ln.bias", "openai", "wenet")
    'decoder.decoders.3.norm3.bias'
    >>> translate("ctc.ctc_lo.bias", "wenet", "openai") is None
    True
    """
    rule = rule_of(name, source)
    if rule is None:
        return None
    layer = _LAYER.search(name)
    other: str = getattr(rule, target)
    return other.replace(".N.", f".{layer[2]}.") if layer else other
