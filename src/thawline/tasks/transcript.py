"""What was said and when, as values, as JSON, and as subtitles (SubRip and WebVTT)."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from thawline.data.text import Tokenizer

_LONGEST_TOKEN_S = 0.6  # CTC says where a token begins; it is taken to last until the next, and no longer than this
_OPENING, _CLOSING = "\"'“¡¿([{-", "\"'.。,，!！?？:：”)]}、"
_ASCII_MARKS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_CUE_S, _CUE_CHARACTERS, _PAUSE_S = 6.0, 84, 0.8


@dataclass(frozen=True, slots=True)
class Timed:
    """A word, token or segment: seconds from the begin of the file. confidence 0..1 where the mode has one."""

    start_s: float
    end_s: float
    text: str
    confidence: float | None = None

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"start": round(self.start_s, 3), "end": round(self.end_s, 3), "text": self.text}
        return out if self.confidence is None else out | {"confidence": round(self.confidence, 4)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """One recording.

    tokens:   ids of the text, without time marks
    token_times_s: when each begins, in seconds from the begin of the file; empty where not asked for
    score:    natural-log score of the mode, summed over windows; None where there is none
    words, segments: empty where the mode has no times
    windows:  pieces the recording was decoded in
    nbest:    runners-up with their scores, best first, of a recording decoded in one piece
    notes:    what a reader should know
    """

    file: str
    text: str
    tokens: tuple[int, ...]
    seconds: float
    token_times_s: tuple[float, ...] = ()
    score: float | None = None
    language: str = ""
    words: tuple[Timed, ...] = ()
    segments: tuple[Timed, ...] = ()
    windows: int = 1
    nbest: tuple[tuple[str, float], ...] = ()
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        out: dict[str, Any] = {
            "file": self.file,
            "text": self.text,
            "seconds": round(self.seconds, 3),
            "tokens": list(self.tokens),
            "score": self.score,
        }
        if self.token_times_s:
            out["token_times"] = [round(begin, 3) for begin in self.token_times_s]
        if self.language:
            out["language"] = self.language
        for name, values in (("words", self.words), ("segments", self.segments)):
            if values:
                out[name] = [value.to_json() for value in values]
        if len(self.nbest) > 1:
            out["nbest"] = [{"text": text, "score": score} for text, score in self.nbest]
        if self.windows > 1:
            out["windows"] = self.windows
        return out | ({"notes": list(self.notes)} if self.notes else {})

    def cues(self) -> list[Timed]:
        """Pieces to be read in one go: the model's own segments, else words joined up to a pause or 6 seconds."""
        if self.segments:
            return list(self.segments)
        return join_words(self.words)


def words_of(
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    begins_s: Sequence[float],
    end_s: float,
    confidence: Sequence[float] = (),
) -> list[Timed]:
    """Tokens with the second at which each begins -> words with begin and end.

    A word begins at a token with a space mark, after a lone space mark, at each token of a tokenizer whose units are
    words, and at each Chinese, Japanese or Korean character. Confidence is the least of its tokens'.
    """
    names = {i: token for token, i in tokenizer.vocabulary.items()}
    by_word = bool(getattr(tokenizer, "units_are_words", False))
    groups: list[list[int]] = []
    fresh = True
    for n, token in enumerate(tokens):
        piece = names.get(token, "").replace("\u0120", "▁")
        if piece == "▁":
            fresh = True
            continue
        if not tokenizer.decode([token]).strip():
            continue
        if fresh or by_word or piece.startswith("▁") or _is_ideograph(piece):
            groups.append([])
        groups[-1].append(n)
        fresh = _is_ideograph(piece)
    out: list[Timed] = []
    for group in groups:
        last = group[-1]
        after = begins_s[last + 1] if last + 1 < len(begins_s) else end_s
        stop = min(after, begins_s[last] + _LONGEST_TOKEN_S, end_s)
        text = tokenizer.decode([tokens[n] for n in group]).strip()
        sure = min(confidence[n] for n in group) if len(confidence) == len(tokens) else None
        out.append(Timed(begins_s[group[0]], max(stop, begins_s[last]), text, sure))
    return out


def spoken_words(
    tokenizer: Tokenizer, tokens: Sequence[int], spans: Sequence[tuple[float, float]], *, spaced: bool
) -> list[Timed]:
    """A Whisper's text tokens with the begin and end of each in seconds -> words with their punctuation.

    spaced: words begin at spaces; else each character is one. As OpenAI's timing.py has it: tokens that share a
    character stay together, punctuation goes with the word before it, what opens with the word after it.
    """
    words: list[tuple[str, list[int]]] = []  # text, numbers of its tokens
    for numbers in _whole_characters(tokenizer, tokens):
        text = tokenizer.decode([tokens[n] for n in numbers])
        if words and spaced and not text.startswith(" ") and text.strip() not in _ASCII_MARKS:
            words[-1] = _glued(words[-1], (text, numbers))
        else:
            words.append((text, numbers))
    for at in range(len(words) - 2, -1, -1):
        if words[at][0].startswith(" ") and words[at][0].strip() in _OPENING:
            words[at : at + 2] = [_glued(words[at], words[at + 1])]
    closed: list[tuple[str, list[int]]] = []
    for word in words:
        if closed and not closed[-1][0].endswith(" ") and word[0] in _CLOSING:
            closed[-1] = _glued(closed[-1], word)
        else:
            closed.append(word)
    return [Timed(spans[numbers[0]][0], spans[numbers[-1]][1], text.strip()) for text, numbers in closed]


def _glued(one: tuple[str, list[int]], two: tuple[str, list[int]]) -> tuple[str, list[int]]:
    return one[0] + two[0], one[1] + two[1]


def _whole_characters(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[list[int]]:
    """Numbers of tokens that make whole characters together: a byte-level token may hold half of one."""
    pieces: list[list[int]] = [[]]
    for n in range(len(tokens)):
        pieces[-1].append(n)
        if "\ufffd" not in tokenizer.decode([tokens[i] for i in pieces[-1]]):
            pieces.append([])
    return [piece for piece in pieces if piece]


def join_words(words: Iterable[Timed]) -> list[Timed]:
    """Words into lines of subtitles."""
    cues: list[Timed] = []
    line: list[Timed] = []
    for word in words:
        whole = _line_text([*line, word])
        if line and (
            word.start_s - line[-1].end_s > _PAUSE_S
            or word.end_s - line[0].start_s > _CUE_S
            or len(whole) > _CUE_CHARACTERS
        ):
            cues.append(Timed(line[0].start_s, line[-1].end_s, _line_text(line)))
            line = []
        line.append(word)
    if line:
        cues.append(Timed(line[0].start_s, line[-1].end_s, _line_text(line)))
    return cues


def subrip(cues: Sequence[Timed]) -> str:
    """The content of an .srt file."""
    return "".join(
        f"{n}\n{_clock(cue.start_s, ',')} --> {_clock(cue.end_s, ',')}\n{_one_line(cue.text)}\n\n"
        for n, cue in enumerate(cues, 1)
    )


def webvtt(cues: Sequence[Timed]) -> str:
    """The content of a .vtt file; `-->`, & and < in the text are written so that players show them."""
    body = "".join(
        f"{_clock(cue.start_s, '.')} --> {_clock(cue.end_s, '.')}\n{_escaped(_one_line(cue.text))}\n\n" for cue in cues
    )
    return f"WEBVTT\n\n{body}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _clock(seconds: float, point: str) -> str:
    """hh:mm:ss and milliseconds.

    >>> _clock(3661.0005, ",")
    '01:01:01,000'
    """
    whole = round(seconds * 1000)
    return f"{whole // 3600000:02d}:{whole // 60000 % 60:02d}:{whole // 1000 % 60:02d}{point}{whole % 1000:03d}"


def _line_text(words: Sequence[Timed]) -> str:
    """Words with spaces between, but none between ideographs."""
    text = ""
    for word in words:
        glued = not text or (_is_ideograph(text[-1]) and _is_ideograph(word.text[:1]))
        text += word.text if glued else f" {word.text}"
    return text


def _is_ideograph(piece: str) -> bool:
    piece = piece.removeprefix("▁")
    if len(piece) != 1:
        return False
    name = unicodedata.name(piece, "")
    return name.startswith(("CJK", "HIRAGANA", "KATAKANA", "HANGUL"))
