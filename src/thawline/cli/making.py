"""The options of a verb that writes a run's model so that it stands alone, the same for export and average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

_OPTIONS = (
    click.option("--only", type=click.Choice(["weights", "ema"]), help="The weights as trained, or their averages."),
    click.option("--base", type=click.Path(), help="Where the base is now, if it has moved."),
    click.option("--dtype", help="fp32, fp16 or bf16 for every floating tensor."),
    click.option("--force", is_flag=True, help="Replace an existing DST."),
)


def making_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options; the verb gets them as keywords, None or False where not given."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
