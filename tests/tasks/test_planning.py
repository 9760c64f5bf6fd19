"""`thawline plan`: what it says of memory, of a run with averages too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.speech_fixture import write_all

from thawline.cli.app import run


def test_averages_and_what_a_save_copies_are_in_the_estimate_of_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_all(tmp_path))
    plan = 'plan={train: [ctc], thaw: [{after: 1 epochs, train: ["encoder.encoders[-1]"]}]}'
    found = {}
    for name, ema in (("without", "run.ema=null"), ("with", "run.ema={decay: 0.99}")):
        assert run(["plan", recipe, plan, ema, "--json"]) == 0
        found[name] = [phase["memory"] for phase in json.loads(capsys.readouterr().out)["phases"]]
    for without, with_ema in zip(found["without"], found["with"], strict=True):
        assert without["averages_bytes"] == 0
        assert with_ema["averages_bytes"] == with_ema["gradients_bytes"]  # a thaw adds to what trains; all is fp32
        for word in ("total_bytes", "saving_bytes"):
            assert with_ema[word] == without[word] + with_ema["averages_bytes"]
    assert found["with"][1]["averages_bytes"] > found["with"][0]["averages_bytes"]
    assert run(["plan", recipe, plan, "run.ema={decay: 0.99}"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("memory"))
    assert ", averages 0.0 MB, together " in line
    assert "a save copies 0.0 MB on the host" in line
