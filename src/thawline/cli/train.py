"""`thawline train` and `thawline resume`."""

from __future__ import annotations

from pathlib import Path

import click

from thawline.cli.app import json_option
from thawline.cli.output import give


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
    from thawline.tasks.runs import train as start
    from thawline.train.monitor import terminal_monitor

    run = start(recipe, list(overrides), run=directory, allow=allow, monitor=terminal_monitor())
    _report(run.dir, run.step, dict(run.metrics), as_json)


@click.command()
@click.argument("directory", type=click.Path())
@click.option("--step", type=int, help="Go back to the checkpoint of this step; later ones are given up.")
@click.option("--allow", multiple=True, metavar="KEY", help="Go on although this key of the recipe has changed.")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@json_option
def resume(directory: str, step: int | None, allow: tuple[str, ...], overrides: tuple[str, ...], as_json: bool) -> None:
    """Go on with the run in DIRECTORY from its newest whole checkpoint."""
    from thawline.tasks.runs import resume as go_on
    from thawline.train.monitor import terminal_monitor

    run = go_on(directory, list(overrides), step=step, allow=allow, monitor=terminal_monitor())
    _report(run.dir, run.step, dict(run.metrics), as_json)


def _report(directory: Path, step: int, metrics: dict[str, float], as_json: bool) -> None:
    figures = "  ".join(f"{k} {v:.4f}" for k, v in metrics.items() if k.startswith("valid/"))
    from thawline.cli.report import leave
    from thawline.tasks.kinds import kind_of

    page = leave(directory)
    verb, what = {"vision": ("predict", "IMAGE"), "videochat": ("chat", "VIDEO")}.get(
        kind_of(directory), ("transcribe", "AUDIO")
    )
    text = (
        f"done after step {step}  {figures}\n"
        f"  model    {directory / 'model'}\n"
        f"  proof    thawline audit {directory}\n"
        f"  report   {page}\n"
        f"  try it   thawline {verb} {directory} {what}"
    )
    give({"dir": str(directory), "step": step, "metrics": metrics}, text, as_json=as_json)
