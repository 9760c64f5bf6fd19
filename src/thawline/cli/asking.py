"""The options of a model that is asked about videos, the same for chat and serve, and how they open it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from thawline.models.videochat.chat import Sampling
    from thawline.tasks.videochat_asking import ChatModel

_OPENING = (
    click.option("--part", "parts", multiple=True, type=click.Path(),
                 help="With a language model as MODEL: a stage's file; in order."),
    click.option("--bert", type=click.Path(), help="With --part: the directory of the Q-Former's vocabulary."),
    click.option("--config", type=click.Path(), help="With --part: a file with upstream's model section."),
    click.option("--frames", type=click.IntRange(1), help="Frames of the video; the model's own number otherwise."),
    click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of the language model."),
    click.option("--device", help="auto (the default), cpu, cuda, cuda:1 ..."),
)  # fmt: skip
_SAMPLING = (
    click.option("--max-tokens", type=int, help="Longest answer; 200."),
    click.option("--temperature", type=float, help="0, the default, takes the likeliest token each time."),
    click.option("--top-p", type=float, help="Draw only from the likeliest tokens of this share."),
    click.option("--seed", type=int, help="Of the draws."),
)

ASKING = ("parts", "bert", "config", "frames", "dtype", "device", "max_tokens", "temperature", "top_p", "seed")
"""The keywords that these options become."""


def asking_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options; the verb gets them as keywords, None or () where not given."""
    for option in reversed((*_OPENING, *_SAMPLING)):
        command = option(command)
    return command


def sampling_of(options: Mapping[str, Any]) -> Sampling:
    """How the answers are chosen."""
    from thawline.models.videochat.chat import Sampling

    given = {"max_new_tokens": options["max_tokens"], **{n: options[n] for n in ("temperature", "top_p", "seed")}}
    return Sampling(**{name: value for name, value in given.items() if value is not None})


def open_chat_model(model: str, base: str | None, options: Mapping[str, Any]) -> ChatModel:
    """The model that MODEL, --base and --part name. Raises click.UsageError for what does not go together."""
    from thawline.tasks.videochat_asking import ChatModel
    from thawline.tasks.videochat_home import ChatHome
    from thawline.tasks.videochat_recognition import read_section

    frames, dtype, device = options["frames"], options["dtype"], options["device"] or "auto"
    bert, config = options["bert"], options["config"]
    if not options["parts"]:
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
        parts=[Path(p).absolute() for p in options["parts"]],
        dtype=dtype or "float32",
    )
    return ChatModel.of(home.open()[0], home, frames=frames, device=device)
