"""Texts into token ids and back: WeNet's units, sentencepiece, Hugging Face's tokenizers, Whisper's. No torch.

Every tokenizer is an immutable, picklable value with `encode(text) -> list[int]`, `decode(ids) -> str`, `tokens(text)`
and `vocabulary` (token -> id). Text is normalised to NFC before anything else, as manifests are; a unit spelled in a
decomposed form in a file is found under its composed form too. What a unit table lacks becomes `<unk>` and can be
counted by `unknown`: nothing is dropped silently (WeNet drops it where there is no `<unk>`; here that is an error).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from thawline.core.extras import need
from thawline.errors import DataError, RecipeError

BLANK, UNK, SOS_EOS, SPACE = "<blank>", "<unk>", "<sos/eos>", "▁"

_NON_LINGUISTIC = re.compile(r"(\[[^\[\]]+\]|<[^<>]+>|{[^{}]+})")
_CJK = re.compile(r"([\u4e00-\u9fff])")  # the range WeNet splits at (wenet/text/tokenize_utils.py)
_SILENT = frozenset((BLANK, SOS_EOS, "<sos>", "<eos>", "<s>", "</s>", "<pad>"))
"""Units that stand for no sound and are left out of a decoded text."""


@runtime_checkable
class Tokenizer(Protocol):
    """What the speech task needs of a tokenizer."""

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """Token -> id."""

    def tokens(self, text: str) -> list[str]:
        """The tokens of a text, in order, before they are looked up."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without begin, end or prompt."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; begin, end, blank and time marks are left out."""

    def unknown(self, text: str) -> list[str]:
        """The tokens of a text that the vocabulary lacks."""


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


class CharTokenizer:
    """WeNet's char tokenizer (wenet/text/char_tokenizer.py): one unit per character, `▁` for a space; or per word.

    units:            token -> id
    non_linguistic:   symbols like {NOISE}, <v>, [laugh] that stay whole. As in WeNet, texts are put into upper case
                      where any are given
    split_with_space: a unit is what stands between spaces (words, or syllables written apart)
    connect_symbol:   what joins units in `decode`; None is a space with split_with_space, else nothing
    """

    def __init__(
        self,
        units: Mapping[str, int],
        *,
        non_linguistic: Iterable[str] = (),
        split_with_space: bool = False,
        connect_symbol: str | None = None,
    ) -> None:
        self._units = dict(units)
        self._find = {_nfc(token): i for token, i in self._units.items()} | self._units
        self._tokens = {i: token for token, i in self._units.items()}
        self._non_linguistic = frozenset(non_linguistic)
        self._by_space = split_with_space
        self._connect = (" " if split_with_space else "") if connect_symbol is None else connect_symbol
        self._unk = self._units.get(UNK)

    @property
    def vocabulary(self) -> Mapping[str, int]:
        return self._units

    @property
    def units_are_words(self) -> bool:
        """Whether each unit is a word (or a syllable written apart) of its own."""
        return self._by_space

    def tokens(self, text: str) -> list[str]:
        out: list[str] = []
        for part in self._parts(_nfc(text).strip()):
            if part in self._non_linguistic:
                out.append(part)
            else:
                out.extend(self._split(part))
        return out

    def _parts(self, line: str) -> list[str]:
        if not self._non_linguistic:
            return [line]
        return [part for w in _NON_LINGUISTIC.split(line.upper()) if (part := w.strip())]

    def _split(self, part: str) -> list[str]:
        if self._by_space:
            return part.split()
        return [SPACE if ch == " " else ch for ch in part]

    def encode(self, text: str) -> list[int]:
        return [self._id(token, text) for token in self.tokens(text)]

    def _id(self, token: str, text: str) -> int:
        found = self._find.get(token, self._unk)
        if found is None:
            raise DataError(
                f"{token!r} of {text[:60]!r} is not among the {len(self._units)} units, and there is no {UNK}",
                fix=f"add {UNK} to the units, or build them from these texts",
            )
        return found

    def unknown(self, text: str) -> list[str]:
        return [token for token in self.tokens(text) if token not in self._find]

    def decode(self, ids: Sequence[int]) -> str:
        tokens = [self._token(i) for i in ids]
        return self._join([t for t in tokens if t not in _SILENT])

    def _token(self, i: int) -> str:
        try:
            return self._tokens[int(i)]
        except KeyError:
            raise DataError(f"there is no unit with id {i}; ids go up to {max(self._tokens, default=-1)}") from None

    def _join(self, tokens: list[str]) -> str:
        return self._connect.join(tokens).replace(SPACE, " ").strip()


class BpeTokenizer(CharTokenizer):
    """WeNet's bpe tokenizer: Chinese characters one by one, the rest in upper case by a sentencepiece model.

    From wenet/text/bpe_tokenizer.py and tokenize_utils.py; ids come from the units, not from the model.
    """

    def __init__(self, model: Path, units: Mapping[str, int], *, non_linguistic: Iterable[str] = ()) -> None:
        super().__init__(units, non_linguistic=non_linguistic, connect_symbol="")
        self._pieces = SentencepieceTokenizer(model)

    def _split(self, part: str) -> list[str]:
        out: list[str] = []
        for piece in _CJK.split(part.upper()):
            if _CJK.fullmatch(piece):
                out.append(piece)
            elif piece.strip():
                out.extend(self._pieces.tokens(piece))
        return out


class SentencepieceTokenizer:
    """A sentencepiece model with its own ids."""

    def __init__(self, model: Path) -> None:
        self.model = Path(model)
        if not self.model.is_file():
            raise DataError("there is no such sentencepiece model", where=str(model))

    @cached_property
    def _sp(self) -> Any:
        sentencepiece = need("sentencepiece", extra="speech")
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.Load(str(self.model))
        except (OSError, RuntimeError) as exc:
            raise DataError(f"not a sentencepiece model: {exc}", where=str(self.model)) from exc
        return processor

    @cached_property
    def vocabulary(self) -> Mapping[str, int]:
        return {self._sp.id_to_piece(i): i for i in range(self._sp.get_piece_size())}

    def tokens(self, text: str) -> list[str]:
        return list(self._sp.encode_as_pieces(_nfc(text)))

    def encode(self, text: str) -> list[int]:
        return list(self._sp.encode_as_ids(_nfc(text)))

    def decode(self, ids: Sequence[int]) -> str:
        size = self._sp.get_piece_size()
        kept = [int(i) for i in ids if not (0 <= i < size and self._sp.is_control(int(i)))]
        if any(not 0 <= i < size for i in kept):
            raise DataError(f"ids outside the {size} pieces of this model: {kept}", where=str(self.model))
        return str(self._sp.decode(kept))

    def unknown(self, text: str) -> list[str]:
        return [piece for piece in self.tokens(text) if self._sp.piece_to_id(piece) == self._sp.unk_id()]

    def __getstate__(self) -> dict[str, object]:
        return {"model": self.model}  # the processor is opened anew in each process


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the tokenizers library, or the folder of a model that holds one. Nothing is added."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        file = self.path / "tokenizer.json" if self.path.is_dir() else self.path
        if not file.is_file():
            raise DataError(
                "there is no tokenizer.json",
                where=str(path),
                fix="AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes one",
            )
        self._file = file

    @cached_property
    def _tok(self) -> Any:
        tokenizers = need("tokenizers", extra="hf")
        try:
            return tokenizers.Tokenizer.from_file(str(self._file))
        except Exception as exc:  # the library raises bare Exception for what it cannot parse
            raise DataError(f"not a tokenizers file: {exc}", where=str(self._file)) from exc

    @cached_property
    def vocabulary(self) -> Mapping[str, int]:
        return dict(self._tok.get_vocab(with_added_tokens=True))

    @cached_property
    def _unk_id(self) -> int | None:
        model = json.loads(self._tok.to_str())["model"]
        unk = model.get("unk_token")
        if unk is None and isinstance(model.get("unk_id"), int):
            return int(model["unk_id"])
        return None if unk is None else self._tok.token_to_id(unk)

    def tokens(self, text: str) -> list[str]:
        return list(self._tok.encode(_nfc(text), add_special_tokens=False).tokens)

    def encode(self, text: str) -> list[int]:
        return list(self._tok.encode(_nfc(text), add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tok.decode([int(i) for i in ids], skip_special_tokens=True))

    def unknown(self, text: str) -> list[str]:
        if self._unk_id is None:
            return []  # bytes are the last resort of such a model: nothing is out of its vocabulary
        encoding = self._tok.encode(_nfc(text), add_special_tokens=False)
        return [text[a:b] for i, (a, b) in zip(encoding.ids, encoding.offsets, strict=True) if i == self._unk_id]

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_file": self._file}


class WhisperTokenizer(HuggingFaceTokenizer):
    """Whisper's tokenizer from a Hugging Face folder, with its special tokens by name.

    `encode` gives the ids of the bare text, as transformers' labels have them; Whisper itself writes a space before
    the first English word. The prompt and the end are the task's to add.
    """

    def id(self, token: str) -> int:
        """Id of a special token, e.g. "<|zh|>"; DataError where this model has none of that name."""
        found = self._tok.token_to_id(token)
        if found is None:
            raise DataError(f"this Whisper tokenizer has no {token!r}", where=str(self.path))
        return int(found)

    @property
    def end(self) -> int:
        """Id of the end of the text."""
        return self.id("<|endoftext|>")

    def prompt(
        self,
        *,
        language: str | None = "en",
        task: Literal["transcribe", "translate"] = "transcribe",
        times: bool = False,
    ) -> list[int]:
        """What the decoder is given first: begin, language and task, then time marks or none.

        language: "en", "zh", ...; None for an English-only model.
        """
        ids = [self.id("<|startoftranscript|>")]
        if language is not None:
            ids += [self.id(f"<|{language}|>"), self.id(f"<|{task}|>")]
        return ids if times else [*ids, self.id("<|notimestamps|>")]

    def decode(self, ids: Sequence[int]) -> str:
        first_time = self._first_time
        return super().decode([i for i in ids if first_time is None or i < first_time])

    @cached_property
    def _first_time(self) -> int | None:
        found = self._tok.token_to_id("<|0.00|>")
        if found is None:  # older folders leave the time marks out of the file; they follow this one
            found = self._tok.token_to_id("<|notimestamps|>")
            return None if found is None else int(found) + 1
        return int(found)


# --- units ------------------------------------------------------------------------------------------------------------


def read_units(path: Path) -> dict[str, int]:
    """WeNet's units.txt, `token id` a line: token -> id. Raises DataError with file:line."""
    units: dict[str, int] = {}
    seen: dict[int, str] = {}
    for where, line in _text_lines(path):
        found = re.fullmatch(r"(.+?)[ \t]+(\d+)", line)
        if found is None:
            raise DataError(f"not a unit: {line!r}", where=where, fix="a line is a token, a space and its id")
        token, i = found[1], int(found[2])
        if token in units or i in seen:
            other = f"the token {token!r}" if token in units else f"the id {i}, of {seen[i]!r},"
            raise DataError(f"{other} is there twice", where=where)
        units[token] = i
        seen[i] = token
    if not units:
        raise DataError("there are no units in it", where=str(path))
    return units


def read_non_linguistic(path: Path) -> tuple[str, ...]:
    """Non-linguistic symbols, one a line: {NOISE}, <v> or [laugh]. Raises DataError with file:line."""
    symbols = []
    for where, line in _text_lines(path):
        if not _NON_LINGUISTIC.fullmatch(line):
            raise DataError(f"not a non-linguistic symbol: {line!r}", where=where, fix="write {X}, <X> or [X]")
        symbols.append(line)
    return tuple(symbols)


def build_units(
    texts: Iterable[str],
    *,
    level: Literal["char", "word"] = "char",
    non_linguistic: Sequence[str] = (),
    min_count: int = 1,
) -> dict[str, int]:
    """Units of these texts: `<blank>` 0, `<unk>` 1, `<sos/eos>` 2, then symbols and tokens in code point order.

    min_count: a token seen less often is left to `<unk>`
    """
    splitter = CharTokenizer({UNK: 0}, non_linguistic=non_linguistic, split_with_space=level == "word")
    counts = Counter(token for text in texts for token in splitter.tokens(text))
    found = sorted(t for t, n in counts.items() if n >= min_count and t not in non_linguistic)
    return {token: i for i, token in enumerate([BLANK, UNK, SOS_EOS, *non_linguistic, *found])}


def units_text(units: Mapping[str, int]) -> str:
    """The content of a units.txt."""
    return "".join(f"{token} {i}\n" for token, i in sorted(units.items(), key=lambda item: item[1]))


def coverage(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """How often each token that the vocabulary lacks occurs in the texts; empty where it covers them."""
    return Counter(token for text in texts for token in tokenizer.unknown(text))


def open_tokenizer(kind: str, conf: Mapping[str, Any], root: Path) -> Tokenizer:
    """The tokenizer that a WeNet train.yaml (`tokenizer`, `tokenizer_conf`) or a recipe describes.

    kind: char | bpe | sentencepiece | hugging_face | whisper; conf has WeNet's names (symbol_table_path,
    non_lang_syms_path, split_with_space, connect_symbol, bpe_path, model_path, model). Paths start at `root`; one that
    does not exist there is looked for in `root` by its last name, since an experiment folder is often moved.
    """
    if kind in ("char", "bpe"):
        units = read_units(_find(conf, "symbol_table_path", root, default="units.txt"))
        symbols = conf.get("non_lang_syms_path")
        non_linguistic = read_non_linguistic(_find(conf, "non_lang_syms_path", root)) if symbols else ()
        if kind == "bpe":
            return BpeTokenizer(_find(conf, "bpe_path", root), units, non_linguistic=non_linguistic)
        return CharTokenizer(
            units,
            non_linguistic=non_linguistic,
            split_with_space=bool(conf.get("split_with_space", False)),
            connect_symbol=conf.get("connect_symbol"),
        )
    if kind == "sentencepiece":
        return SentencepieceTokenizer(_find(conf, "model_path", root))
    if kind in ("hugging_face", "huggingface"):
        return HuggingFaceTokenizer(_find(conf, "model", root, default="."))
    if kind == "whisper":
        return WhisperTokenizer(_find(conf, "model", root, default="."))
    raise RecipeError(f"there is no tokenizer {kind!r}", fix="char, bpe, sentencepiece, hugging_face or whisper")


def _find(conf: Mapping[str, Any], name: str, root: Path, *, default: str = "") -> Path:
    given = conf.get(name) or default
    if not given:
        raise RecipeError(f"the tokenizer needs {name}")
    for path in (root / given, root / Path(given).name):
        if path.exists():
            return path
    raise DataError(f"there is no {given!r} ({name}) in {root}", fix="copy it beside the model")


def _text_lines(path: Path) -> Iterable[tuple[str, str]]:
    try:
        body = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise DataError(f"not UTF-8: byte 0x{exc.object[exc.start]:02x}", where=str(path)) from exc
    except OSError as exc:
        raise DataError(f"cannot be read: {exc.strerror}", where=str(path)) from exc
    for number, line in enumerate(body.split("\n"), 1):
        # Only ends of lines and ASCII blanks: an ideographic space may itself be a unit.
        if line := line.strip(" \t\r"):
            yield f"{path}:{number}", line
