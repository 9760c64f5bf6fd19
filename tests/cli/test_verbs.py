"""Every verb on a small recogniser: what it prints, what it leaves, and with which exit code it refuses."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.cli.speech_fixture import RECIPE, write_all

from thawline.cli.app import VERBS, run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and a finished run of it."""
    folder = tmp_path_factory.mktemp("speech")
    recipe = write_all(folder)
    assert run(["train", str(recipe), "--run", str(folder / "run")]) == 0
    return folder


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = run(list(argv))
    out = capsys.readouterr()
    return code, out.out, out.err


def newest(run_dir: Path) -> Path:
    return sorted((run_dir / "checkpoints").glob("step-*"))[-1]


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, verb, "--help")
    assert code == 0
    assert out.startswith(f"Usage: thawline {verb}")


def test_help_is_quick_and_imports_no_torch() -> None:
    program = "import sys; from thawline.cli.app import run; run(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_misspelt_verb_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "trian")
    assert code == 2
    assert "Did you mean 'train'?" in err


def test_run_delta_and_exported_directory_give_the_same_text(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wav = str(trained / "dev0.wav")
    texts = []
    best = json.loads((newest(trained / "run") / "state.json").read_text())["run"]["history"][-1]["step"]
    checkpoint = trained / "run" / "checkpoints" / f"step-{best:08d}"
    for argv in (
        [str(trained / "run")],
        [str(trained / "run" / "model")],
        [str(checkpoint)],
        [str(checkpoint / "delta.safetensors"), "--base", str(trained / "base")],
    ):
        code, out, _ = call(capsys, "transcribe", argv[0], wav, *argv[1:], "--json")
        assert code == 0
        texts.append(json.loads(out)["transcripts"][0]["text"])
    assert len(set(texts)) == 1


def test_a_delta_over_another_base_is_refused_with_fingerprints_and_tensors(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_all(tmp_path)
    import torch

    weights = torch.load(tmp_path / "base" / "final.pt")
    weights["decoder.after_norm.weight"][0] += 1
    torch.save(weights, tmp_path / "base" / "final.pt")
    delta = newest(trained / "run") / "delta.safetensors"
    code, _, err = call(capsys, "transcribe", str(delta), str(trained / "dev0.wav"), "--base", str(tmp_path / "base"))
    assert code == 4
    assert "belongs to another base" in err
    assert "decoder.after_norm.weight" in err
    assert err.count("made over: ") == 1
    assert err.count("given: ") == 1


def test_the_audit_holds_and_notices_a_frozen_weight_that_moved(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, "audit", str(trained / "run"), "--json")
    assert code == 0
    assert json.loads(out)["broken"] is False
    import shutil

    import torch

    copied = tmp_path / "run"
    shutil.copytree(trained / "run", copied)
    weights = torch.load(copied / "model" / "final.pt")
    weights["decoder.after_norm.weight"][0] += 1e-6
    torch.save(weights, copied / "model" / "final.pt")
    code, _, err = call(capsys, "audit", str(copied))
    assert code == 5
    assert "decoder.after_norm.weight" in err


def test_diff_says_what_differs_and_ends_in_one(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "diff", str(trained / "base"), str(trained / "run"), "--json")
    assert code == 1
    changed = {t["name"] for t in json.loads(out)["tensors"] if t["status"] == "changed"}
    assert changed
    assert all(name.startswith(("ctc.", "encoder.encoders.1.")) for name in changed)
    assert call(capsys, "diff", str(trained / "base"), str(trained / "base"))[0] == 0


def test_evaluate_gives_at_least_wer_and_utterances(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "evaluate", str(trained / "run"), str(trained / "dev.list"), "--json")
    assert code == 0
    found = json.loads(out)
    assert found["utterances"] == 4
    assert found["wer"] >= 0


@pytest.mark.parametrize("form", ["safetensors", "wenet"])
def test_a_run_converts_to_one_full_file_that_loads(
    trained: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / ("full.safetensors" if form == "safetensors" else "final.pt")
    code, out, _ = call(capsys, "convert", str(trained / "run"), str(target), "--to", form, "--json")
    assert code == 0
    assert json.loads(out)["verified"] is True
    assert call(capsys, "diff", str(trained / "run"), str(target))[0] == 0


def test_the_same_command_on_a_finished_run_changes_nothing(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "run" / "model" / "final.pt").read_bytes()
    assert run(["train", str(trained / "recipe.yaml"), "--run", str(trained / "run")]) == 0
    assert (trained / "run" / "model" / "final.pt").read_bytes() == before


def test_plan_prints_the_decisions_and_trains_nothing(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "plan", str(trained / "recipe.yaml"), "--json")
    assert code == 0
    phase = json.loads(out)["phases"][0]
    assert all(n.startswith(("ctc.", "encoder.encoders.1.")) for n in phase["trainable_names"])


def test_init_writes_a_recipe_that_plans(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "mine.yaml"
    argv = ["init", str(trained / "base"), "--train", str(trained / "train.list"), "--valid", str(trained / "dev.list")]
    assert run([*argv, "-o", str(target)]) == 0
    assert call(capsys, "plan", str(target))[0] == 0
    assert call(capsys, "init", str(trained / "base"), "-o", str(target))[0] == 2


REFUSALS: dict[str, tuple[list[str], int, str]] = {
    "a selector that matches nothing": (["plan={train: [decorder]}"], 2, "decorder"),
    "a misspelt key": (["optim.learning_rate=1"], 2, "unknown key 'learning_rate' in 'optim'"),
    "an unknown task": (["task=speach"], 2, "did you mean 'speech'?"),
    "a missing list": (["data.train=trian.list"], 3, "trian.list"),
    "an empty list": (["data.train=empty.list"], 3, "empty.list"),
    "a missing base": (["model=bass"], 4, "bass"),
    "nothing left to train": (['plan={train: ["**", "!**"]}'], 2, "train"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_meant_is_refused_with_its_place(
    case: str, trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    (trained / "empty.list").write_text("")
    overrides, expected, words = REFUSALS[case]
    code, out, err = call(capsys, "train", "recipe.yaml", *overrides, "--run", "refused", "--json")
    assert code == expected, err
    assert words in err
    assert "Traceback" not in err
    assert json.loads(out)["error"]["exit_code"] == expected


def test_a_truncated_recording_costs_one_sample_and_is_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_all(tmp_path)
    wav = tmp_path / "train3.wav"
    wav.write_bytes(wav.read_bytes()[:2000])
    code, _, err = call(capsys, "train", str(recipe), "run.epochs=1", "--run", str(tmp_path / "run"))
    assert code == 0, err
    assert "train3" in err
    listed = (tmp_path / "run" / "events.jsonl").read_text()
    assert "train3" in listed


def test_a_full_disk_keeps_the_last_checkpoint_and_ends_with_a_message(tmp_path: Path) -> None:
    recipe = write_all(tmp_path)
    first = [sys.executable, "-m", "thawline", "train", str(recipe), "run.epochs=1", "--run", str(tmp_path / "run")]
    subprocess.run(first, check=True, capture_output=True)
    kept = {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    size = max(p.stat().st_size for p in newest(tmp_path / "run").iterdir())

    def small_files() -> None:
        # A limit on file sizes is what a quota or a full disk looks like to a write: EFBIG after so many bytes.
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    done = subprocess.run(
        [*first[:5], "run.epochs=2", "--allow", "run.epochs", "--run", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        preexec_fn=small_files,
    )
    assert done.returncode == 75, done.stderr
    assert "Traceback" not in done.stderr
    assert kept <= {p.name for p in (tmp_path / "run" / "checkpoints").iterdir()}
    finished = subprocess.run(
        [*first[:5], "run.epochs=2", "--allow", "run.epochs", "--run", str(tmp_path / "run")], capture_output=True
    )
    assert finished.returncode == 0, finished.stderr


def test_kill_dash_nine_leaves_a_run_that_ends_in_the_same_files(tmp_path: Path) -> None:
    recipe = write_all(tmp_path)
    recipe.write_text(RECIPE.replace("epochs: 2", "epochs: 4"))
    argv = [sys.executable, "-m", "thawline", "train", str(recipe), "--run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*argv, str(tmp_path / "whole")], check=True, capture_output=True, env=environment)
    metrics = tmp_path / "cut" / "metrics.jsonl"
    for lines in (3, 7):
        child = subprocess.Popen([*argv, str(tmp_path / "cut")], stderr=subprocess.DEVNULL, env=environment)
        while child.poll() is None and _lines(metrics) < lines:
            pass
        child.kill()
        child.wait()
    subprocess.run([*argv, str(tmp_path / "cut")], check=True, capture_output=True, env=environment)
    assert _bytes(tmp_path / "cut" / "model") == _bytes(tmp_path / "whole" / "model")
    assert metrics.read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _bytes(folder: Path) -> dict[str, Any]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_another_tools_switches_become_a_plan_that_is_printed(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(trained / "base")
    code, out, _ = call(capsys, "plan", base, "--like", "wenet", "freeze_modules=encoder,ctc")
    assert code == 0
    assert "- '!encoder'" in out
    code, out, _ = call(capsys, "plan", base, "--like", "wenet", "freeze_modules=encoder,ctc", "--json")
    names = json.loads(out)["phases"][0]["trainable_names"]
    assert names
    assert all(name.startswith("decoder.") for name in names)
    assert call(capsys, "plan", base, "--like", "wenet", "freeze_modules=encodr")[0] == 2
