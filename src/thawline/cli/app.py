"""The program: its verbs, loaded when they are called, and the one place where errors become exit codes."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from thawline.cli.mishap import READER_LEFT, error_of, open_standard_streams, reader_left, silence_what_is_stuck
from thawline.cli.output import print_error, take_any_name
from thawline.errors import ThawlineError

_COMPLETION = "_THAWLINE_COMPLETE"

VERBS: dict[str, tuple[str, str]] = {
    "demo": ("thawline.cli.demo:demo", "Run the whole job on speech made on the spot; every line is an assertion."),
    "init": ("thawline.cli.init:init", "Write a commented recipe for a model and your data."),
    "plan": ("thawline.cli.plan:plan", "Show what a recipe would train, without training."),
    "train": ("thawline.cli.train:train", "Train a recipe; the same command goes on with a begun run."),
    "resume": ("thawline.cli.train:resume", "Go on with a run from its newest whole checkpoint."),
    "audit": ("thawline.cli.audit:audit", "Prove from the files that only what the plan names changed."),
    "evaluate": ("thawline.cli.evaluate:evaluate", "Score a model on data."),
    "transcribe": ("thawline.cli.transcribe:transcribe", "Turn recordings into text."),
    "predict": ("thawline.cli.predict:predict", "Say what images show."),
    "report": ("thawline.cli.report:report", "Write one page about a run: curves, audit, mistakes."),
    "chat": ("thawline.cli.chat:chat", "Ask a video-chat model about a video."),
    "convert": ("thawline.cli.convert:convert", "Turn any checkpoint into one verified file."),
    "export": ("thawline.cli.export:export", "Write what a run has made as a model that stands alone."),
    "average": ("thawline.cli.average:average", "Write the mean of several checkpoints as one model."),
    "verify": ("thawline.cli.verify:verify", "Check any checkpoint for damage."),
    "diff": ("thawline.cli.diff:diff", "Which tensors differ between two models or checkpoints, and how much."),
    "data": ("thawline.cli.data:data", "Check a data set before training on it."),
    "serve": ("thawline.cli.serve:serve", "Serve a model over HTTP: speech to text, or a video that is asked about."),
    "runs": ("thawline.cli.runs:runs", "List the runs in a folder, and how each of them stands."),
    "explain": ("thawline.cli.explain:explain", "Say more about an exit code, an error, a finding or a grade."),
    "env": ("thawline.cli.env:env", "What is installed and works here."),
}
"""Verb -> (module:command, one line of help). Kept as plain words so that `--help` imports nothing."""


class Verbs(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        module, _, attribute = VERBS[name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], VERBS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, line) for name, (_, line) in VERBS.items()])


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--traceback", is_flag=True, help="Show where in the code an error arose.")
@click.version_option(package_name="thawline")
def app(traceback: bool) -> None:
    """Fine-tuning as a contract: only what the plan names changes, a stopped run goes on bit for bit, and what was
    saved loads whole or not at all.

    Exit codes: 0 done, 1 ended for a reason that the message gives, 2 recipe or usage, 3 data, 4 checkpoint or base
    does not fit, 5 a law was broken, 75 stopped early with a whole checkpoint.
    """


def run(argv: Sequence[str]) -> int:
    """Run the program; returns the exit code. Errors of ours and of the system are one message and no traceback, with
    `--json` one JSON object more; what only a mistake in the program can raise is raised.
    """
    as_json = "--json" in argv
    open_standard_streams()
    take_any_name()
    try:
        code = _call(argv)
        sys.stdout.flush()
    except (ThawlineError, OSError, MemoryError, RuntimeError) as exc:
        error = error_of(exc)
        if error is None or "--traceback" in argv:
            raise
        if isinstance(exc, BrokenPipeError) and reader_left():
            code = READER_LEFT
        else:
            code = error.exit_code
            print_error(str(error), code, as_json=as_json, what=error.what, where=error.where, fix=error.fix)
    except click.exceptions.NoArgsIsHelpError as exc:
        code = 2
        print_error(exc.format_message(), code, as_json=as_json, what="a verb is missing", label="")
    except click.ClickException as exc:
        code = 2
        usage = exc.ctx.get_usage() + "\n" if isinstance(exc, click.UsageError) and exc.ctx is not None else ""
        print_error(usage + exc.format_message(), code, as_json=as_json, what=exc.format_message())
    except (KeyboardInterrupt, click.Abort):
        code = 130
        print_error("interrupted", code, as_json=as_json, what="interrupted")
    silence_what_is_stuck()
    return code


def _call(argv: Sequence[str]) -> int:
    """The verb's own exit code. Not by click's `main`, which has its own answers to a closed pipe and to EOFError."""
    if _COMPLETION in os.environ:  # the shell asks what a word may become
        app.main(args=list(argv), prog_name="thawline")
    try:
        with app.make_context("thawline", list(argv)) as context:
            app.invoke(context)
    except click.exceptions.Exit as exc:
        return exc.exit_code
    return 0


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--json` on a verb: one JSON object on standard output, people's text on standard error."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")(command)
