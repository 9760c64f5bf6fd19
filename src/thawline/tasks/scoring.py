"""Word and character error rates, by jiwer, after a stated normalisation of both sides."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from thawline.core.extras import need
from thawline.errors import RecipeError

Normalizer = Literal["none", "basic", "english"]

_SPACES = re.compile(r"\s+")


def normalizer(name: str) -> Callable[[str], str]:
    """How texts are made comparable before they are scored.

    none:    white space folded, Unicode NFC
    basic:   also lower case, punctuation and symbols removed (any language)
    english: Whisper's English normaliser, as published with the model (numbers, contractions, spelling)
    """
    if name == "none":
        return _fold
    if name == "basic":
        return _basic
    if name == "english":
        tokenizer_module = need("transformers.models.whisper.english_normalizer", extra="hf")
        english = tokenizer_module.EnglishTextNormalizer({})
        return lambda text: str(english(text))
    raise RecipeError(f"unknown normalizer {name!r}", fix="none, basic or english")


def score(
    references: Sequence[str], hypotheses: Sequence[str], *, normalize: Callable[[str], str] = lambda text: text
) -> Mapping[str, float]:
    """Error rates over a whole set: {"wer", "cer", "utterances", "words"}.

    Rates are edits over reference length, summed over all utterances first (a corpus rate, not a mean of rates).
    Characters are counted without spaces, so that Mandarin with and without spaces scores alike. An utterance whose
    reference is empty counts its inserted words and characters.
    """
    refs, hyps = [normalize(t) for t in references], [normalize(t) for t in hypotheses]
    words = _edits(refs, hyps)
    characters = _edits([_spelled(t) for t in refs], [_spelled(t) for t in hyps])
    return {
        "wer": _rate(words),
        "cer": _rate(characters),
        "utterances": float(len(refs)),
        "words": float(words["length"]),
    }


def alignment(reference: str, hypothesis: str) -> list[dict[str, str]]:
    """Word by word, what became of the reference: rows of {"op", "ref", "hyp"}; op is equal, substitute, delete or
    insert."""
    jiwer = need("jiwer", extra="speech")
    ref, hyp = reference.split(), hypothesis.split()
    if not ref:
        return [{"op": "insert", "ref": "", "hyp": word} for word in hyp]
    rows: list[dict[str, str]] = []
    for chunk in jiwer.process_words([" ".join(ref)], [" ".join(hyp)]).alignments[0]:
        length = max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
        for i in range(length):
            r = ref[chunk.ref_start_idx + i] if chunk.ref_start_idx + i < chunk.ref_end_idx else ""
            h = hyp[chunk.hyp_start_idx + i] if chunk.hyp_start_idx + i < chunk.hyp_end_idx else ""
            rows.append({"op": chunk.type, "ref": r, "hyp": h})
    return rows


def confusions(alignments: Sequence[Sequence[Mapping[str, str]]], *, most: int = 20) -> dict[str, list[dict[str, Any]]]:
    """The commonest errors over utterances by kind (substitute, delete, insert): rows of {"ref", "hyp", "count"}."""
    counts: dict[str, Counter[tuple[str, str]]] = {kind: Counter() for kind in ("substitute", "delete", "insert")}
    for rows in alignments:
        for row in rows:
            if row["op"] != "equal":
                counts[row["op"]][row["ref"], row["hyp"]] += 1
    return {
        kind: [
            {"ref": ref, "hyp": hyp, "count": n}
            for (ref, hyp), n in sorted(found.items(), key=lambda item: (-item[1], item[0]))[:most]
        ]
        for kind, found in counts.items()
    }


def _edits(refs: Sequence[str], hyps: Sequence[str]) -> dict[str, int]:
    jiwer: Any = need("jiwer", extra="speech")
    # jiwer refuses empty references; what is said there is inserted.
    spoken = [(r, h) for r, h in zip(refs, hyps, strict=True) if r.split()]
    inserted = sum(len(h.split()) for r, h in zip(refs, hyps, strict=True) if not r.split())
    length = sum(len(r.split()) for r, _ in spoken)
    if not spoken:
        return {"errors": inserted, "length": 0}
    found = jiwer.process_words([r for r, _ in spoken], [h for _, h in spoken])
    return {"errors": found.substitutions + found.deletions + found.insertions + inserted, "length": length}


def _rate(edits: Mapping[str, int]) -> float:
    return edits["errors"] / edits["length"] if edits["length"] else float(edits["errors"] > 0)


def _spelled(text: str) -> str:
    """Every character a word of its own, spaces gone."""
    return " ".join("".join(text.split()))


def _fold(text: str) -> str:
    return _SPACES.sub(" ", unicodedata.normalize("NFC", text)).strip()


def _basic(text: str) -> str:
    kept = (" " if unicodedata.category(c)[0] in "MSP" else c for c in unicodedata.normalize("NFKC", text).lower())
    return _SPACES.sub(" ", "".join(kept)).strip()
