"""`thawline train` and `thawline resume`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from thawline.cli.app import json_option
from thawline.cli.output import give

if TYPE_CHECKING:
    from thawline.api import Run


@click.command()
@click.argument("recipe", type=click.Path())
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--run", "directory", type=click.Path(), help="The run directory. Default: runs/ and the recipe's name.")
@click.option("--allow", multiple=True, metavar="KEY", help="Go on although this key of the recipe has changed.")
@json_option
def train(
    recipe: str, overrides: tuple[str, ...], directory: str | None, allow: tuple[str, ...], as_json: bool
) -> None:
    """Train RECIPE. The same command on a begun run goes on with it.

    Overrides are written key=value, e.g. optim.lr=3e-4; paths in them are relative to the working directory.
    """
    from thawline.api import train as start
    from thawline.train.monitor import terminal_monitor

    run = start(recipe, list(overrides), run=directory, allow=allow, monitor=terminal_monitor())
    _report(run, as_json)


@click.command()
@click.argument("directory", type=click.Path())
@click.option("--step", type=int, help="Go back to the checkpoint of this step; later ones are given up.")
@click.option("--fork", type=click.Path(), metavar="DIR", help="Go on in a new folder; the run stays as it is.")
@click.option(
    "--verify", type=click.IntRange(0), default=0, metavar="K", help="First repeat the last K steps, compare bits."
)
@click.option("--allow", multiple=True, metavar="KEY", help="Go on although this key of the recipe has changed.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@json_option
def resume(
    directory: str,
    step: int | None,
    fork: str | None,
    verify: int,
    allow: tuple[str, ...],
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Go on with the run in DIRECTORY from its newest whole checkpoint."""
    from thawline.api import resume as go_on
    from thawline.train.monitor import terminal_monitor

    run = go_on(
        directory, list(overrides), step=step, fork=fork, verify=verify, allow=allow, monitor=terminal_monitor()
    )
    _report(run, as_json)


def _report(run: Run, as_json: bool) -> None:
    from thawline.tasks.kinds import kind_of
    from thawline.train.monitor import metrics_text

    page = run.report()
    verb, what = {"vision": ("predict", "IMAGE"), "videochat": ("chat", "VIDEO")}.get(
        kind_of(run.dir), ("transcribe", "AUDIO")
    )
    text = (
        f"done after step {run.step}  {metrics_text(run.metrics)}\n"
        f"  model    {run.dir / 'model'}\n"
        f"  proof    thawline audit {run.dir}\n"
        f"  report   {page}\n"
        f"  try it   thawline {verb} {run.dir} {what}"
    )
    give({"dir": str(run.dir), "step": run.step, "metrics": dict(run.metrics)}, text, as_json=as_json)
