"""Questions about a video, answered by a model: what `thawline chat` and a page that answers share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from thawline.core.config import near_names
from thawline.data.conversation import Dialogue, Media, Turn, read_dialogues
from thawline.data.conversation_templates import TEMPLATES, Template
from thawline.data.video import Clip, read_image, read_video, video_seconds
from thawline.data.videochat import ChatSamples, to_tensor
from thawline.errors import DataError
from thawline.models.videochat.build import Opened
from thawline.models.videochat.chat import Answer, Sampling, chat, look
from thawline.tasks.evaluating import evaluate_samples
from thawline.tasks.videochat import chat_samples, evaluate
from thawline.tasks.videochat_home import ChatHome
from thawline.tasks.videochat_loading import open_chat
from thawline.train.engine import pick_device
from thawline.train.task import Evaluation

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
_PLAYABLE = "give a file that a player shows; `ffmpeg -i FILE -c:v libx264 mended.mp4` mends many that it does not"


@dataclass(frozen=True, slots=True)
class Seen:
    """A file as the model is shown it: kind, clip (T, 3, H, W), and when its frames were taken (None for an image)."""

    path: Path
    kind: Media
    clip: Tensor
    times_s: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class ChatModel:
    """A model with its tokenizers, ready to be asked."""

    opened: Opened
    home: ChatHome

    @classmethod
    def open(
        cls,
        model: Path | str,
        *,
        base: Path | str | None = None,
        frames: int | None = None,
        dtype: str = "",
        device: str = "auto",
    ) -> ChatModel:
        """Load a model as `videochat_loading.open_chat`.

        frames: of a video, in place of the model's own number
        device: auto takes the GPU where there is one
        """
        pick_device(device)  # a wrong word is said before anything is loaded
        opened, home = open_chat(Path(model), None if base is None else Path(base), dtype=dtype)
        return cls.of(opened, home, frames=frames, device=device)

    @classmethod
    def of(cls, opened: Opened, home: ChatHome, *, frames: int | None = None, device: str = "auto") -> ChatModel:
        """From what is loaded already."""
        opened.model.to(pick_device(device))
        if frames is not None:
            home = dataclasses.replace(home, clips=dataclasses.replace(home.clips, frames=frames))
        return cls(opened, home)

    @property
    def template(self) -> Template:
        return TEMPLATES[self.home.config.family]

    def see(self, file: Path | str, *, limit_s: float | None = None) -> Seen:
        """Read a video or an image. Raises DataError where there is none, it cannot be read, or it lasts longer than
        `limit_s`."""
        path, settings = _existing(file), self.home.clips
        if limit_s is not None and not _is_image(path) and (lasts := video_seconds(path)) > limit_s:
            raise DataError(f"the video lasts {lasts:.1f} s, more than the limit of {limit_s:g} s", where=str(path))
        read = _frames_of(path, settings.frames)
        return Seen(path, "image" if _is_image(path) else "video", to_tensor(read, settings), read.times_s or None)

    def talk(self, seen: Seen, *, instruction: str = "", sampling: Sampling | None = None) -> Talk:
        """A conversation about one file."""
        return Talk(self, seen, instruction, sampling or Sampling())

    def evaluate(
        self, data: Path | str, *, batch_size: int = 1, workers: int = 0, limit: int | None = None
    ) -> Evaluation:
        """Loss and token accuracy on an instruction file; a row a sample with `batch_size` 1. Unreadable samples are
        counted as `unreadable`."""
        model = self.opened.model
        return evaluate_samples(
            self.samples(Path(data)),
            lambda batches: evaluate(model, batches),
            batch_size=batch_size,
            workers=workers,
            limit=limit,
            device=model.device,
        )

    def samples(self, data: Path) -> ChatSamples:
        """The samples of an instruction file as they are for evaluation."""
        return chat_samples(self.home, self.opened, read_dialogues(data), settings=self.home.clips, training=False)


def _existing(file: Path | str) -> Path:
    path = Path(file).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
        raise DataError(
            "this is a folder, and one video or image is meant",
            where=str(path),
            fix=f"give one of its files: {', '.join(inside[:4])}" if inside else "give a file",
        )
    near = near_names(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else []
    raise DataError(
        "no such video or image",
        where=str(path),
        fix=f"did you mean {path.parent / near[0]}?" if near else "check the path",
    )


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGES


def _frames_of(path: Path, frames: int) -> Clip:
    try:
        return read_image(path) if _is_image(path) else read_video(path, frames, "uniform")
    except DataError as exc:
        raise DataError(exc.what, where=exc.where, fix=exc.fix or _PLAYABLE) from exc


class Talk:
    """Questions and answers so far about one file. The file is looked at once, with the first question."""

    def __init__(self, model: ChatModel, seen: Seen, instruction: str, sampling: Sampling) -> None:
        self.model = model
        self.seen = seen
        self.instruction = instruction
        self.sampling = sampling
        self.turns: tuple[Turn, ...] = ()
        self._visual: list[Tensor] | None = None

    def ask(
        self, question: str, *, on_text: Callable[[str], None] | None = None, sampling: Sampling | None = None
    ) -> Answer:
        """The answer to `question`, told piece by piece to `on_text`; it joins the conversation.

        sampling: of this answer, in place of the conversation's
        """
        opened, template = self.model.opened, self.model.template
        turns = (*self.turns, Turn(question=question, answer=""))
        if self._visual is None:
            self._visual = look(
                opened.model,
                [self.seen.clip],
                instruction=self._words(turns),
                instruction_tokenizer=opened.instruction_tokenizer,
            )
        prompt: Sequence[str] = template.prompt(
            question,
            kind=self.seen.kind,
            history=self.turns,
            instruction=self.instruction,
            times_s=self.seen.times_s if self.model.home.clips.say_times else None,
        )
        answer = chat(
            opened.model,
            [self.seen.clip],
            prompt,
            tokenizer=opened.tokenizer,
            stop=template.stop,
            sampling=sampling or self.sampling,
            on_text=on_text,
            visual=self._visual,
        )
        self.turns = (*self.turns, Turn(question=question, answer=answer.text))
        return answer

    def _words(self, turns: tuple[Turn, ...]) -> str:
        """What the Q-Former reads: the instruction, for some families with the first question."""
        asked = Dialogue(key="", kind=self.seen.kind, media=("",), instruction=self.instruction, turns=turns)
        return self.model.template.render(asked).instruction
