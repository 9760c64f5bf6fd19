"""A dialogue's words as token numbers, with a label on each token that is learnt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from thawline.data.conversation_templates import Rendered, Segment, Targets, Template
from thawline.errors import DataError

IGNORE = -100
"""Label of a token that is not learnt."""


class Tokenizer(Protocol):
    """The language model's tokenizer, special tokens not added."""

    pad_id: int

    def encode(self, text: str) -> list[int]: ...
    def offsets(self, text: str) -> list[tuple[int, int]] | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """A dialogue as numbers: K + 1 pieces around K clips (bos not among them), and a label for each token."""

    pieces: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[int, ...], ...]
    instruction: str = ""

    @property
    def n_learnt(self) -> int:
        return sum(label != IGNORE for piece in self.labels for label in piece)


def encode(
    rendered: Rendered,
    tokenizer: Tokenizer,
    *,
    max_tokens: int,
    template: Template,
    targets: Targets = "answers",
    where: str = "",
) -> Encoded:
    """Tokenise a rendered dialogue and label what is learnt.

    max_tokens: text tokens with bos; a longer dialogue loses its end. For captions it bounds the caption alone, as
        upstream does
    Labels fall where upstream's code puts them: it tokenises the stretches once more by themselves and counts. Where
    the counts do not add up, because the tokenizer merges across a border (upstream stops there), the characters that
    each token stands for decide.
    Raises DataError where nothing is left to learn, or the counts do not add up and the tokenizer knows no characters.
    """
    before = [tuple(tokenizer.encode(text)) for text in rendered.before]
    if rendered.separate:
        ids: list[int] = []
        labels: list[int] = []
        for segment in rendered.segments:
            found = tokenizer.encode(segment.text)[: max_tokens if segment.learnt else None]
            ids += found
            masks_pad = targets == "upstream" and template.caption_upstream_pad
            labels += [t if segment.learnt and not (masks_pad and t == tokenizer.pad_id) else IGNORE for t in found]
        room = len(ids)
    else:
        text = "".join(s.text for s in rendered.segments)
        ids = tokenizer.encode(text)
        learnt = _by_counting(rendered.segments, ids, tokenizer, stripped=template.counts_stripped)
        if learnt is None:
            learnt = _by_characters(rendered.segments, text, tokenizer, len(ids), where)
        labels = [t if flag else IGNORE for t, flag in zip(ids, learnt, strict=True)]
        room = max(max_tokens - 1 - sum(len(b) for b in before), 0)
    made = Encoded(
        pieces=(*before, tuple(ids[:room])),
        labels=(*(tuple([IGNORE] * len(b)) for b in before), tuple(labels[:room])),
        instruction=rendered.instruction,
    )
    if made.n_learnt == 0:
        raise DataError(
            f"no token of an answer is left within {max_tokens} text tokens", where=where, fix="raise max_text_tokens"
        )
    return made


def _by_counting(
    segments: Sequence[Segment], ids: Sequence[int], tokenizer: Tokenizer, *, stripped: bool
) -> list[bool] | None:
    """Upstream's way; None where the stretches do not add up to the whole."""

    def count(text: str) -> int:
        return len(tokenizer.encode(text.rstrip() if stripped else text))

    flags: list[bool] = []
    for chunk in _chunks(segments):
        base, prefix = len(flags), ""
        for number, segment in enumerate(chunk):
            prefix += segment.text
            more = chunk[number + 1].learnt if number + 1 < len(chunk) else None
            if more is not None and more == segment.learnt:
                continue  # a border inside what is treated alike needs no place
            flags += [segment.learnt] * (base + count(prefix) - len(flags))
    return flags if len(flags) == len(ids) else None


def _chunks(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    chunk: list[Segment] = []
    for segment in segments:
        chunk.append(segment)
        if segment.ends:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _by_characters(segments: Sequence[Segment], text: str, tokenizer: Tokenizer, count: int, where: str) -> list[bool]:
    spans = tokenizer.offsets(text)
    if spans is None or len(spans) != count:
        raise DataError(
            "the tokenizer joins text across the borders of answers, and does not know a token's characters",
            where=where,
            fix="use the tokenizer's fast form (tokenizer.json)",
        )
    owner: list[bool] = []
    for segment in segments:
        owner += [segment.learnt] * len(segment.text)
    # A token belongs to the segment of its last visible character: blanks go with what follows them.
    return [end > start and owner[_last_visible(text, start, end)] for start, end in spans]


def _last_visible(text: str, start: int, end: int) -> int:
    return next((i for i in range(end - 1, start - 1, -1) if not text[i].isspace()), end - 1)
