"""The options of decoding, the same for evaluate, transcribe and serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

MODES = ("ctc_greedy_search", "ctc_prefix_beam_search", "attention", "attention_rescoring", "whisper")

_OPTIONS = (
    click.option(
        "--mode",
        type=click.Choice(MODES),
        metavar="MODE",
        help=f"How to decode: {', '.join(MODES)}. Default: the first, or for a Whisper the last.",
    ),
    click.option(
        "--beam", type=click.IntRange(1), help="Hypotheses kept; default 10 where prefixes are searched, else 1."
    ),
    click.option("--ctc-weight", type=click.FloatRange(0), help="attention_rescoring: weight of the CTC score."),
    click.option("--reverse-weight", type=click.FloatRange(0, 1), help="attention_rescoring: right-to-left decoder."),
    click.option("--length-penalty", type=float, help="attention: score divided by length to this power."),
    click.option("--blank-penalty", type=click.FloatRange(0), help="CTC: more than zero gives more tokens."),
    click.option("--chunk-size", type=int, help="Encoder frames a chunk, for models trained so."),
    click.option("--left-chunks", type=int, help="Chunks of history."),
    click.option(
        "--streaming", is_flag=True, default=None, help="Chunk by chunk with caches, as live speech; with --chunk-size."
    ),
    click.option("--language", help="What a multilingual model is prompted with, e.g. en or zh; auto lets it decide."),
    click.option("--task", type=click.Choice(["transcribe", "translate"]), help="Whisper: translate into English."),
    click.option("--prompt", help="Whisper: words that came before, e.g. names and their spelling."),
    click.option(
        "--fallback", is_flag=True, default=None, help="Whisper: try again what repeats itself or is improbable."
    ),
    click.option("--hotword", "hotwords", multiple=True, help="A phrase to prefer; may be given again."),
    click.option("--hotword-score", type=float, help="Bonus per token of such a phrase; default 3."),
    click.option("--tokenizer", type=click.Path(), help="A folder with a Whisper's tokenizer.json, if MODEL has none."),
)


def decoding_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options; the verb gets them as keywords, None or () where not given."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
