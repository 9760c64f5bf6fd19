"""One Whisper, three spellings: the tensor names of OpenAI's, WeNet's and Hugging Face's files, as plain data.

Rows are templates with `{i}` for the layer. WeNet's positional tables have a leading axis of size one. OpenAI's files
hold the output projection once, as the embedding; the other two know it by a second, tied name. WeNet's output bias has
no counterpart: it is zero (wenet/models/whisper/convert_whisper_to_wenet_config_and_ckpt.py leaves it out, and loading
then keeps random values; transformers' modeling_whisper.py has `proj_out` without bias).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Final

from thawline.ckpt.formats.pieces import Planned, Zeros
from thawline.errors import CheckpointError

SPELLINGS: Final = ("openai", "wenet", "huggingface")


def _rows() -> Iterator[tuple[str, str, str]]:
    def leaves(
        openai: str, wenet: str, hf: str, names: tuple[str, ...] = ("weight", "bias")
    ) -> Iterator[tuple[str, str, str]]:
        for leaf in names:
            yield f"{openai}.{leaf}", f"{wenet}.{leaf}", f"{hf}.{leaf}"

    yield "encoder.positional_embedding", "encoder.embed.pos_enc.pe", "model.encoder.embed_positions.weight"
    yield from leaves("encoder.conv1", "encoder.embed.conv.0", "model.encoder.conv1")
    yield from leaves("encoder.conv2", "encoder.embed.conv.2", "model.encoder.conv2")
    yield from leaves("encoder.ln_post", "encoder.after_norm", "model.encoder.layer_norm")
    yield "decoder.token_embedding.weight", "decoder.embed.0.weight", "model.decoder.embed_tokens.weight"
    yield "decoder.positional_embedding", "decoder.embed.1.pe", "model.decoder.embed_positions.weight"
    yield from leaves("decoder.ln", "decoder.after_norm", "model.decoder.layer_norm")
    for side, wenet_side in (("encoder", "encoder.encoders"), ("decoder", "decoder.decoders")):
        o, w, h = f"{side}.blocks.{{i}}", f"{wenet_side}.{{i}}", f"model.{side}.layers.{{i}}"
        attentions = [("attn", "self_attn", "self_attn")]
        norms = [("attn_ln", "norm1", "self_attn_layer_norm")]
        if side == "decoder":
            attentions.append(("cross_attn", "src_attn", "encoder_attn"))
            norms.append(("cross_attn_ln", "norm2", "encoder_attn_layer_norm"))
        norms.append(("mlp_ln", "norm3" if side == "decoder" else "norm2", "final_layer_norm"))
        for a, b, c in attentions:
            yield from leaves(f"{o}.{a}.query", f"{w}.{b}.linear_q", f"{h}.{c}.q_proj")
            yield from leaves(f"{o}.{a}.key", f"{w}.{b}.linear_k", f"{h}.{c}.k_proj", ("weight",))  # keys have no bias
            yield from leaves(f"{o}.{a}.value", f"{w}.{b}.linear_v", f"{h}.{c}.v_proj")
            yield from leaves(f"{o}.{a}.out", f"{w}.{b}.linear_out", f"{h}.{c}.out_proj")
        for a, b, c in norms:
            yield from leaves(f"{o}.{a}", f"{w}.{b}", f"{h}.{c}")
        yield from leaves(f"{o}.mlp.0", f"{w}.feed_forward.w_1", f"{h}.fc1")
        yield from leaves(f"{o}.mlp.2", f"{w}.feed_forward.w_2", f"{h}.fc2")


ROWS: Final = tuple(_rows())
"""(OpenAI, WeNet, Hugging Face) templates of every tensor of OpenAI's file."""

TIED: Final[Mapping[str, str]] = {"wenet": "decoder.output_layer.weight", "huggingface": "proj_out.weight"}
"""The second name of the token embedding, per spelling."""

EMBEDDING: Final[Mapping[str, str]] = {
    "openai": "decoder.token_embedding.weight",
    "wenet": "decoder.embed.0.weight",
    "huggingface": "model.decoder.embed_tokens.weight",
}

LEADING_AXIS: Final = frozenset({"encoder.embed.pos_enc.pe", "decoder.embed.1.pe"})
"""WeNet names whose shape has one more axis, of size one, in front."""

OUTPUT_BIAS: Final = "decoder.output_layer.bias"
"""WeNet only; zero in a Whisper."""

WENET_HEAD: Final = ("ctc.ctc_lo.weight", "ctc.ctc_lo.bias")
"""WeNet only; a new head, which no Whisper holds."""

_SIGNATURE: Final = {
    "openai": ("encoder.positional_embedding", "decoder.token_embedding.weight", "decoder.ln.weight"),
    "wenet": ("encoder.embed.pos_enc.pe", "encoder.embed.conv.0.weight", "decoder.embed.1.pe"),
    "huggingface": (
        "model.encoder.conv1.weight",
        "model.decoder.embed_positions.weight",
        "model.encoder.embed_positions.weight",
    ),
}


def spelling(names: Iterable[str]) -> str | None:
    """Which spelling a set of tensor names is in; None if it is no Whisper."""
    have = set(names)
    return next((key for key, wanted in _SIGNATURE.items() if have.issuperset(wanted)), None)


def translate(name: str, source: str, target: str) -> str | None:
    """The name of the same tensor in another spelling; None if the table does not have it.

    >>> translate("decoder.blocks.3.cross_attn.query.bias", "openai", "wenet")
    'decoder.decoders.3.src_attn.linear_q.bias'
    """
    here, there = SPELLINGS.index(source), SPELLINGS.index(target)
    match = _LAYER.fullmatch(name)
    if match is None:
        return next((row[there] for row in ROWS if row[here] == name), None)
    template = f"{match[1]}{{i}}{match[3]}"
    found = next((row[there] for row in ROWS if row[here] == template), None)
    return None if found is None else found.replace("{i}", match[2])


def respell(tensors: Mapping[str, Planned], source: str, target: str) -> dict[str, Planned]:
    """The tensors of a Whisper in another spelling: names, the leading axis of WeNet's tables, ties, the zero bias.

    What the target does not know (a CTC head, an output bias, an untied output) is left out; `without` says what.
    """
    found: dict[str, Planned] = {}
    for name, tensor in tensors.items():
        renamed = translate(name, source, target)
        if renamed is None:
            continue
        shape = tensor.info.shape
        if name in LEADING_AXIS and shape[:1] == (1,):
            shape = shape[1:]
        if renamed in LEADING_AXIS:
            shape = (1, *shape)
        found[renamed] = tensor.renamed(renamed, shape=shape, tied_to=None)
    missing = {row[SPELLINGS.index(target)] for row in ROWS if "{i}" not in row[0]} - found.keys()
    if missing:
        raise CheckpointError(
            f"is no whole Whisper: {len(missing)} tensors are missing, first {min(missing)!r}",
            fix="give the base that has them (--base)",
        )
    embedding = found[EMBEDDING[target]]
    if target in TIED:
        found[TIED[target]] = embedding.renamed(TIED[target], tied_to=EMBEDDING[target])
    if target == "wenet":
        vocabulary = embedding.info.shape[0]
        info = replace(embedding.info, name=OUTPUT_BIAS, shape=(vocabulary,), origin="zero: Whisper has no output bias")
        found[OUTPUT_BIAS] = Planned(info=info, parts=(Zeros(vocabulary),), stored=embedding.stored)
    return found


def without(tensors: Mapping[str, Planned], source: str, target: str) -> tuple[str, ...]:
    """Names that `respell` leaves out."""
    return tuple(name for name in tensors if translate(name, source, target) is None)


_LAYER = re.compile(
    r"((?:encoder\.blocks|decoder\.blocks|encoder\.encoders|decoder\.decoders|model\.encoder\.layers|model\.decoder\.layers)\.)(\d{1,4})(\..+)"
)


# --- sizes and configuration ---


def dims_of(tensors: Mapping[str, Planned], heads: tuple[int, int] | None) -> dict[str, int]:
    """OpenAI's `dims` of a Whisper in OpenAI's spelling.

    heads: attention heads of encoder and decoder, which no tensor shows; None: 64 channels a head, as all of OpenAI's
    Raises CheckpointError if that does not divide the width.
    """
    shapes = {name: tensor.info.shape for name, tensor in tensors.items()}
    audio_ctx, audio_state = shapes["encoder.positional_embedding"][-2:]
    text_ctx, text_state = shapes["decoder.positional_embedding"][-2:]
    if heads is None:
        if audio_state % 64 or text_state % 64:
            raise CheckpointError(
                f"does not say how many attention heads there are, and its width {audio_state} is not of 64 a head",
                fix="convert a folder with its configuration (config.json or train.yaml)",
            )
        heads = audio_state // 64, text_state // 64

    def layers(side: str) -> int:
        return len({name.split(".")[2] for name in shapes if name.startswith(f"{side}.blocks.")})

    return {
        "n_mels": shapes["encoder.conv1.weight"][1],
        "n_vocab": shapes["decoder.token_embedding.weight"][0],
        "n_audio_ctx": audio_ctx,
        "n_audio_state": audio_state,
        "n_audio_head": heads[0],
        "n_audio_layer": layers("encoder"),
        "n_text_ctx": text_ctx,
        "n_text_state": text_state,
        "n_text_head": heads[1],
        "n_text_layer": layers("decoder"),
    }


def huggingface_config(dims: Mapping[str, int], ffn: int, dtype: str) -> dict[str, object]:
    """The `config.json` of a Whisper of these sizes; `ffn` is the feed-forward width.

    Special tokens are those of OpenAI's two vocabularies; for another vocabulary they are left empty.
    """
    if dims["n_audio_state"] != dims["n_text_state"]:
        raise CheckpointError("encoder and decoder differ in width, which Hugging Face's Whisper cannot be")
    vocabulary = dims["n_vocab"]
    multilingual = vocabulary >= 51865
    end = 50257 if multilingual else 50256 if vocabulary == 51864 else None
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "is_encoder_decoder": True,
        "vocab_size": vocabulary,
        "num_mel_bins": dims["n_mels"],
        "d_model": dims["n_audio_state"],
        "encoder_layers": dims["n_audio_layer"],
        "encoder_attention_heads": dims["n_audio_head"],
        "encoder_ffn_dim": ffn,
        "decoder_layers": dims["n_text_layer"],
        "decoder_attention_heads": dims["n_text_head"],
        "decoder_ffn_dim": ffn,
        "max_source_positions": dims["n_audio_ctx"],
        "max_target_positions": dims["n_text_ctx"],
        "tie_word_embeddings": True,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        **({} if end is None else {"decoder_start_token_id": end + 1}),
        "dtype": {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}[dtype],
    }
