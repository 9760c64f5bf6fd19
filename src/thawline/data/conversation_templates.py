"""A dialogue in the words that a language model's weights were trained with: one template for each family.

What is learnt: the answers and the sign that ends each. `targets="upstream"` learns exactly what Ask-Anything's code
does, which for Vicuna also holds the role names around every answer ("###Assistant:", "###Human:"). Text only; no
tokenizer is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from thawline.data.conversation import Dialogue, Media, Turn

Targets = Literal["answers", "upstream"]
_MARKS: Mapping[Media, tuple[str, str]] = {"video": ("<Video>", "</Video>"), "image": ("<Image>", "</Image>")}


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


@dataclass(frozen=True, slots=True)
class _Opening:
    """What stands before the turns: the system's words, the signs before each clip, and what closes the last one."""

    head: str
    before: tuple[str, ...]
    close: str

    def in_turn(self, start: str, end: str, *, ends: bool = False) -> _Said:
        """The clips in a turn of their own, from `start` to `end`; the system's words alone where there are none."""
        if self.before:
            opened = (f"{self.head}{start}{self.before[0]}", *self.before[1:])
            return opened, [Segment(f"{self.close}{end}", ends=ends)]
        return (), [Segment(self.head)] if self.head else []


_Said = tuple[tuple[str, ...], list[Segment]]
"""The texts in front of each clip, and what follows the last of them."""


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
        start = _Opening(head, before, close + times_message(times_s))
        opened, segments = self._conversation(start, said, targets)
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

    def _conversation(self, opening: _Opening, turns: Sequence[Turn], targets: Targets) -> _Said:
        raise NotImplementedError


class MistralTemplate(Template):
    """`[INST] <Video></Video> [/INST] [INST] q [/INST] a </s> ...`"""

    family = "mistral"
    stop = ("</s>",)
    caption_prompt = "[INST] {} [/INST]"
    caption_end = "</s>"

    def _conversation(self, opening: _Opening, turns: Sequence[Turn], targets: Targets) -> _Said:
        opened, segments = opening.in_turn("[INST] ", " [/INST] ", ends=True)
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

    def _conversation(self, opening: _Opening, turns: Sequence[Turn], targets: Targets) -> _Said:
        upstream = targets == "upstream"
        opened, segments = opening.in_turn("###Human: ", " ")
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

    def _conversation(self, opening: _Opening, turns: Sequence[Turn], targets: Targets) -> _Said:
        system = f"<|system|>\n{opening.head}<|end|>\n" if opening.head else ""
        segments: list[Segment] = []
        opened: tuple[str, ...] = ()
        for number, turn in enumerate(turns):
            question = f"{turn.question.strip()}<|end|>\n<|assistant|>\n"
            if number == 0 and opening.before:
                opened = (f"{system}<|user|>\n{opening.before[0]}", *opening.before[1:])
                segments.append(Segment(f"{opening.close}\n{question}", ends=True))
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
