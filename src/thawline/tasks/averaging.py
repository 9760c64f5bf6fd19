"""Which checkpoints are averaged, and their mean as a model that stands alone.

Of a run, each checkpoint is exported by its task first, so that what is averaged are the weights of models (adapters
merged), as they would be used. Of a folder of checkpoints or deltas without their run, each is put over its base and
its adapters are merged. Of a folder that WeNet's train.py left, the files themselves, chosen as its
average_model.py does with `--val_best` or without, except that "last" goes by number and not by the files' dates.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from thawline.ckpt.average import average as mean_of
from thawline.ckpt.convert import ConversionReport, refuse_places, write
from thawline.ckpt.formats.thawline_run import is_checkpoint, is_delta
from thawline.ckpt.load import checkpoints, read_checkpoint
from thawline.ckpt.remote import is_url
from thawline.ckpt.source import Source, open_source, refuse_absent
from thawline.ckpt.transfer import fetched, sent
from thawline.core.config import read_yaml
from thawline.errors import CheckpointError, RecipeError
from thawline.tasks.exporting import own_form, standing_alone
from thawline.train.evaluation import scores
from thawline.train.recipe import read_recipe
from thawline.train.rundir import RunDirectory

_NUMBERED = re.compile(r"(?:(epoch|step)_)?(\d+)\.pt")  # N.pt: an epoch, before 2024
_LAST_NUMBER = re.compile(r"(\d+)(?:\.safetensors)?$")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checkpoint that may be averaged.

    step:  its number: updates of a run, epoch or step of WeNet's
    score: of its evaluation, the smaller the better; None where there was none
    """

    path: Path
    step: int
    score: float | None


def average(
    place: Path | str,
    dst: Path | str,
    *,
    last: int | None = None,
    best: int | None = None,
    steps: Sequence[int] = (),
    to: str | None = None,
    only: str | None = None,
    base: Path | str | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> ConversionReport:
    """Write the mean of several checkpoints of a run, or of a folder of WeNet's, at `dst`, a path or a URL.

    last, best, steps: which: so many of the newest; so many of the best evaluated (a run's `run.checkpoint.best`,
                       WeNet's loss on held-back data); or exactly these. One of the three has to be said.
    to, only, base, dtype: as for `exporting.export`

    Raises CheckpointError naming what there is, where fewer are there than asked for or they do not fit together;
    RecipeError where not exactly one of the three is said.
    """
    with fetched(place, result=False, every=True) as here, sent(dst, force=force) as target:
        run = RunDirectory(here.absolute())
        found = of_run(run) if run.begun else of_deltas(here) or of_wenet(here)
        chosen = choose(found, last=last, best=best, steps=steps, where=str(place))
        for each in found:  # those that are left out of the mean are not to be replaced by it either
            path = f"{place}/{each.path.relative_to(here.absolute())}" if is_url(place) else each.path
            refuse_places(path, dst, base=base, force=force)
        with ExitStack() as opened:
            under = None if base is None else opened.enter_context(fetched(base))
            models = [
                opened.enter_context(standing_alone(run, each.step, only, under)) if run.begun else each.path
                for each in chosen
            ]
            asked = (None, None) if run.begun else (only, under)
            sources = [opened.enter_context(open_source(m, only=asked[0], base=asked[1])) for m in models]
            form = to or (own_form(models[0]) if run.begun else _form_of(sources[0]))
            mean = mean_of(sources, labels=[each.path.name for each in chosen])
            report = write(mean, target, to=form, dtype=dtype, force=force)
    files = tuple(file.replace(str(target), str(dst), 1) for file in report.files)
    return replace(report, source=str(place), target=str(dst), files=files)


def choose(
    found: Sequence[Candidate], *, last: int | None, best: int | None, steps: Sequence[int], where: str
) -> list[Candidate]:
    """The candidates that are meant, by number ascending."""
    asked = [name for name, value in (("--last", last), ("--best", best), ("--step", steps)) if value]
    if len(asked) != 1:
        raise RecipeError(
            f"{' and '.join(asked) or 'nothing'} says which checkpoints to average",
            where=where,
            fix="say one of: --last N, --best N, --step N --step M",
        )
    if not found:
        raise CheckpointError(
            "holds no checkpoints to average",
            where=where,
            fix="looked for the checkpoints of a run, deltas whose name ends in a number, WeNet's epoch_N.pt or "
            "step_N.pt",
        )
    ordered = sorted(found, key=lambda each: each.step)
    if steps:
        chosen = [each for each in ordered if each.step in steps]
        wanted = len(set(steps))
    elif best is not None:
        scored = [each for each in ordered if each.score is not None and each.score == each.score]
        chosen = sorted(scored, key=lambda each: (each.score, -each.step))[:best]
        wanted = best
    else:
        chosen, wanted = ordered[-(last or 1) :], last or 1
    if len(chosen) < wanted:
        listed = ", ".join(f"{each.step}" + ("" if each.score is None else f" ({each.score:g})") for each in ordered)
        raise CheckpointError(
            f"has {len(chosen)} of the {wanted} checkpoints asked for",
            where=where,
            fix=f"there are: {listed or 'none'}; a run keeps run.checkpoint.keep of them",
        )
    return sorted(chosen, key=lambda each: each.step)


def of_run(run: RunDirectory) -> list[Candidate]:
    """The checkpoints of a run, scored by the metric that its recipe calls best."""
    kept = checkpoints(run.checkpoints)
    if not kept:
        return []
    history = read_checkpoint(kept[0][1]).state["run"]["history"]
    by_step = scores(read_recipe(run.recipe), history)
    return [Candidate(path, step, by_step.get(step)) for step, path in kept]


def of_deltas(place: Path) -> list[Candidate]:
    """Checkpoints that were taken out of their run, and delta files whose name ends in a number, in a folder; or a
    single one. Without scores, which are in the run."""
    refuse_absent(place)
    members = sorted(place.iterdir()) if place.is_dir() and not is_checkpoint(place) else [place]
    return [
        Candidate(path, int(number[1]), None)
        for path in members
        if (number := _LAST_NUMBER.search(path.name)) and (is_checkpoint(path) or is_delta(path))
    ]


def _form_of(source: Source) -> str:
    """WeNet's own form, and of deltas that of their base."""
    if not source.below or "train.yaml" in source.sidecars:
        return "wenet"
    return "hf" if source.config is not None else "safetensors"


def of_wenet(folder: Path) -> list[Candidate]:
    """WeNet's epoch_N.pt (before 2024 N.pt; of a run in step mode step_N.pt) with the loss that the .yaml beside each
    states."""
    if not folder.is_dir():
        raise CheckpointError("is neither a run nor a folder of WeNet's", where=str(folder), fix="check the path")
    kinds: dict[str | None, list[Candidate]] = {}
    for path in folder.iterdir():
        match = _NUMBERED.fullmatch(path.name)
        if match is not None:
            kinds.setdefault(match[1], []).append(Candidate(path, int(match[2]), _loss(path.with_suffix(".yaml"))))
    return next((kinds[kind] for kind in ("epoch", None, "step") if kind in kinds), [])


def _loss(sidecar: Path) -> float | None:
    try:
        values = read_yaml(sidecar).data if sidecar.is_file() else None
    except RecipeError:  # it has no score, then; the weights may be good
        return None
    if not isinstance(values, dict):
        return None
    losses = values.get("loss_dict")
    found = losses.get("loss") if isinstance(losses, dict) else values.get("cv_loss")
    return float(found) if isinstance(found, int | float) else None
