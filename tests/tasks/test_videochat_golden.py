"""The golden cases of the original project through the task: chains, plans, the loss, and the doctor's two cases."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.videochat_case import BASE, CASES, STAGE2, STAGE3, STAGE3F, VideoChatCase
from tests.tasks.videochat_corpus import write_corpus
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import thawline as tl
from thawline.cli.app import run
from thawline.errors import CheckpointError
from thawline.freeze import doctor
from thawline.freeze.plan import FreezePlan
from thawline.models.videochat import vit
from thawline.models.videochat.chat import Sampling
from thawline.tasks.planning import preview
from thawline.tasks.runs import open_recipe, train
from thawline.tasks.videochat_asking import ChatModel

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("av")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, shared: Path) -> VideoChatCase:
    return VideoChatCase(shared / "parity" / "videochat2" / request.param)


def write_recipe(folder: Path, model: Path, options: dict[str, Any], plan: str = "{preset: switches}") -> Path:
    path = folder / "golden.yaml"
    corpus = write_corpus(folder / "corpus", samples=4)
    path.write_text(
        f"task: videochat\nmodel: {model}\ndata: {{train: {corpus}, batch: {{size: 2}}}}\nplan: {plan}\n"
        f"options: {json.dumps(options)}\n"
    )
    return path


def part_options(case: VideoChatCase, *files: str, **more: Any) -> dict[str, Any]:
    parts = [str(case.folder / f) for f in files]
    return {"bert": str(case.folder / "bert"), "config": str(case.folder / "config.json"), "parts": parts, **more}


def copy_without(case: VideoChatCase, folder: Path, *absent: str) -> Path:
    kept = folder / "parts"
    kept.mkdir()
    for item in case.folder.iterdir():
        if item.is_dir() and item.name != "trainable":
            shutil.copytree(item, kept / item.name, copy_function=shutil.copyfile)
        elif item.name not in absent and (item.suffix == ".pth" or item.name == "config.json"):
            shutil.copyfile(item, kept / item.name)
    return kept


def test_a_folder_of_parts_loads_whole_in_the_right_order(case: VideoChatCase) -> None:
    model: Any = tl.load(case.folder)
    by_hand = case.model(BASE, STAGE2, STAGE3, STAGE3F)
    assert not model.training
    assert list(model.state_dict()) == list(by_hand.state_dict())
    assert all(torch.equal(t, by_hand.state_dict()[n]) for n, t in model.state_dict().items())


def test_a_recipe_with_compat_upstream_builds_the_model_of_the_golden_loss(case: VideoChatCase, tmp_path: Path) -> None:
    options = part_options(case, BASE, STAGE2, STAGE3, STAGE3F, compat="upstream", freeze_lora=True)
    recipe, task = open_recipe(write_recipe(tmp_path, case.folder / "llm", options))
    model: Any = task.build(recipe)
    ids, mask = case.instruction()
    with torch.no_grad():
        found = model(list(case.io["stage3/video"]), case.prompts(), ids, mask)
    # The suggested limit for losses of these cases.
    assert abs(float(found.sum / found.tokens) - float(case.io["stage3f/loss"])) <= 1e-5


@pytest.mark.parametrize(
    ("files", "flags", "golden"),
    [
        (
            (BASE, STAGE2),
            {"freeze_vit": False, "freeze_qformer": True},
            "stage2__freeze_vit=0__freeze_qformer=1__lora=0",
        ),
        (
            (BASE, STAGE2, STAGE3),
            {"freeze_vit": True, "freeze_qformer": False},
            "stage3__freeze_vit=1__freeze_qformer=0__lora=1",
        ),
        (
            (BASE, STAGE2, STAGE3),
            {"freeze_vit": True, "freeze_qformer": True, "freeze_lora": True},
            "stage3f__freeze_vit=1__freeze_qformer=1__lora=1__freeze_lora=1",
        ),
    ],
)
def test_the_printed_plan_is_upstreams_map_parameter_by_parameter(
    case: VideoChatCase, tmp_path: Path, files: tuple[str, ...], flags: dict[str, bool], golden: str
) -> None:
    options = part_options(case, *files, compat="upstream", **flags)
    shown = preview(write_recipe(tmp_path, case.folder / "llm", options))
    wanted = case.json(f"trainable/{golden}.json")["requires_grad"]
    ours = {
        d.name.replace(".base_layer", ""): d.trains for d in shown.phases[0].decisions if not d.is_buffer
    }  # peft 0.4's spelling
    assert ours == wanted


@pytest.mark.parametrize(
    "absent", [(STAGE3,), (STAGE2, STAGE3), (BASE, STAGE2, STAGE3)], ids=["no_stage3", "base_and_last", "only_last"]
)
def test_a_folder_that_lacks_a_part_is_refused_with_exit_code_4_and_the_command(
    case: VideoChatCase, tmp_path: Path, absent: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    parts = copy_without(case, tmp_path, *absent)
    assert run(["chat", str(parts), "nothing.mp4", "-q", "who", "--json"]) == 4
    error = json.loads(capsys.readouterr().out)["error"]
    missing = ["<stage-1 file>", "<stage-3 file>"] if BASE in absent else ["<stage-3 file>"]
    assert error["fix"].startswith(f"thawline chat {parts / 'llm'} VIDEO --part")
    assert all(f"--part {name}" in error["fix"] for name in missing)
    assert f"--part {parts / STAGE3F}" in error["fix"]
    assert error["fix"].endswith(f"--bert {parts / 'bert'} --config {parts / 'config.json'}")


def test_a_file_of_trained_tensors_alone_is_refused_as_issue_235_was_not(
    case: VideoChatCase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "ckpt_02.pth"
    shutil.copyfile(case.folder / STAGE3F, alone)
    assert run(["chat", str(alone), "nothing.mp4", "-q", "who", "--json"]) == 4
    error = json.loads(capsys.readouterr().out)["error"]
    assert "(extra_queries, projection) that a run trained" in error["what"]
    assert f"thawline chat {alone} VIDEO --base DIR" in error["fix"]
    with pytest.raises(CheckpointError, match="this file alone is no model"):
        tl.load(alone)
    # The command in it, with the folder that has every file before this one.
    base = copy_without(case, tmp_path, STAGE3F)
    right = case.model(BASE, STAGE2, STAGE3, STAGE3F).state_dict()
    assert all(torch.equal(t, right[n]) for n, t in tl.load(alone, base=base).state_dict().items())


def test_the_command_for_a_file_among_its_parts_is_the_folder(case: VideoChatCase) -> None:
    with pytest.raises(CheckpointError) as caught:
        tl.load(case.folder / STAGE3F)
    assert caught.value.fix == f"thawline chat {case.folder} VIDEO"


def test_a_golden_model_trains_its_projection_and_answers(case: VideoChatCase, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, case.folder, {"freeze_lora": True, "freeze_vit": True, "freeze_qformer": True})
    made = train(recipe, ["run.epochs=1", "run.workers=0"], run=tmp_path / "run")
    base, moved = case.model(BASE, STAGE2, STAGE3, STAGE3F).state_dict(), tl.load(made.dir).state_dict()
    name = case.config().projection_name
    assert {n for n in base if not torch.equal(base[n], moved[n])} == {f"{name}.weight", f"{name}.bias"}
    delta = sorted((made.dir / "checkpoints").glob("step-*"))[-1] / "delta.safetensors"
    assert all(torch.equal(t, moved[n]) for n, t in tl.load(delta, base=case.folder).state_dict().items())
    # Upstream's file goes on top of upstream's chain.
    upstream = made.dir / "model" / "upstream.pth"
    assert all(torch.equal(t, moved[n]) for n, t in tl.load(upstream, base=case.folder).state_dict().items())
    model = ChatModel.open(made.dir)
    talk = model.talk(model.see(tmp_path / "corpus" / "dark.mkv"), sampling=Sampling(max_new_tokens=4))
    assert talk.ask("what is it").ended in ("eos", "stop", "limit")


# --- "None of the inputs have requires_grad" ---


def reentrant(layer: nn.Module, x: Tensor, *, use_reentrant: bool) -> Tensor:
    assert use_reentrant is False  # ours never is; upstream's always was
    return checkpoint(layer, x, use_reentrant=True)


def examined(case: VideoChatCase, train: list[str]) -> dict[str, doctor.Finding]:
    """What the doctor sees of one step with the first two vision blocks recomputed."""
    model = case.model(BASE, STAGE2, STAGE3)
    encoder = model.vision_encoder.encoder
    encoder.config = dataclasses.replace(encoder.config, checkpoint_blocks=2)
    frozen = FreezePlan(train=train).apply(model)
    model.train()
    ids, mask = case.instruction()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        with doctor.watch(model, frozen.resolution) as seen:
            model(list(case.io["stage3/video"]), case.prompts(), ids, mask).sum.backward()
    return {f.code: f for f in doctor.after_first_step(model, frozen.resolution, seen)}


def test_the_doctor_names_the_vision_blocks_that_reentrant_recomputation_robs(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = VideoChatCase(shared / "parity" / "videochat2" / "mistral_a")
    monkeypatch.setattr(vit, "checkpoint", reentrant)
    found = examined(case, ["vision_encoder.encoder.blocks", "mistral_proj"])
    lost = found["no-gradient-checkpoint"]
    assert lost.severity == "error"
    assert len(lost.names) == 26  # of 39, as measured on the original
    assert all(".blocks.0." in n or ".blocks.1." in n for n in lost.names)


def test_the_doctor_calls_the_warning_harmless_where_the_whole_transformer_is_frozen(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = VideoChatCase(shared / "parity" / "videochat2" / "mistral_a")
    monkeypatch.setattr(vit, "checkpoint", reentrant)
    found = examined(case, ["mistral_proj"])
    assert "no-gradient-checkpoint" not in found
    assert [f.severity for f in found.values()] == ["info"]
    assert "checkpoint" in next(iter(found))


def test_as_we_recompute_there_is_nothing_to_find(shared: Path) -> None:
    case = VideoChatCase(shared / "parity" / "videochat2" / "mistral_a")
    assert examined(case, ["vision_encoder.encoder.blocks", "mistral_proj"]) == {}
    assert examined(case, ["mistral_proj"]) == {}
