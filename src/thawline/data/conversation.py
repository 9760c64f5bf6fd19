"""Questions and answers about clips: from instruction files to token numbers with labels on the answers.

Two file formats are read: Ask-Anything's (`video_chat2/dataset/it_dataset*.py`, `pt_dataset.py`) and the list of
`conversations` that LLaVA introduced. A template per language model puts a dialogue into the words that its weights
were trained with. Plain data throughout; torch is never imported, and no clip is opened here.

What is learnt: the answers and the sign that ends each. `targets="upstream"` learns exactly what Ask-Anything's code
does, which for Vicuna also holds the role names around every answer ("###Assistant:", "###Human:").
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, overload

import numpy as np

from thawline.errors import DataError

IGNORE = -100
"""Label of a token that is not learnt."""

Media = Literal["video", "image", "text"]
Targets = Literal["answers", "upstream"]
Format = Literal["auto", "ask-anything", "llava"]
_MARKS: Mapping[Media, tuple[str, str]] = {"video": ("<Video>", "</Video>"), "image": ("<Image>", "</Image>")}
_PLACEHOLDERS = ("<image>", "<video>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One question with its answer. The question may be empty (captions)."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """One sample of an instruction file.

    key:         `file.json#17`, or the entry's own id
    media:       absolute paths of its clips, in order; several only for images
    instruction: what the Q-Former reads, and what stands in front of the conversation
    start_s, end_s: the part of the video that is meant, None for all of it
    caption:     stage 2's samples have one instead of turns
    """

    key: str
    kind: Media
    media: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = ()
    instruction: str = ""
    start_s: float | None = None
    end_s: float | None = None
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Malformed:
    """An entry that is no sample, kept in its place so that the numbers of the others stay."""

    key: str
    reason: str


class Dialogues(Sequence[Dialogue]):
    """An instruction file. Asking for a malformed entry raises DataError, and costs that one sample.

    fingerprint: of the file's bytes, hexadecimal
    """

    def __init__(self, path: Path, entries: Sequence[Dialogue | Malformed], fmt: str, fingerprint: str) -> None:
        self.path = path
        self.format = fmt
        self.fingerprint = fingerprint
        self._entries = tuple(entries)

    @overload
    def __getitem__(self, number: int) -> Dialogue: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[Dialogue]: ...
    def __getitem__(self, number: int | slice) -> Dialogue | Sequence[Dialogue]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        entry = self._entries[number]
        if isinstance(entry, Malformed):
            raise DataError(entry.reason, where=entry.key, fix="mend or remove the entry")
        return entry

    def __len__(self) -> int:
        return len(self._entries)

    def key(self, number: int) -> str:
        """What an entry is called in reports, also where it is malformed."""
        return self._entries[number].key

    @property
    def malformed(self) -> tuple[Malformed, ...]:
        return tuple(e for e in self._entries if isinstance(e, Malformed))


def read_dialogues(path: Path, *, media_root: Path | None = None, format: Format = "auto") -> Dialogues:
    """Read an instruction file, or a caption file.

    media_root: what relative paths in it are relative to; the file's own folder where None
    Raises DataError where the file is absent, no JSON list, empty, or not one entry is a sample.
    """
    try:
        raw = path.read_bytes()
    except OSError as exc:
        raise DataError(f"the instruction file cannot be read: {exc.strerror}", where=str(path)) from exc
    try:
        rows = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError) as exc:
        raise DataError(f"not JSON: {exc}", where=str(path), fix="it must be one JSON list of samples") from exc
    if not isinstance(rows, list) or not rows:
        raise DataError("no samples: it must be a JSON list that is not empty", where=str(path))
    root = media_root if media_root is not None else path.parent
    entries = [_entry(row, f"{path.name}#{number}", root, format) for number, row in enumerate(rows)]
    if all(isinstance(e, Malformed) for e in entries):
        first = entries[0]
        assert isinstance(first, Malformed)
        raise DataError(
            f"none of its {len(entries)} entries is a sample; the first: {first.reason}",
            where=str(path),
            fix='an entry has "QA" (Ask-Anything), "conversations" (LLaVA) or "caption"',
        )
    fmt = "llava" if any(isinstance(r, dict) and "conversations" in r for r in rows) else "ask-anything"
    return Dialogues(path, entries, fmt, hashlib.blake2b(raw, digest_size=16).hexdigest())


def _entry(row: Any, key: str, root: Path, format: Format) -> Dialogue | Malformed:
    if not isinstance(row, dict):
        return Malformed(key, f"an entry must be an object, got {type(row).__name__}")
    try:
        is_llava = format == "llava" or (format == "auto" and "conversations" in row)
        return _from_llava(row, key, root) if is_llava else _from_ask_anything(row, key, root)
    except DataError as exc:
        return Malformed(key, exc.what)


def _from_ask_anything(row: Mapping[str, Any], key: str, root: Path) -> Dialogue:
    kind, media = _media_of(row, root)
    if "caption" in row:
        if not media:
            raise DataError("a caption without a video or image")
        return Dialogue(key=key, kind=kind, media=media, caption=_text(row["caption"], "caption"))
    qa = row.get("QA")
    if not isinstance(qa, list) or not qa:
        raise DataError('"QA" must be a list of questions and answers that is not empty')
    turns = []
    for item in qa:
        if not isinstance(item, dict) or "a" not in item:
            raise DataError(f'every item of "QA" needs an answer "a", got {item!r}')
        turns.append(Turn(question=_text(item.get("q", ""), "q"), answer=_text(item["a"], "a")))
    start_s = end_s = None
    if row.get("start") is not None and row.get("end") is not None:
        start_s, end_s = float(row["start"]), float(row["end"])
        if not end_s > start_s >= 0:
            raise DataError(f"the part from {start_s:g} to {end_s:g} seconds is empty")
    return Dialogue(
        key=key,
        kind=kind,
        media=media,
        turns=tuple(turns),
        instruction=_text(qa[0].get("i", ""), "i"),
        start_s=start_s,
        end_s=end_s,
    )


def _from_llava(row: Mapping[str, Any], key: str, root: Path) -> Dialogue:
    kind, media = _media_of(row, root)
    said = row.get("conversations")
    if not isinstance(said, list) or not said:
        raise DataError('"conversations" must be a list that is not empty')
    turns: list[Turn] = []
    system = ""
    question: str | None = None
    places = 0
    for item in said:
        if not isinstance(item, dict) or "from" not in item or "value" not in item:
            raise DataError(f'every item of "conversations" needs "from" and "value", got {item!r}')
        who, text = str(item["from"]), _text(item["value"], "value")
        if who in ("human", "user"):
            for place in _PLACEHOLDERS:
                places += text.count(place)
                text = text.replace(place, "")
            question = text.strip()
        elif who in ("gpt", "assistant"):
            turns.append(Turn(question=question or "", answer=text.strip()))
            question = None
        elif who == "system":
            system = text.strip()
        else:
            raise DataError(f'"from" is {who!r}; known: human, gpt, user, assistant, system')
    if not turns:
        raise DataError("nobody answers in it")
    if places and places != len(media):
        raise DataError(f"it has {places} places for clips and names {len(media)} files")
    own = str(row["id"]) if "id" in row else key
    return Dialogue(key=own, kind=kind, media=media, turns=tuple(turns), instruction=system)


def _media_of(row: Mapping[str, Any], root: Path) -> tuple[Media, tuple[str, ...]]:
    kinds: list[Media] = [k for k in ("video", "image") if row.get(k)]
    if not kinds:
        return "text", ()
    if len(kinds) > 1:
        raise DataError("it names a video and an image; one of them is meant")
    value = row[kinds[0]]
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(n, str) and n for n in names):
        raise DataError(f"{kinds[0]!r} must be a path or a list of paths, got {value!r}")
    return kinds[0], tuple(n if "://" in n else os.path.abspath(root / n) for n in names)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what!r} must be text, got {value!r}")
    return value


# --- templates -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of text that is learnt or not. `ends` closes a stretch that upstream tokenises by itself to count."""

    text: str
    learnt: bool = False
    ends: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A dialogue in a template's words.

    before:   the texts in front of each clip, one for each clip
    segments: what follows the last clip, or everything where there is none
    instruction: what the Q-Former reads
    separate: whether segments are tokenised one by one (captions), or as one text
    """

    before: tuple[str, ...]
    segments: tuple[Segment, ...]
    instruction: str
    separate: bool = False

    @property
    def text(self) -> str:
        """All of it as upstream would write it, clips left out."""
        return "".join(self.before) + "".join(s.text for s in self.segments)


class Template:
    """The words around questions and answers; one subclass for each language model's family.

    start, end signs come from `video_chat2/dataset/it_dataset{,_mistral,_phi}.py`.
    stop: signs that end an answer
    """

    family: str
    stop: tuple[str, ...]
    counts_stripped = True
    caption_prompt = "{}"
    caption_end = ""
    caption_upstream_pad = True

    def render(
        self,
        dialogue: Dialogue,
        *,
        turns: Sequence[Turn] | None = None,
        times_s: Sequence[float] | None = None,
        system: str = "",
        targets: Targets = "answers",
        question_to_qformer: bool | None = None,
    ) -> Rendered:
        """The dialogue with its answers.

        turns:   in place of the dialogue's own (another order)
        times_s: when the frames were taken; says so in the conversation, as upstream's `add_second_msg`
        question_to_qformer: whether the Q-Former reads the first question behind the instruction; upstream's default
            is yes for Vicuna and no for the others
        """
        said = tuple(turns if turns is not None else dialogue.turns)
        asks = self.question_to_qformer if question_to_qformer is None else question_to_qformer
        words = self._instruction(dialogue, said, asks)
        head = system + (dialogue.instruction + self._gap if dialogue.instruction else "")
        before, close = _clips(dialogue)
        opened, segments = self._conversation(head, before, close + times_message(times_s), said, targets, dialogue)
        return Rendered(before=opened, segments=_stripped(segments), instruction=words)

    def prompt(
        self,
        question: str,
        *,
        kind: Media = "video",
        clips: int = 1,
        history: Sequence[Turn] = (),
        instruction: str = "",
        times_s: Sequence[float] | None = None,
        answer_prefix: str = "",
    ) -> tuple[str, ...]:
        """The texts around the clips up to where the answer begins: one piece more than clips."""
        media = ("",) * (0 if kind == "text" else clips)
        asked = Dialogue(
            key="",
            kind=kind,
            media=media,
            instruction=instruction,
            turns=(*history, Turn(question=question, answer="\0")),
        )
        shown = self.render(asked, times_s=times_s)
        after = "".join(s.text for s in shown.segments)
        opening = after[: after.rindex("\0")].rstrip(" ")
        if answer_prefix and not opening.endswith("\n"):
            opening += " "
        return (*shown.before, opening + answer_prefix)

    def caption(self, dialogue: Dialogue, prompt: str) -> Rendered:
        """Stage 2: a short order, and the caption to be learnt with its end sign.

        Upstream tokenises order and caption by themselves (`videochat2_pt_*.py`).
        """
        before, close = _clips(dialogue)
        opening, order = self.caption_prompt.split("{}")
        first = opening + before[0]
        return Rendered(
            before=(first, *before[1:]),
            segments=(Segment(f"{close} {prompt}{order}"), Segment(dialogue.caption + self.caption_end, learnt=True)),
            instruction="",
            separate=True,
        )

    question_to_qformer = False
    _gap = " "

    def _instruction(self, dialogue: Dialogue, turns: Sequence[Turn], asks: bool) -> str:
        if not dialogue.instruction:
            return ""
        question = turns[0].question if asks and turns else ""
        return (dialogue.instruction + self._gap + question).strip()

    def _conversation(
        self,
        head: str,
        before: tuple[str, ...],
        close: str,
        turns: Sequence[Turn],
        targets: Targets,
        dialogue: Dialogue,
    ) -> tuple[tuple[str, ...], list[Segment]]:
        raise NotImplementedError


class MistralTemplate(Template):
    """`[INST] <Video></Video> [/INST] [INST] q [/INST] a </s> ...`"""

    family = "mistral"
    stop = ("</s>",)
    caption_prompt = "[INST] {} [/INST]"
    caption_end = "</s>"

    def _conversation(
        self,
        head: str,
        before: tuple[str, ...],
        close: str,
        turns: Sequence[Turn],
        targets: Targets,
        dialogue: Dialogue,
    ) -> tuple[tuple[str, ...], list[Segment]]:
        segments: list[Segment] = []
        opened: tuple[str, ...] = ()
        if before:
            opened = (f"{head}[INST] {before[0]}", *before[1:])
            segments.append(Segment(f"{close} [/INST] ", ends=True))
        elif head:
            segments.append(Segment(head))
        for turn in turns:
            if turn.question:
                segments.append(Segment(f"[INST] {turn.question} [/INST] ", ends=True))
            segments.append(Segment(f"{turn.answer} </s> ", learnt=True))
        return opened, segments


class VicunaTemplate(Template):
    """`###Human: <Video></Video> ###Human: q ###Assistant: a ###`"""

    family = "vicuna"
    stop = ("###",)
    question_to_qformer = True
    caption_prompt = "###Human: {} ###Assistant: "
    caption_end = "###"
    caption_upstream_pad = False

    def _conversation(
        self,
        head: str,
        before: tuple[str, ...],
        close: str,
        turns: Sequence[Turn],
        targets: Targets,
        dialogue: Dialogue,
    ) -> tuple[tuple[str, ...], list[Segment]]:
        upstream = targets == "upstream"
        segments: list[Segment] = []
        opened: tuple[str, ...] = ()
        if before:
            opened = (f"{head}###Human: {before[0]}", *before[1:])
            segments.append(Segment(f"{close} "))
        elif head:
            segments.append(Segment(head))
        for number, turn in enumerate(turns):
            if turn.question:
                # The sign that opens a turn is also the one that ends the answer before it.
                segments.append(Segment("###", learnt=upstream or number > 0))
                segments.append(Segment("Human:", learnt=upstream))
                segments.append(Segment(f" {turn.question} "))
            if segments:
                segments[-1] = Segment(segments[-1].text, segments[-1].learnt, ends=True)
            segments.append(Segment("###", learnt=upstream or (number > 0 and not turn.question)))
            segments.append(Segment("Assistant: ", learnt=upstream))
            segments.append(Segment(f"{turn.answer} ", learnt=True))
        segments.append(Segment("###", learnt=True))
        return opened, segments


class PhiTemplate(Template):
    """`<|user|>\\n<Video></Video>\\nq<|end|>\\n<|assistant|>\\na<|end|>`"""

    family = "phi"
    stop = ("<|end|>", "<|endoftext|>")
    counts_stripped = False
    caption_prompt = "<|user|>\n{}<|end|>\n<|assistant|>\n"
    caption_end = "<|end|>"
    _gap = ""

    def _conversation(
        self,
        head: str,
        before: tuple[str, ...],
        close: str,
        turns: Sequence[Turn],
        targets: Targets,
        dialogue: Dialogue,
    ) -> tuple[tuple[str, ...], list[Segment]]:
        system = f"<|system|>\n{head}<|end|>\n" if head else ""
        segments: list[Segment] = []
        opened: tuple[str, ...] = ()
        for number, turn in enumerate(turns):
            question = f"{turn.question.strip()}<|end|>\n<|assistant|>\n"
            if number == 0 and before:
                opened = (f"{system}<|user|>\n{before[0]}", *before[1:])
                segments.append(Segment(f"{close}\n{question}", ends=True))
            else:
                segments.append(Segment(f"{system if number == 0 else ''}<|user|>\n{question}", ends=True))
            segments.append(Segment(f"{turn.answer.strip()}<|end|>\n", learnt=True))
        return opened, segments


TEMPLATES: Mapping[str, Template] = {t.family: t for t in (MistralTemplate(), VicunaTemplate(), PhiTemplate())}
"""By family of the language model."""


def times_message(times_s: Sequence[float] | None) -> str:
    """What upstream says about the frames: " The video contains 2 frames sampled at 0.5, 1.5 seconds."; "" for None.

    >>> times_message([0.5, 1.54])
    ' The video contains 2 frames sampled at 0.5, 1.5 seconds.'
    """
    if times_s is None:
        return ""
    return (
        f" The video contains {len(times_s)} frames sampled at {', '.join(str(round(t, 1)) for t in times_s)} seconds."
    )


def _clips(dialogue: Dialogue) -> tuple[tuple[str, ...], str]:
    """The signs around the clips: what stands in front of each, and what closes the last one."""
    if dialogue.kind == "text" or not dialogue.media:
        return (), ""
    start, end = _MARKS[dialogue.kind]
    return (start, *(end + start for _ in dialogue.media[1:])), end


def _stripped(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    kept = list(segments)
    if kept:
        kept[-1] = Segment(kept[-1].text.rstrip(), kept[-1].learnt, kept[-1].ends)
    return tuple(s for s in kept if s.text)


# --- numbers ---------------------------------------------------------------------------------------------------------


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


def shuffled(turns: Sequence[Turn], rng: np.random.Generator) -> tuple[Turn, ...]:
    """The turns in another order: upstream's `random_shuffle`, here from the sample's counter."""
    return tuple(turns[i] for i in rng.permutation(len(turns)))
