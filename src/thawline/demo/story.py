"""The demo: the whole job in two minutes, on speech made on the spot, every line an assertion.

Nothing here is special to the demo but the data and the checks: it trains with `thawline.train`, and what a user would
type is run as the user would run it, in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thawline.demo.plans import PINNED, VARIANTS
from thawline.demo.scenes import Rates as Rates
from thawline.demo.scenes import Scenes
from thawline.demo.stage import Stage
from thawline.errors import RecipeError

MARK = "THIS-IS-A-DEMO.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the demo found, for programs.

    rates: "base" and every plan's name -> its error rates
    """

    out: Path
    seconds: float
    passed: int
    failed: tuple[str, ...]
    rates: Mapping[str, Rates]

    def to_json(self) -> dict[str, Any]:
        rates = {name: {"new": r.new, "old": r.old} for name, r in self.rates.items()}
        done = {"passed": self.passed, "failed": list(self.failed), "seconds": round(self.seconds, 1)}
        return {"out": str(self.out), **done, "wer": rates}


def play(out: Path, stage: Stage, *, quick: bool = False) -> Outcome:
    """Play the whole demo in the folder `out`.

    quick: only one plan, fewer epochs
    Raises ThawlineError where a part cannot go on; an assertion that fails is counted, and the demo goes on.
    """
    start = time.monotonic()
    out = out.absolute()
    _prepare(out)
    stage.say(f"thawline demo   {os.cpu_count()} CPU cores, torch {torch.__version__}, no network", "bold")
    stage.note(str(out))
    with _one_thread():
        story = Scenes(out, stage, variants=(PINNED,) if quick else VARIANTS, epochs=4 if quick else 6)
        rates = story.tell()
    seconds = time.monotonic() - start
    passed = len(stage.checks) - len(stage.failed)
    _ending(stage, out, seconds, passed)
    return Outcome(out=out, seconds=seconds, passed=passed, failed=tuple(c.text for c in stage.failed), rates=rates)


def _prepare(out: Path) -> None:
    """Make the folder; of an earlier demo only the data stay. Anything else that is there is not touched."""
    if out.exists() and not (out / MARK).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(
            "this is there already and holds no demo",
            where=str(out),
            fix="another folder: thawline demo --out DIR",
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARK).write_text("thawline demo wrote this folder and begins it anew each time. Delete it freely.\n")
        for name in ("recogniser", "recipes", "runs", "converted"):
            if (out / name).exists():
                shutil.rmtree(out / name)
    except OSError as exc:
        raise RecipeError(
            f"cannot write here: {exc.strerror}", where=str(out), fix="another folder: thawline demo --out DIR"
        ) from exc


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch: for a model this small more only wait for each other, and the same number everywhere is
    what makes two processes agree bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ending(stage: Stage, out: Path, seconds: float, passed: int) -> None:
    stage.say()
    total = len(stage.checks)
    if stage.failed:
        stage.say(f"{len(stage.failed)} of {total} assertions FAILED after {seconds:.0f} s:", "bold red")
        for check in stage.failed:
            stage.say(f"   {check.scene}: {check.text}", "red")
    else:
        stage.say(f"All {passed} assertions held. {seconds:.0f} s", "bold green")
    stage.say()
    stage.say("What is where")
    stage.note(
        f"{out}\n"
        "  data/       the speech, in WeNet's lists\n"
        "  recipes/    what was run: read pinned.yaml first\n"
        "  runs/       one folder a run; its model/ is the result: train.yaml, final.pt, units.txt, global_cmvn"
    )
    stage.say("Look closer")
    stage.note(
        f"cd {out}\n"
        "thawline plan recipes/pinned.yaml                              what trains, block by block\n"
        "thawline diff runs/base/model runs/pinned                      what changed, and by how much\n"
        "thawline evaluate runs/pinned data/new/test/data.list          the table's figure once more"
    )
    stage.say("Next, with your own model and recordings")
    stage.note(
        "thawline init MODEL_DIR --train train.list --valid dev.list    writes recipe.yaml\n"
        "thawline plan recipe.yaml                                      shows what would train\n"
        "thawline train recipe.yaml                                     and the same again after a stop"
    )
