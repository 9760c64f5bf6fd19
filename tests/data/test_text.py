"""Tokenizers: WeNet's ids for WeNet's texts, transformers' ids for Whisper's, and nothing lost in silence."""

from __future__ import annotations

import pickle
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from thawline.data.manifest import read_manifest
from thawline.data.text import (
    BpeTokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    SentencepieceTokenizer,
    Tokenizer,
    WhisperTokenizer,
    build_units,
    coverage,
    open_tokenizer,
    read_non_linguistic,
    read_units,
    units_text,
)
from thawline.errors import DataError, RecipeError

TEXTS = ["hello world", "你好 世界", "a b c"]


# Texts and tokens of wenet's own test/wenet/text/test_char_tokenizer.py.
@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("震东好帅", "震 东 好 帅"),
        (" 吴迪也好帅 ", "吴 迪 也 好 帅"),
        ("超哥 is the 吧", "超 哥 ▁ i s ▁ t h e ▁ 吧"),
        ("人生苦短I USE", "人 生 苦 短 I ▁ U S E"),
        (" zhendong ist so schön ", "z h e n d o n g ▁ i s t ▁ s o ▁ s c h ö n"),
        ("It's okay", "I t ' s ▁ o k a y"),
    ],
)
def test_characters_are_split_as_wenet_splits_them(text: str, tokens: str):
    tokenizer = CharTokenizer(build_units([text]))
    assert tokenizer.tokens(text) == tokens.split()
    assert tokenizer.decode(tokenizer.encode(text)) == text.strip()


def test_non_linguistic_symbols_stay_whole_and_the_text_is_put_into_upper_case():
    units = {"<blank>": 0, "<unk>": 1, "{NOISE}": 2, "A": 3, "▁": 4, "[": 5}
    tokenizer = CharTokenizer(units, non_linguistic=["{NOISE}"])
    assert tokenizer.tokens("a {noise} a [x]") == ["A", "{NOISE}", "A", "[", "X", "]"]
    assert tokenizer.encode("a {noise} a [x]") == [3, 2, 3, 5, 1, 1]
    assert CharTokenizer(units).tokens("a {x") == ["a", "▁", "{", "x"]


def test_words_are_split_at_spaces():
    tokenizer = CharTokenizer({"<unk>": 0, "good": 1, "day": 2}, split_with_space=True)
    assert tokenizer.encode("good  day sir") == [1, 2, 0]
    assert tokenizer.decode([1, 2]) == "good day"


def test_what_the_units_lack_becomes_unk_and_is_counted():
    tokenizer = CharTokenizer({"<blank>": 0, "<unk>": 1, "a": 2})
    assert tokenizer.encode("abba") == [2, 1, 1, 2]
    assert tokenizer.unknown("abba") == ["b", "b"]
    assert coverage(tokenizer, ["abba", "ac", "aa"]) == Counter(b=2, c=1)
    with pytest.raises(DataError, match="'b' of 'ab' is not among the 1 units, and there is no <unk>"):
        CharTokenizer({"a": 0}).encode("ab")


def test_chinese_and_accents_in_either_normal_form_are_the_same_units():
    composed = "é 가 豈"
    decomposed = unicodedata.normalize("NFD", composed)
    assert decomposed != composed
    for units in (build_units([composed]), {"<unk>": 0, **{c: i for i, c in enumerate(["e\u0301", "▁", "가"], 1)}}):
        tokenizer = CharTokenizer(units)
        assert tokenizer.encode(composed) == tokenizer.encode(decomposed)
        assert not tokenizer.unknown("é")


def test_blank_and_end_are_left_out_of_a_text_and_a_foreign_id_is_an_error():
    tokenizer = CharTokenizer(build_units(["ab"]))
    assert tokenizer.decode([0, 3, 0, 4, 2]) == "ab"
    assert tokenizer.decode([3, 1]) == "a<unk>"
    with pytest.raises(DataError, match="there is no unit with id 9; ids go up to 4"):
        tokenizer.decode([9])


def test_units_are_built_in_a_fixed_order_with_the_special_ones_first():
    assert build_units(["b a", "{N} c a"], non_linguistic=["{N}"]) == {
        "<blank>": 0, "<unk>": 1, "<sos/eos>": 2, "{N}": 3, "A": 4, "B": 5, "C": 6, "▁": 7,
    }  # fmt: skip
    assert list(build_units(["b a a"], level="word", min_count=2)) == ["<blank>", "<unk>", "<sos/eos>", "a"]


@settings(deadline=None)
@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=5))
def test_built_units_cover_their_texts_and_survive_their_file(texts: list[str]):
    import tempfile

    units = build_units(texts)
    assert not coverage(CharTokenizer(units), texts)
    if any(c in "\n\r\t\0 \ufeff" or 0xD800 <= ord(c) < 0xE000 for c in "".join(units)):
        return  # such a character cannot stand in a file of lines
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "units.txt")
        path.write_text(units_text(units), encoding="utf-8", newline="\n")
        assert read_units(path) == units


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("a 0\nb\n", r"units\.txt:2: not a unit: 'b'"),
        ("a 0\na 1\n", r"units\.txt:2: the token 'a' is there twice"),
        ("a 0\nb 0\n", r"units\.txt:2: the id 0, of 'a', is there twice"),
        ("\n", r"units\.txt: there are no units in it"),
    ],
)
def test_a_broken_unit_table_names_its_line(tmp_path: Path, body: str, message: str):
    (tmp_path / "units.txt").write_text(body)
    with pytest.raises(DataError, match=message):
        read_units(tmp_path / "units.txt")


def test_unit_tables_may_have_windows_line_ends_and_a_byte_order_mark(tmp_path: Path):
    (tmp_path / "units.txt").write_bytes("\ufeff<unk> 0\r\n\u3000 1\r\n你\t2\r\n".encode())
    assert read_units(tmp_path / "units.txt") == {"<unk>": 0, "\u3000": 1, "你": 2}


def test_a_symbol_that_is_none_is_refused(tmp_path: Path):
    (tmp_path / "syms").write_text("{NOISE}\nBREATH\n")
    with pytest.raises(DataError, match=r"syms:2: not a non-linguistic symbol: 'BREATH'"):
        read_non_linguistic(tmp_path / "syms")


# --- sentencepiece ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sp_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece", reason="the speech extra is not installed")
    folder = tmp_path_factory.mktemp("sp")
    corpus = folder / "text"
    corpus.write_text("\n".join(f"THE CAT {w} SAT ON THE MAT {w}ING" for w in ("RUN", "JUMP", "SING", "WALK")) + "\n")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "m"), vocab_size=40, model_type="bpe", minloglevel=2
    )
    return folder / "m.model"


def test_sentencepiece_gives_its_own_ids_and_back(sp_model: Path):
    import sentencepiece

    direct = sentencepiece.SentencePieceProcessor(model_file=str(sp_model))
    tokenizer = SentencepieceTokenizer(sp_model)
    assert tokenizer.encode("THE CAT SAT") == direct.encode("THE CAT SAT")
    assert tokenizer.decode(tokenizer.encode("THE CAT SAT")) == "THE CAT SAT"
    assert len(tokenizer.vocabulary) == 40
    assert tokenizer.unknown("THE CAT ß") == ["ß"]
    assert tokenizer.decode([1, *tokenizer.encode("CAT"), 2]) == "CAT"
    with pytest.raises(DataError, match="ids outside the 40 pieces"):
        tokenizer.decode([999])


def test_wenet_bpe_splits_chinese_by_character_and_looks_up_units(sp_model: Path):
    pieces = SentencepieceTokenizer(sp_model)
    units = {"<unk>": 0, "猫": 1} | {p: i for i, p in enumerate(pieces.vocabulary, 2) if p != "<unk>"}
    tokenizer = BpeTokenizer(sp_model, units)
    assert tokenizer.tokens("the cat 猫狗sat") == [*pieces.tokens("THE CAT "), "猫", "狗", *pieces.tokens("SAT")]
    assert tokenizer.unknown("猫狗") == ["狗"]
    assert tokenizer.decode(tokenizer.encode("the cat sat")) == "THE CAT SAT"


def test_a_file_that_is_no_model_is_named(tmp_path: Path):
    pytest.importorskip("sentencepiece")
    (tmp_path / "x.model").write_bytes(b"junk junk junk")
    with pytest.raises(DataError, match=r"x\.model: not a sentencepiece model"):
        SentencepieceTokenizer(tmp_path / "x.model").encode("a")
    with pytest.raises(DataError, match="there is no such sentencepiece model"):
        SentencepieceTokenizer(tmp_path / "y.model")


# --- Hugging Face and Whisper -----------------------------------------------------------------------------------------


@pytest.fixture
def word_level(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers", reason="the hf extra is not installed")
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "hello": 1, "world": 2}, unk_token="[UNK]"))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tok.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_tokenizers_file_is_used_as_it_is(word_level: Path):
    for path in (word_level, word_level / "tokenizer.json"):
        tokenizer = HuggingFaceTokenizer(path)
        assert tokenizer.encode("hello big world") == [1, 0, 2]
        assert tokenizer.decode([1, 2]) == "hello world"
        assert tokenizer.unknown("hello big world") == ["big"]
        assert dict(tokenizer.vocabulary) == {"[UNK]": 0, "hello": 1, "world": 2}


def test_a_folder_without_a_tokenizer_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(DataError, match=r"no tokenizer\.json\n  fix: AutoTokenizer"):
        HuggingFaceTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="not a tokenizers file"):
        HuggingFaceTokenizer(tmp_path).encode("a")


def test_whisper_ids_are_those_of_transformers(shared: Path):
    transformers = pytest.importorskip("transformers")
    folder = shared / "models/whisper-base"
    reference, ours = transformers.WhisperTokenizer.from_pretrained(folder), WhisperTokenizer(folder)
    for text in [" Hello, world.", "c z d z w eight", "军备", "日本語 émigré 🎉", ""]:
        ids = ours.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False)
        assert ours.decode([*ours.prompt(language="zh"), *ids, ours.end]) == text
        assert not ours.unknown(text)
    reference.set_prefix_tokens(language="zh", task="translate", predict_timestamps=False)
    assert ours.prompt(language="zh", task="translate") == reference.prefix_tokens
    assert ours.decode([50364, *ours.encode("hi"), 50400]) == "hi"  # time marks
    assert len(ours.prompt(times=True)) == 3
    with pytest.raises(DataError, match=r"has no '<\|xx\|>'"):
        ours.prompt(language="xx")


# --- all --------------------------------------------------------------------------------------------------------------


def test_tokenizers_travel_to_other_processes_before_and_after_use(sp_model: Path, word_level: Path):
    tokenizers: list[Tokenizer] = [
        CharTokenizer(build_units(TEXTS)),
        BpeTokenizer(sp_model, {"<unk>": 0}),
        SentencepieceTokenizer(sp_model),
        HuggingFaceTokenizer(word_level),
    ]
    for tokenizer in tokenizers:
        assert isinstance(tokenizer, Tokenizer)
        fresh = pickle.loads(pickle.dumps(tokenizer))
        want = tokenizer.encode("hello CAT")
        used = pickle.loads(pickle.dumps(tokenizer))
        assert fresh.encode("hello CAT") == used.encode("hello CAT") == want


def test_a_tokenizer_is_opened_from_wenets_settings_also_in_a_moved_folder(tmp_path: Path, sp_model: Path):
    (tmp_path / "units.txt").write_text(units_text(build_units(["ab"])))
    moved = {"symbol_table_path": "data/dict/units.txt", "split_with_space": False, "non_lang_syms_path": None}
    assert open_tokenizer("char", moved, tmp_path).encode("ba") == [4, 3]
    bpe = {"bpe_path": str(sp_model), "symbol_table_path": "units.txt"}
    assert isinstance(open_tokenizer("bpe", bpe, tmp_path), BpeTokenizer)
    with pytest.raises(RecipeError, match="there is no tokenizer 'chars'"):
        open_tokenizer("chars", {}, tmp_path)
    with pytest.raises(DataError, match=r"there is no 'x\.txt'"):
        open_tokenizer("char", {"symbol_table_path": "x.txt"}, tmp_path)


def test_real_texts_are_covered_by_their_units(shared: Path):
    texts = [row.txt for row in read_manifest(shared / "data/cmn-words/train.list")]
    tokenizer = CharTokenizer(build_units(texts))
    assert not coverage(tokenizer, texts)
    assert [tokenizer.decode(tokenizer.encode(t)) for t in texts] == texts


def test_the_units_of_a_wenet_model_are_read(shared: Path):
    units = read_units(shared / "parity/wenet/u2_conformer/units.txt")
    assert (units["<blank>"], units["<unk>"], units["<sos/eos>"]) == (0, 1, 2)


def test_the_module_does_not_import_torch_or_numpy():
    code = "import sys, thawline.data.text\nassert not {'torch', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
