"""What a WeNet train.yaml says about the model: typed, frozen, and checked.

Only what shapes the network or its losses is read. Training-only parts of the file (optimizer, dataset, logging) are
not looked at; a value that would make another network than the one built here is refused, never passed over. This
module imports no torch, so a directory can be recognised and checked without it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from thawline.errors import RecipeError

Activation = Literal["hardtanh", "tanh", "relu", "selu", "swish", "gelu"]
InputLayer = Literal["linear", "conv1d2", "conv2d", "conv2d6", "conv2d8"]
Position = Literal["abs_pos", "embed", "rel_pos", "no_pos", "abs_pos_whisper", "embed_learnable_pe"]
TokenPosition = Literal["embed", "abs_pos", "abs_pos_whisper", "embed_learnable_pe"]
SelfAttention = Literal["selfattn", "rel_selfattn"]
ConvNorm = Literal["batch_norm", "layer_norm"]

SUBSAMPLING_RATE: Mapping[str, int] = {
    "linear": 1,
    "conv1d2": 2,
    "conv2d": 4,
    "conv2d6": 6,
    "conv2d8": 8,
}
"""Input frames per encoder frame."""

# WeNet accepts these keys and gives them one meaning only in the networks built here; any other value is another
# network.
_ENCODER_FIXED: Mapping[str, object] = {
    "layer_norm_type": "layer_norm",
    "mlp_type": "position_wise_feed_forward",
    "mlp_bias": True,
    "n_kv_head": None,
    "head_dim": None,
}
_DECODER_FIXED = _ENCODER_FIXED
# ... and these change nothing at all: how attention is computed, and sizes of parts that are refused above.
_WITHOUT_EFFECT = frozenset({"use_sdpa", "n_expert", "n_expert_activated", "positionwise_conv_kernel_size"})


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """`encoder` and `encoder_conf`, with WeNet's names and defaults."""

    kind: Literal["transformer", "conformer"]
    input_size: int
    """Values per input frame (mel bins)."""
    output_size: int = 256
    attention_heads: int = 4
    linear_units: int = 2048
    num_blocks: int = 6
    dropout_rate: float = 0.1
    positional_dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.0
    input_layer: InputLayer = "conv2d"
    pos_enc_layer_type: Position = "abs_pos"
    normalize_before: bool = True
    static_chunk_size: int = 0
    """Encoder frames; used also in decoding. Zero or less: no static chunks."""
    use_dynamic_chunk: bool = False
    use_dynamic_left_chunk: bool = False
    query_bias: bool = True
    key_bias: bool = True
    value_bias: bool = True
    activation_type: Activation = "relu"
    gradient_checkpointing: bool = False
    norm_eps: float = 1e-5
    selfattention_layer_type: SelfAttention = "selfattn"
    # Conformer only:
    macaron_style: bool = True
    use_cnn_module: bool = True
    cnn_module_kernel: int = 15
    causal: bool = False
    cnn_module_norm: ConvNorm = "batch_norm"
    conv_bias: bool = True
    conv_norm_eps: float = 1e-5
    conv_inner_factor: int = 2
    final_norm: bool = True

    @property
    def subsampling_rate(self) -> int:
        """Input frames per encoder frame."""
        return SUBSAMPLING_RATE[self.input_layer]

    @property
    def has_chunks(self) -> bool:
        """Whether the encoder was trained to see bounded context."""
        return self.use_dynamic_chunk or self.static_chunk_size > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """`decoder` and `decoder_conf`, with WeNet's names and defaults."""

    kind: Literal["transformer", "bitransformer"]
    attention_heads: int = 4
    linear_units: int = 2048
    num_blocks: int = 6
    r_num_blocks: int = 0
    """Layers of the right-to-left decoder (bitransformer only)."""
    dropout_rate: float = 0.1
    positional_dropout_rate: float = 0.1
    self_attention_dropout_rate: float = 0.0
    src_attention_dropout_rate: float = 0.0
    input_layer: TokenPosition = "embed"
    normalize_before: bool = True
    query_bias: bool = True
    key_bias: bool = True
    value_bias: bool = True
    src_query_bias: bool = True
    src_key_bias: bool = True
    src_value_bias: bool = True
    activation_type: Activation = "relu"
    gradient_checkpointing: bool = False
    tie_word_embedding: bool = False
    norm_eps: float = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """`lora_conf`: which square projections carry low-rank factors, and their scale alpha / rank."""

    lora_modules: tuple[str, ...]
    lora_attn_attr: tuple[str, ...] = ("self_attn", "src_attn")
    lora_list: tuple[str, ...] = ("linear_out", "linear_q", "linear_k", "linear_v")
    lora_rank: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0

    @property
    def scale(self) -> float:
        return self.lora_alpha / self.lora_rank


@dataclass(frozen=True, slots=True, kw_only=True)
class U2Config:
    """A whole recogniser: encoder, CTC head, attention decoder and how their losses are joined."""

    kind: Literal["asr_model", "whisper"]
    vocabulary: int
    """Rows of the CTC head, of the token embedding and of the output layers."""
    encoder: EncoderConfig
    decoder: DecoderConfig | None
    ctc_weight: float = 0.5
    reverse_weight: float = 0.0
    lsm_weight: float = 0.0
    """Label smoothing of the attention loss."""
    length_normalized_loss: bool = False
    blank: int = 0
    sos: int
    eos: int
    special_tokens: Mapping[str, int] = field(default_factory=dict)
    cmvn_file: str = ""
    """As written in the file, relative to where WeNet was run; empty: no global CMVN."""
    cmvn_is_json: bool = True
    lora: LoraConfig | None = None

    @property
    def is_whisper(self) -> bool:
        return self.kind == "whisper"

    @property
    def target_extra(self) -> int:
        """Positions that the attention loss counts beside the target's own tokens: eos, or Whisper's prompt and eot."""
        return 4 if self.is_whisper else 1

    def encoder_frames(self, frames: int) -> int:
        """Encoder frames for an unpadded utterance of `frames` input frames (10 ms each, as a rule)."""
        return encoder_frames(self.encoder.input_layer, frames)

    def can_align(self, frames: int, tokens: Sequence[int]) -> bool:
        """Whether CTC can align `tokens` with `frames` input frames: a frame per token, and one between equal ones.

        Where it cannot, the CTC loss of the utterance is zero; whoever prepares data says so beforehand.
        """
        repeats = sum(a == b for a, b in pairwise(tokens))
        return self.encoder_frames(frames) >= len(tokens) + repeats


def encoder_frames(input_layer: str, frames: int) -> int:
    """Frames after subsampling, for an unpadded input of `frames` frames; never negative.

    >>> encoder_frames("conv2d", 100), encoder_frames("conv2d8", 14), encoder_frames("conv1d2", 3000)
    (24, 0, 1500)
    """
    if input_layer == "linear":
        return frames
    if input_layer == "conv1d2":
        return (frames + 1) // 2
    for kernel, stride in {
        "conv2d": ((3, 2), (3, 2)),
        "conv2d6": ((3, 2), (5, 3)),
        "conv2d8": ((3, 2), (3, 2), (3, 2)),
    }[input_layer]:
        frames = max((frames - kernel) // stride + 1, 0)
    return frames


def read_config(values: Mapping[str, Any], *, where: str = "train.yaml") -> U2Config:
    """The model that a WeNet train.yaml (as plain data) describes.

    `where` names the file in complaints. Raises RecipeError for a missing key, an unknown key of a model section, a
    value of the wrong type, or a network that is not built here (transducer, squeezeformer, mixture of experts, ...).
    Also reads the older spelling of the CMVN keys (`cmvn_file` and `is_json_cmvn` at the top).
    """
    kind = _choice(values.get("model") or "asr_model", ("asr_model", "whisper"), f"{where}: model")
    for part in ("predictor", "joint"):
        if values.get(part):
            raise RecipeError(
                f"{part} {values[part]!r}: transducers are not supported",
                where=f"{where}: {part}",
                fix="use a CTC/attention model (model: asr_model) or the Whisper variant (model: whisper)",
            )
    _choice(values.get("ctc") or "ctc", ("ctc",), f"{where}: ctc")
    vocabulary = _integer(values, ("output_dim", "vocab_size"), where)
    encoder = _encoder(values, where)
    decoder = _decoder(values, where)
    special = dict(_mapping(_mapping(values, "tokenizer_conf", where), "special_tokens", where))
    conf = dict(_mapping(values, "model_conf", where))
    if conf.pop("apply_non_blank_embedding", False):
        raise RecipeError(
            "apply_non_blank_embedding: true is not supported",
            where=f"{where}: model_conf.apply_non_blank_embedding",
            fix="use a model whose decoder attends to every encoder frame",
        )
    if conf.pop("ignore_id", -1) != -1:
        raise RecipeError("only -1 pads targets", where=f"{where}: model_conf.ignore_id")
    _known(
        conf,
        ("ctc_weight", "reverse_weight", "lsm_weight", "length_normalized_loss"),
        f"{where}: model_conf",
    )
    ctc_conf = dict(_mapping(values, "ctc_conf", where))
    sos, eos = (
        (_special(special, "sot", where), _special(special, "eot", where))
        if kind == "whisper"
        else (special.get("<sos>", vocabulary - 1), special.get("<eos>", vocabulary - 1))
    )
    cmvn_file, cmvn_is_json = _cmvn(values, where)
    config = U2Config(
        kind=kind,  # type: ignore[arg-type]  # checked by _choice
        vocabulary=vocabulary,
        encoder=encoder,
        decoder=decoder,
        ctc_weight=_number(conf, "ctc_weight", 0.5, f"{where}: model_conf"),
        reverse_weight=_number(conf, "reverse_weight", 0.0, f"{where}: model_conf"),
        lsm_weight=_number(conf, "lsm_weight", 0.0, f"{where}: model_conf"),
        length_normalized_loss=bool(conf.get("length_normalized_loss", False)),
        blank=int(ctc_conf.get("ctc_blank_id", 0)),
        sos=int(sos),
        eos=int(eos),
        special_tokens={str(k): int(v) for k, v in special.items()},
        cmvn_file=cmvn_file,
        cmvn_is_json=cmvn_is_json,
        lora=_lora(values, where),
    )
    _consistent(config, where)
    return config


def _encoder(values: Mapping[str, Any], where: str) -> EncoderConfig:
    kind = _choice(values.get("encoder") or "conformer", ("transformer", "conformer"), f"{where}: encoder")
    place = f"{where}: encoder_conf"
    conf = dict(_mapping(values, "encoder_conf", where, required=True))
    defaults: dict[str, object] = (
        {
            "pos_enc_layer_type": "rel_pos",
            "selfattention_layer_type": "rel_selfattn",
            "activation_type": "swish",
        }
        if kind == "conformer"
        else {}
    )
    conf = defaults | _only_supported(conf, _ENCODER_FIXED, place)
    conformer_only = {
        "macaron_style",
        "use_cnn_module",
        "cnn_module_kernel",
        "causal",
        "cnn_module_norm",
        "conv_bias",
        "conv_norm_eps",
        "conv_inner_factor",
        "final_norm",
    }
    if kind == "transformer":
        for key in sorted(conformer_only & conf.keys()):
            raise RecipeError(f"{key} belongs to a conformer; this encoder is a transformer", where=f"{place}.{key}")
    given = {"kind": kind, "input_size": _integer(values, ("input_dim",), where), **conf}
    config = _bind(EncoderConfig, given, place)
    _divisible(config.output_size, config.attention_heads, place)
    if config.pos_enc_layer_type != "rel_pos" and config.selfattention_layer_type == "rel_selfattn":
        raise RecipeError(
            f"rel_selfattn needs pos_enc_layer_type rel_pos, not {config.pos_enc_layer_type!r}",
            where=f"{place}.pos_enc_layer_type",
        )
    if kind == "conformer" and not config.causal and config.cnn_module_kernel % 2 == 0:
        raise RecipeError(
            f"an even kernel ({config.cnn_module_kernel}) has no middle; only causal convolutions take one",
            where=f"{place}.cnn_module_kernel",
            fix="use an odd number, or causal: true",
        )
    return config


def _decoder(values: Mapping[str, Any], where: str) -> DecoderConfig | None:
    if "decoder" in values and values["decoder"] is None:
        return None
    kind = _choice(
        values.get("decoder", "bitransformer"),
        ("transformer", "bitransformer"),
        f"{where}: decoder",
    )
    place = f"{where}: decoder_conf"
    fixed = {**_DECODER_FIXED, "use_output_layer": True, "src_attention": True}
    conf = _only_supported(dict(_mapping(values, "decoder_conf", where)), fixed, place)
    config = _bind(DecoderConfig, {"kind": kind, **conf}, place)
    if kind == "transformer" and "r_num_blocks" in conf:
        raise RecipeError(
            "r_num_blocks belongs to a bitransformer; this decoder has one direction",
            where=f"{place}.r_num_blocks",
        )
    return config


def _cmvn(values: Mapping[str, Any], where: str) -> tuple[str, bool]:
    conf = _mapping(values, "cmvn_conf", where)
    if "cmvn" not in values and values.get("cmvn_file"):  # WeNet before 2023-12
        return str(values["cmvn_file"]), bool(values.get("is_json_cmvn", False))
    if values.get("cmvn") is None:
        return "", True
    _choice(values["cmvn"], ("global_cmvn",), f"{where}: cmvn")
    file = conf.get("cmvn_file")
    if not file:
        raise RecipeError("cmvn: global_cmvn without a file", where=f"{where}: cmvn_conf.cmvn_file")
    return str(file), bool(conf.get("is_json_cmvn", False))


def _lora(values: Mapping[str, Any], where: str) -> LoraConfig | None:
    conf = _mapping(values, "lora_conf", where)
    if not conf:
        return None
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in conf.items()}
    return _bind(LoraConfig, lists, f"{where}: lora_conf")


def _consistent(config: U2Config, where: str) -> None:
    decoder = config.decoder
    if not 0.0 <= config.ctc_weight <= 1.0:
        raise RecipeError(f"ctc_weight {config.ctc_weight} is outside 0..1", where=f"{where}: model_conf.ctc_weight")
    if not 0.0 <= config.reverse_weight <= 1.0:
        raise RecipeError(
            f"reverse_weight {config.reverse_weight} is outside 0..1",
            where=f"{where}: model_conf.reverse_weight",
        )
    if decoder is None and config.ctc_weight != 1.0:
        raise RecipeError(
            f"ctc_weight {config.ctc_weight} leaves weight to a decoder, and there is none",
            where=f"{where}: model_conf.ctc_weight",
            fix="set ctc_weight: 1.0, or give a decoder",
        )
    if config.reverse_weight > 0 and (decoder is None or decoder.kind != "bitransformer"):
        raise RecipeError(
            f"reverse_weight {config.reverse_weight} needs a right-to-left decoder",
            where=f"{where}: model_conf.reverse_weight",
            fix="set decoder: bitransformer, or reverse_weight: 0.0",
        )
    if decoder is not None:
        _divisible(config.encoder.output_size, decoder.attention_heads, f"{where}: decoder_conf")
    for name, index in (("blank", config.blank), ("sos", config.sos), ("eos", config.eos)):
        if not 0 <= index < config.vocabulary:
            raise RecipeError(
                f"the {name} id {index} is outside the vocabulary of {config.vocabulary}",
                where=where,
                fix="check output_dim, ctc_conf.ctc_blank_id and tokenizer_conf.special_tokens",
            )
    if config.is_whisper:
        if decoder is None or decoder.kind != "transformer":
            raise RecipeError("model: whisper needs decoder: transformer", where=f"{where}: decoder")
        for name in ("transcribe", "translate", "no_timestamps", "no_speech"):
            _special(config.special_tokens, name, where)


# --- plain checks
# ---------------------------------------------------------------------------------------------------------

T = TypeVar("T")


def _bind(cls: type[T], values: Mapping[str, Any], place: str) -> T:
    """`cls(**values)` after checking names and types; integers are taken where a float is meant, never the reverse."""
    spec = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    _known(values, tuple(spec), place)
    hints = get_type_hints(cls)
    for name, value in values.items():
        _typed(value, hints[name], f"{place}.{name}")
    for name, f in spec.items():
        if name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise RecipeError(f"{name} is missing", where=place, fix=f"add `{name}:` there")
    return cls(**values)


def _typed(value: object, hint: Any, place: str) -> None:
    choices = get_args(hint)
    if choices and all(isinstance(c, str) for c in choices):
        _choice(value, choices, place)
        return
    accepted: tuple[type, ...] = {bool: (bool,), int: (int,), float: (float, int)}.get(hint, (object,))
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
        if accepted == (object,):
            return
        raise RecipeError(
            f"{value!r} is not {'a number' if hint is float else 'a whole number' if hint is int else 'true or false'}",
            where=place,
        )


def _only_supported(conf: dict[str, Any], fixed: Mapping[str, object], place: str) -> dict[str, Any]:
    for key, only in fixed.items():
        if key in conf and conf.pop(key) != only:
            raise RecipeError(f"{key} is supported as {only!r} only", where=f"{place}.{key}", fix="use another model")
    return {k: v for k, v in conf.items() if k not in _WITHOUT_EFFECT}


def _known(values: Mapping[str, object], allowed: tuple[str, ...], place: str) -> None:
    for key in values:
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, n=3, cutoff=0.5)
            raise RecipeError(
                f"unknown key {key!r}",
                where=place,
                fix=f"closest: {', '.join(close)}" if close else f"known: {', '.join(allowed)}",
            )


def _choice(value: object, allowed: tuple[str, ...], place: str) -> str:
    if value in allowed:
        return str(value)
    close = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
    raise RecipeError(
        f"{value!r} is not supported; supported: {', '.join(allowed)}",
        where=place,
        fix=f"closest: {close[0]}" if close else "use one of these, or another model",
    )


def _mapping(values: Mapping[str, Any], key: str, where: str, *, required: bool = False) -> Mapping[str, Any]:
    found = values.get(key)
    if found is None:
        if required:
            raise RecipeError(
                f"{key} is missing; this is not a WeNet model configuration",
                where=where,
                fix="give the train.yaml that WeNet wrote into the model directory",
            )
        return {}
    if not isinstance(found, Mapping):
        raise RecipeError(f"{key} is {found!r}, not a mapping", where=f"{where}: {key}")
    return found


def _integer(values: Mapping[str, Any], keys: tuple[str, ...], where: str) -> int:
    for key in keys:
        value = values.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
        if value is not None:
            raise RecipeError(f"{value!r} is not a positive whole number", where=f"{where}: {key}")
    raise RecipeError(
        f"{keys[0]} is missing",
        where=where,
        fix="give the train.yaml that WeNet wrote into the model directory, not the one in conf/",
    )


def _number(conf: Mapping[str, Any], key: str, default: float, place: str) -> float:
    value = conf.get(key, default)
    _typed(value, float, f"{place}.{key}")
    return float(value)


def _divisible(size: int, heads: int, place: str) -> None:
    if heads < 1 or size % heads:
        raise RecipeError(
            f"{size} values cannot be shared by {heads} attention heads", where=f"{place}.attention_heads"
        )


def _special(special: Mapping[str, int], name: str, where: str) -> int:
    if name not in special:
        raise RecipeError(f"the special token {name!r} is missing", where=f"{where}: tokenizer_conf.special_tokens")
    return int(special[name])
