"""Going back to an earlier checkpoint of a run: at the user's word, or after steps that were not finite.

Acts on the run directory only; the loop then takes the run up as it takes up any other. Killed between two of its acts,
it leaves a run that comes to the same point and goes back the same way.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from thawline.ckpt.load import checkpoints, read_checkpoint
from thawline.ckpt.save import save_checkpoint, step_name
from thawline.ckpt.store import retire
from thawline.errors import CheckpointError, ThawlineError
from thawline.train.rundir import RunDirectory
from thawline.train.state import RunState


def give_up_after(root: Path, step: int) -> list[int]:
    """Remove the checkpoints after `step`: they belong to a future that is trained anew. Returns their steps."""
    later = [(s, path) for s, path in checkpoints(root) if s > step]
    for _, path in later:
        retire(path)
    return [s for s, _ in later]


def pass_over(files: RunDirectory, state: RunState, *, limit: int) -> None:
    """Go back to `state.anchor`, from where the run is to go on with the batch that is next in `state`.

    What lies between is given up, the good steps among it too: taken again from the same weights they would be the same
    steps. (So did PaLM's training: Chowdhery et al. 2022, section 5.1.) The checkpoint of the anchor is replaced by one
    of the same tensors whose state says which batches are passed over.

    Raises ThawlineError where there is no such checkpoint, or where the run went back to it before.
    """
    try:
        there = read_checkpoint(files.checkpoints / step_name(state.anchor))
    except CheckpointError as exc:
        raise too_many(files, limit, f"and no checkpoint to go back to ({exc.what})") from exc
    before = RunState.from_json(there.state["run"])
    if before.passed_over and before.passed_over[-1][1] == before.cursor:
        raise too_many(files, limit, f"again after the run went back to step {there.step}")
    after = replace(
        before,
        cursor=state.cursor,
        index=state.index,
        seen=state.seen,
        bad=state.bad,
        passed_over=(*before.passed_over, (before.cursor, state.cursor)),
    )
    stretch = after.to_json()["passed_over"][-1]
    files.event("rewound", step=there.step, reached=state.step, passed_over=stretch)
    give_up_after(files.checkpoints, there.step)
    save_checkpoint(
        files.checkpoints,
        step=there.step,
        delta=there.difference,
        optimizer=there.optimizer,
        state={**there.state, "run": after.to_json()},
        base=there.base,
        ema=there.ema,
    )


def too_many(files: RunDirectory, limit: int, besides: str = "") -> ThawlineError:
    """The end of a run whose losses are not finite; its weights are those before the first of them."""
    return ThawlineError(
        f"{limit} steps in a row had a loss or a gradient that is not finite{besides and ', '}{besides}",
        where=str(files.events),
        fix="a lower optim.lr, a longer warm-up, or fp32; the file lists the samples of those steps",
    )
