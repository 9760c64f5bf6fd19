"""The recipes of the reference result, on the first clips of their real data."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from thawline.cli.app import app
from thawline.tasks.auditing import audit_run
from thawline.tasks.runs import train

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "fsdd"

pytest.importorskip("kaldi_native_fbank", reason="the extra `speech` is not installed")


def run(*words: str) -> None:
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_a_recogniser_made_from_nothing_meets_a_new_speaker_with_the_lower_half_of_its_encoder_frozen(
    shared: Path, tmp_path: Path
):
    speech = shared / "data" / "fsdd"
    for name in ("base.train", "new.train", "new.dev"):
        rows = (speech / f"{name}.list").read_text().splitlines()[:: 45 if name == "base.train" else 15]
        (tmp_path / f"{name}.list").write_text("\n".join(r.replace('"wav": "', f'"wav": "{speech}/') for r in rows))
    shutil.copytree(RECIPES, tmp_path / "fsdd", ignore=shutil.ignore_patterns("units.txt", "global_cmvn"))
    model = tmp_path / "fsdd" / "model"
    run("data", "units", str(speech / "base.train.list"), "--level", "word", "-o", str(model / "units.txt"))
    run(
        "data",
        "cmvn",
        str(tmp_path / "base.train.list"),
        "--conf",
        str(model / "train.yaml"),
        "-o",
        str(model / "global_cmvn"),
    )

    data = {"data.valid": str(tmp_path / "new.dev.list"), "data.batch": {"size": 4}, "run.workers": 0, "run.steps": 3}
    first = train(
        tmp_path / "fsdd" / "scratch.yaml",
        {**data, "data.train": str(tmp_path / "base.train.list")},
        run=tmp_path / "a",
    )
    second = train(
        tmp_path / "fsdd" / "new_speaker.yaml",
        {**data, "data.train": str(tmp_path / "new.train.list"), "model": str(first.dir)},
        run=tmp_path / "b",
    )
    assert second.metrics["valid/wer"] >= 0
    assert audit_run(second.dir).trained
    before, after = (open_tensors(made.dir / "model") for made in (first, second))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[2] for name in changed if name.startswith("encoder.encoders.")} == {"2", "3"}
    assert not any(name.startswith(("encoder.embed.", "encoder.global_cmvn.")) for name in changed)


def open_tensors(model: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(model / "final.pt", weights_only=True))
