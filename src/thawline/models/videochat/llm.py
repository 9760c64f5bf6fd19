"""The language model under VideoChat2 and the two tokenizers: whole from their directories, or refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import nn

from thawline.core import hub
from thawline.core.extras import need
from thawline.errors import CheckpointError
from thawline.models.videochat.config import MODEL_TYPE, Family
from thawline.models.videochat.names import is_rotary

_SHOWN = 4


def family_of(folder: Path) -> Family:
    """Which of upstream's families a Hugging Face directory belongs to, by `model_type` in its config.json.

    Raises CheckpointError where there is no config.json, or the model is none of Mistral, Llama (Vicuna) and Phi-3.
    """
    path = folder / "config.json"
    try:
        kind = str(json.loads(path.read_text(encoding="utf-8")).get("model_type", ""))
    except FileNotFoundError as exc:
        raise CheckpointError(
            "no config.json here", where=str(folder), fix=hub.remedy(folder) or "name the language model's directory"
        ) from exc
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as exc:
        raise CheckpointError(f"config.json cannot be read: {exc}", where=str(folder)) from exc
    if kind not in MODEL_TYPE:
        raise CheckpointError(
            f"model_type {kind!r} is no language model that VideoChat2 is built on",
            where=str(path),
            fix=f"known: {', '.join(sorted(MODEL_TYPE))}",
        )
    return MODEL_TYPE[kind]


def load_llm(folder: Path, *, dtype: str = "float32") -> nn.Module:
    """The causal language model of a Hugging Face directory, every tensor accounted for.

    dtype: torch's name of the type its weights are turned into ("float32", "bfloat16", "float16")
    Raises CheckpointError naming tensors that are missing, left over or of another shape. Code in the directory is
    never run, nothing is downloaded.
    """
    family_of(folder)
    transformers = need("transformers", extra="hf")
    try:
        with _quietly(transformers):
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, output_loading_info=True, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, RuntimeError) as exc:
        raise CheckpointError(
            f"the language model does not load: {str(exc).splitlines()[0]}",
            where=str(folder),
            fix="it needs config.json and whole model*.safetensors",
        ) from exc
    missing = sorted(info.get("missing_keys", ()))
    surplus = sorted(k for k in info.get("unexpected_keys", ()) if not is_rotary(k))
    bent = sorted(str(k[0] if isinstance(k, tuple) else k) for k in info.get("mismatched_keys", ()))
    troubles = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (("missing", missing), ("left over", surplus), ("of another shape", bent))
        if names
    ]
    if troubles:
        raise CheckpointError(
            f"the language model's files do not fit its config.json; {'; '.join(troubles)}",
            where=str(folder),
            fix="download the directory again, or give the config.json that belongs to these weights",
        )
    loaded: nn.Module = model
    return loaded


@contextmanager
def _quietly(transformers: Any) -> Iterator[None]:
    """Without transformers' progress bar, which writes into the middle of our own words."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def random_llm(folder: Path, *, dtype: str = "float32") -> nn.Module:
    """The language model that a directory's config.json describes, with random weights: for trying things out."""
    family_of(folder)
    transformers = need("transformers", extra="hf")
    settings = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(settings, dtype=dtype)
    return model


class ChatTokenizer:
    """The language model's tokenizer: text to numbers without special tokens, which are added by number.

    bos_id, eos_id, pad_id: pad is eos where the tokenizer has none, as upstream does
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.bos_id: int = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    @classmethod
    def load(cls, folder: Path) -> ChatTokenizer:
        """Raises CheckpointError where the directory has no tokenizer, or one without bos and eos."""
        files = ("tokenizer.json", "tokenizer.model")
        if not any((folder / name).is_file() for name in files):
            # transformers would make an empty tokenizer out of a bare config.json.
            raise CheckpointError("no tokenizer here", where=str(folder), fix=f"it needs {' or '.join(files)}")
        transformers = need("transformers", extra="hf")
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as exc:
            raise CheckpointError(
                f"no tokenizer loads from here: {str(exc).splitlines()[0]}",
                where=str(folder),
                fix="it needs tokenizer.json, or tokenizer.model",
            ) from exc
        if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
            raise CheckpointError("the tokenizer names no bos or no eos token", where=str(folder))
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def offsets(self, text: str) -> list[tuple[int, int]] | None:
        """The characters of `text` that each token stands for; None where the tokenizer cannot say."""
        if not getattr(self._tokenizer, "is_fast", False):
            return None
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [(int(a), int(b)) for a, b in found["offset_mapping"]]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


class InstructionTokenizer:
    """The Q-Former's tokenizer: BERT's word pieces, with `[DEC]` added (`init_tokenizer` in blip2.py).

    Instructions longer than `max_tokens` lose their beginning, as upstream (`truncation_side="left"`); the captions of
    stage 1 lose their end (`cut="right"`).
    """

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.pad_id: int = tokenizer.pad_token_id
        self.dec_id: int = tokenizer.bos_token_id

    @classmethod
    def load(
        cls, folder: Path, *, max_tokens: int = 512, cut: Literal["left", "right"] = "left"
    ) -> InstructionTokenizer:
        """Raises CheckpointError where the directory has no BERT vocabulary."""
        if not (folder / "vocab.txt").is_file() and not (folder / "tokenizer.json").is_file():
            raise CheckpointError(
                "no BERT vocabulary here",
                where=str(folder),
                fix="give bert-base-uncased's directory (vocab.txt, config.json)",
            )
        transformers = need("transformers", extra="hf")
        tokenizer = transformers.BertTokenizer.from_pretrained(folder, truncation_side=cut, local_files_only=True)
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        return cls(tokenizer, max_tokens)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """`[CLS]`, the word pieces, `[SEP]`."""
        return list(self._tokenizer(text, truncation=True, max_length=self.max_tokens).input_ids)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
