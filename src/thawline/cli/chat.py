"""`thawline chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click

from thawline.cli.app import json_option
from thawline.cli.asking import asking_options, open_chat_model, sampling_of
from thawline.cli.output import give, say


@click.command()
@click.argument("model", type=click.Path())
@click.argument("video", type=click.Path())
@click.option("--question", "-q", "questions", multiple=True, help="Ask this and stop; several make a conversation.")
@click.option("--base", type=click.Path(), help="The model that a delta or a file of trained tensors belongs to.")
@click.option("--instruction", default="", help="What stands in front of the conversation and is read by the Q-Former.")
@asking_options
@json_option
def chat(
    model: str,
    video: str,
    questions: tuple[str, ...],
    base: str | None,
    instruction: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Ask MODEL about VIDEO (or an image). Without --question, questions are read line by line.

    MODEL is a run, what it exported, one of its checkpoints, a directory of VideoChat2's parts (llm/, bert/,
    config.json and the stages' .pth files), a file over --base, or a language model's directory with each --part in
    order.
    """
    if as_json and not questions:
        raise click.UsageError("--json needs --question")
    chatter = open_chat_model(model, base, options)
    talk = chatter.talk(chatter.see(video), instruction=instruction, sampling=sampling_of(options))
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
