"""`thawline chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from thawline.cli.app import json_option
from thawline.cli.output import give, say

if TYPE_CHECKING:
    from thawline.tasks.videochat_asking import ChatModel


@click.command()
@click.argument("model", type=click.Path())
@click.argument("video", type=click.Path())
@click.option("--question", "-q", "questions", multiple=True, help="Ask this and stop; several make a conversation.")
@click.option("--base", type=click.Path(), help="The model that a delta or a file of trained tensors belongs to.")
@click.option(
    "--part", "parts", multiple=True, type=click.Path(), help="With a language model as MODEL: a stage's file."
)
@click.option("--bert", type=click.Path(), help="With --part: the directory of the Q-Former's vocabulary.")
@click.option("--config", type=click.Path(), help="With --part: a file with upstream's model section.")
@click.option("--instruction", default="", help="What stands in front of the conversation and is read by the Q-Former.")
@click.option("--frames", type=int, help="Frames of the video; the model's own number otherwise.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the language model.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 ...")
@click.option("--max-tokens", default=200, show_default=True, help="Longest answer.")
@click.option("--temperature", default=0.0, show_default=True, help="0 takes the likeliest token each time.")
@click.option("--top-p", default=1.0, show_default=True, help="Draw only from the likeliest tokens of this share.")
@click.option("--seed", default=0, show_default=True, help="Of the draws.")
@json_option
def chat(
    model: str,
    video: str,
    questions: tuple[str, ...],
    base: str | None,
    parts: tuple[str, ...],
    bert: str | None,
    config: str | None,
    instruction: str,
    frames: int | None,
    dtype: str | None,
    device: str,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    as_json: bool,
) -> None:
    """Ask MODEL about VIDEO (or an image). Without --question, questions are read line by line.

    MODEL is a run, what it exported, one of its checkpoints, a directory of VideoChat2's parts (llm/, bert/,
    config.json and the stages' .pth files), a file over --base, or a language model's directory with each --part in
    order.
    """
    from thawline.models.videochat.chat import Sampling

    sampling = Sampling(max_new_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if as_json and not questions:
        raise click.UsageError("--json needs --question")
    chatter = _open(model, base, parts, bert, config, frames, dtype, device)
    talk = chatter.talk(chatter.see(video), instruction=instruction, sampling=sampling)
    asked: list[dict[str, Any]] = []
    for question in questions or _typed():
        if questions and not as_json:
            say(f"> {question}")
        tell = None if as_json else _tell
        answer = talk.ask(question, on_text=tell)
        if not as_json:
            say("")
        asked.append({"question": question, "answer": answer.text, "ended": answer.ended, "tokens": len(answer.tokens)})
    if as_json:
        give({"video": video, "answer": asked[-1]["answer"], "answers": asked}, "", as_json=True)


def _open(
    model: str,
    base: str | None,
    parts: tuple[str, ...],
    bert: str | None,
    config: str | None,
    frames: int | None,
    dtype: str | None,
    device: str,
) -> ChatModel:
    from thawline.tasks.videochat_asking import ChatModel
    from thawline.tasks.videochat_home import ChatHome, read_section

    if not parts:
        if bert or config:
            raise click.UsageError("--bert and --config go with --part")
        return ChatModel.open(model, base=base, frames=frames, dtype=dtype or "", device=device)
    if config is None or base is not None:
        raise click.UsageError("--part needs --config, a file with upstream's model section, and takes no --base")
    path = Path(config).absolute()
    home = ChatHome.assemble(
        path=path,
        llm=Path(model).absolute(),
        bert=None if bert is None else Path(bert).absolute(),
        upstream=read_section(path),
        parts=[Path(p).absolute() for p in parts],
        dtype=dtype or "float32",
    )
    return ChatModel.of(home.open()[0], home, frames=frames, device=device)


def _tell(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _typed() -> Iterator[str]:
    """Questions from standard input, until it ends or an empty line is typed in a terminal."""
    stream = sys.stdin
    terminal = stream.isatty()
    while True:
        if terminal:
            _tell("> ")
        line = stream.readline()
        if not line or (terminal and not line.strip()):
            return
        if line.strip():
            if not terminal:
                say(f"> {line.strip()}")
            yield line.strip()
