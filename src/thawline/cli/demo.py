"""`thawline demo`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from thawline.cli.app import json_option


@click.command()
@click.option(
    "--out", type=click.Path(), default="thawline-demo", show_default=True, help="The folder that is written."
)
@click.option("--quick", is_flag=True, help="One plan and fewer epochs.")
@json_option
def demo(out: str, quick: bool, as_json: bool) -> None:
    """Run the whole job on speech made on the spot; every line is an assertion.

    Makes speech with espeak-ng, trains a small recogniser, fine-tunes it for new voices under several plans, kills a
    trainer and goes on, and proves what did and did not change. No network is used. Exit code 1 if an assertion fails.
    """
    from thawline.cli.output import give
    from thawline.demo.stage import Stage
    from thawline.demo.story import play

    outcome = play(Path(out), Stage(sys.stderr if as_json else sys.stdout), quick=quick)
    if as_json:
        give(outcome.to_json(), "", as_json=True)
    if outcome.failed:
        sys.exit(1)
