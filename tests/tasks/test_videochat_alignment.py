"""Stage 1 as a run: from BERT and a vision transformer to a file that stage 2 begins with."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tasks.videochat_corpus import SECTION, write_bert, write_llm, write_video

import thawline as tl
from thawline.cli.app import run as cli
from thawline.core.extras import need
from thawline.errors import CheckpointError, RecipeError, ThawlineError
from thawline.models.videochat.alignment import VideoAlignment
from thawline.models.videochat.config import VisionConfig
from thawline.models.videochat.vit import VisionTransformer
from thawline.tasks.auditing import audit_run
from thawline.tasks.planning import preview
from thawline.tasks.runs import train
from thawline.tasks.videochat_alignment_home import AlignmentHome
from thawline.train.loop import Run
from thawline.train.rundir import read_rows

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = REPOSITORY / "recipes" / "videochat_stage1.yaml"

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("av")

CAPTIONS = {"dark": "look at the video", "light": "the video .", "grey": "look . look"}
CONFIG = {
    "model": {
        "vision_encoder": {k: v for k, v in SECTION["vision_encoder"].items() if k != "vit_add_ln"},
        "embed_dim": 8,
        "qformer_num_query_tokens": 4,
        "drop_path_rate": 0.1,
        "temp": 0.07,
    },
    "criterion": {"loss_weight": {"vtc": 1.0, "vtm": 1.0, "cap": 1.0}, "vtm_cat_text_cls": True},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT's directory with weights, UMT's file, and captioned videos."""
    folder = tmp_path_factory.mktemp("stage1")
    transformers = need("transformers", extra="hf")
    write_bert(folder / "bert")
    torch.manual_seed(1)
    sizes = json.loads((folder / "bert" / "config.json").read_text())
    transformers.BertForPreTraining(transformers.BertConfig(**sizes)).save_pretrained(folder / "weights")
    (folder / "weights" / "model.safetensors").rename(folder / "bert" / "model.safetensors")
    # UMT's own file has the last block too, which VideoChat2 leaves away.
    whole = VisionTransformer(VisionConfig(img_size=32, width=24, depth=4, heads=2, return_index=-1))
    torch.save(whole.state_dict(), folder / "l16_25m.pth")
    for shade, grey in (("dark", 10), ("light", 170), ("grey", 90)):
        write_video(folder / f"{shade}.mkv", grey)
    rows = [{"video": f"{shade}.mkv", "caption": CAPTIONS[shade]} for shade in CAPTIONS] * 3
    (folder / "captions.json").write_text(json.dumps(rows))
    return folder


def tiny(home: Path, *more: str) -> list[str]:
    """The shipped recipe with the tiny model in place of the paths that a user fills in."""
    return [
        f"model={home / 'bert'}",
        f"data.train={home / 'captions.json'}",
        f"data.valid={home / 'captions.json'}",
        "data.batch.size=3",
        f"options.parts={json.dumps([str(home / 'l16_25m.pth')])}",
        f"options.config={json.dumps(CONFIG)}",
        "run.workers=0",
        "run.epochs=2",
        "optim.lr=1e-2",
        *more,
    ]


@pytest.fixture(scope="module")
def finished(home: Path) -> Run:
    return train(SHIPPED, tiny(home, "run.epochs=12"), run=home / "finished")


def sums(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_loss_falls_and_everything_but_the_vision_transformer_moves(home: Path, finished: Run) -> None:
    held = [r for r in read_rows(finished.dir / "metrics.jsonl") if "valid/loss" in r]
    assert held[-1]["valid/loss"] < held[0]["valid/loss"]
    assert {"valid/contrastive_loss", "valid/matching_loss", "valid/captioning_loss"} <= held[0].keys()
    base, made = torch.load(home / "l16_25m.pth"), tl.load(finished.dir).state_dict()
    for name, tensor in made.items():
        if name.startswith("vision_encoder."):
            assert torch.equal(tensor, base[name.removeprefix("vision_encoder.")])
    assert not audit_run(finished.dir).broken


def test_the_plan_names_what_begins_anew_and_what_is_left_out(home: Path) -> None:
    shown = preview(SHIPPED, tiny(home))
    trained = shown.to_json()["phases"][0]["trainable_names"]
    assert not any(n.startswith("vision_encoder.") for n in trained)
    assert {"temp", "query_tokens", "vision_temp_embed", "qformer.cls.predictions.bias"} <= set(trained)
    decays = {d.name for d in shown.phases[0].decisions if d.decays}
    assert not decays & {"temp", "query_tokens", "vision_temp_embed", "qformer.cls.predictions.bias"}
    assert "qformer.bert.encoder.layer.0.attention.self.query.weight" in decays
    assert "l16_25m.pth: 13 tensors left out" in shown.text()
    assert "tensors begin anew" in shown.text()


def test_what_begins_anew_must_be_said(home: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="come from no file: query_tokens") as caught:
        train(SHIPPED, tiny(home, "options.new=[crossattention, heads, vision_layernorm]"), run=tmp_path / "run")
    assert caught.value.fix == "options.new: [queries] begins them here"


def test_the_result_its_checkpoint_and_upstreams_file_are_the_same_tensors(home: Path, finished: Run) -> None:
    wanted = tl.load(finished.dir).state_dict()
    checkpoint = sorted((finished.dir / "checkpoints").glob("step-*"))[-1]
    upstream = torch.load(finished.dir / "model" / "upstream.pth", weights_only=True)["model"]
    best = [n for n, t in wanted.items() if not torch.equal(t, upstream[n])]
    assert list(upstream) == list(wanted)
    assert best == []
    assert tl.load(finished.dir / "model").state_dict().keys() == tl.load(checkpoint).state_dict().keys()
    again = train(SHIPPED, tiny(home, "run.steps=1", "run.checkpoint.best=null"), run=home / "one")
    newest = sorted((again.dir / "checkpoints").glob("step-*"))[-1]
    one, two = tl.load(again.dir).state_dict(), tl.load(newest).state_dict()
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_stage_2_begins_with_the_file_that_stage_1_left(home: Path, finished: Run, tmp_path: Path) -> None:
    write_llm(tmp_path / "llm")
    section = {**SECTION, "extra_num_query_token": 2}
    overrides = [
        f"model={tmp_path / 'llm'}",
        f"data.train={home / 'captions.json'}",
        f"data.valid={home / 'captions.json'}",
        f"options.parts={json.dumps([str(finished.dir / 'model' / 'upstream.pth')])}",
        f"options.config={json.dumps(section)}",
        f"options.bert={home / 'bert'}",
        "options.dtype=float32",
        "run.workers=0",
        "run.steps=1",
    ]
    made = train(REPOSITORY / "recipes" / "videochat_stage2.yaml", overrides, run=tmp_path / "run")
    one = torch.load(finished.dir / "model" / "upstream.pth", weights_only=True)["model"]
    base = json.loads((made.dir / "base.json").read_text())
    assert base["fingerprint"]
    assert tl.load(made.dir).state_dict()["query_tokens"].shape == one["query_tokens"].shape


def test_a_random_start_needs_no_weights_and_is_the_same_twice(home: Path, tmp_path: Path) -> None:
    drawn = tiny(home, "init=random", "options.parts=[]", "options.new=[]", "run.epochs=1")
    one, two = (train(SHIPPED, drawn, run=tmp_path / name) for name in ("one", "two"))
    assert sums(one.dir / "model") == sums(two.dir / "model")
    assert not audit_run(one.dir).broken
    with pytest.raises(RecipeError, match="init: random draws every weight, and 1 files"):
        train(SHIPPED, tiny(home, "init=random"), run=tmp_path / "three")


def test_images_and_bad_files_go_with_videos(home: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (40, 32), (90, 90, 90)).save(home / "still.png")
    (home / "torn.mkv").write_bytes((home / "dark.mkv").read_bytes()[:200])
    rows = [{"video": "dark.mkv", "caption": "the video"}, {"image": "still.png", "caption": "look"}]
    rows += [{"video": "torn.mkv", "caption": "the video"}, {"video": "dark.mkv", "QA": [{"q": "what", "a": "it"}]}]
    (home / "mixed.json").write_text(json.dumps([*rows, rows[0]]))
    more = (f"data.train={home / 'mixed.json'}", "run.epochs=1", "data.max_bad=0.6", "data.batch.size=5")
    made = train(SHIPPED, tiny(home, *more), run=tmp_path / "run")
    bad = {e["key"]: e["reason"] for e in read_rows(made.dir / "events.jsonl") if e["event"] == "bad sample"}
    assert "torn.mkv" in bad["mixed.json#2"]
    assert "one clip with its caption" in bad["mixed.json#3"]
    assert made.step == 1


def test_evaluate_says_how_often_a_caption_finds_its_clip(
    home: Path, finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = home / "rows.jsonl"
    assert cli(["evaluate", str(finished.dir), str(home / "captions.json"), "--json", "--out", str(rows)]) == 0
    told = json.loads(capsys.readouterr().out)
    places = [json.loads(line)["place"] for line in rows.read_text().splitlines()]
    assert told["samples"] == len(places) == 9
    assert told["recall1"] == pytest.approx(sum(p == 1 for p in places) / 9)
    assert told["recall5"] >= told["recall1"]


def test_a_batch_that_does_not_fit_is_not_cut_behind_ones_back(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(VideoAlignment, "see", full)
    with pytest.raises(RecipeError, match="3 captions do not fit into memory at once") as caught:
        train(SHIPPED, tiny(home, "run.epochs=1"), run=tmp_path / "run")
    assert "data.batch.size" in caught.value.fix


PROGRAM = (
    "import sys, json; from thawline.tasks.runs import train; from thawline.train.monitor import PlainMonitor;"
    "train(sys.argv[1], json.loads(sys.argv[2]), run=sys.argv[3],"
    " monitor=PlainMonitor(out=sys.stdout, interval_s=0))"
)


@pytest.mark.long
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(home: Path, tmp_path: Path) -> None:
    overrides = tiny(home, "run.epochs=6", "run.checkpoint.every=2 steps")
    whole = train(SHIPPED, overrides, run=tmp_path / "whole")
    draw = random.Random(5)

    def spawn() -> subprocess.Popen[bytes]:
        words = [sys.executable, "-c", PROGRAM, str(SHIPPED), json.dumps(overrides), str(tmp_path / "cut")]
        env: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        return subprocess.Popen(words, stdout=subprocess.PIPE, cwd=REPOSITORY, env=env)

    for _ in range(4):
        child = spawn()
        assert child.stdout is not None
        child.stdout.readline()  # a step is done
        try:
            child.wait(draw.uniform(0, 0.3))
        except subprocess.TimeoutExpired:
            child.kill()
        child.communicate()
    last = spawn()
    last.communicate()
    assert last.returncode == 0
    assert sums(tmp_path / "cut" / "model") == sums(whole.dir / "model")
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (whole.dir / "metrics.jsonl").read_bytes()
    assert not audit_run(tmp_path / "cut").broken


@pytest.mark.parametrize(
    "odd",
    [
        {"model": 5},
        {"model": {"vision_encoder": 5}},
        {"criterion": 5},
        {"criterion": {"loss_weight": {"vtc": "much"}}},
    ],
)
def test_sections_of_another_kind_than_upstreams_are_refused_by_name(
    home: Path, tmp_path: Path, odd: dict[str, Any]
) -> None:
    config = f"options.config={json.dumps({**CONFIG, **odd})}"
    with pytest.raises(RecipeError, match="of another kind than upstream's") as caught:
        train(SHIPPED, tiny(home, config), run=tmp_path / "run")
    assert str(home / "bert" / "config.json") in caught.value.where


@pytest.mark.parametrize(("name", "value"), [("frames", 0), ("size", "large"), ("config", 5), ("format", "x/9")])
def test_a_stage_1_description_that_was_written_over_is_refused_by_name(
    finished: Run, tmp_path: Path, name: str, value: Any
) -> None:
    told = json.loads((finished.dir / "model" / "alignment.json").read_text())
    file = tmp_path / "alignment.json"
    file.write_text(json.dumps({**told, name: value}))
    with pytest.raises(ThawlineError) as caught:
        AlignmentHome.of(tmp_path)
    assert caught.value.where == str(file)
