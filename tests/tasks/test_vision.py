"""The vision task on tiny networks and images made on the spot."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tasks.vision_cases import COLOURS, RECIPE, run_case, write_case, write_folder
from torch import nn

import thawline as tl
from thawline.cli.app import run as cli
from thawline.errors import CheckpointError, DataError, RecipeError
from thawline.tasks.auditing import audit_run
from thawline.tasks.kinds import kind_of
from thawline.tasks.vision import VisionTask, confusion
from thawline.tasks.vision_classifier import Classifier
from thawline.tasks.vision_home import VisionHome
from thawline.train.recipe import read_recipe
from thawline.train.rundir import read_rows

REPOSITORY = Path(__file__).resolve().parents[2]


def sums(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def tensors_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "model" / "model.safetensors")


def changed(folder: Path, made: dict[str, torch.Tensor]) -> set[str]:
    base = load_file(folder / "base.safetensors")
    return {n for n in made if n not in base or base[n].shape != made[n].shape or not torch.equal(base[n], made[n])}


def test_a_head_learns_the_colours_and_nothing_below_it_changes(tmp_path: Path) -> None:
    write_case(tmp_path)
    result = run_case(tmp_path, overrides=["plan.thaw=[]", "run.epochs=12", "optim.lr=0.1"])
    assert result.metrics["valid/accuracy"] >= 0.9
    assert changed(tmp_path, tensors_of(result.dir)) == {"head.weight", "head.bias"}
    assert audit_run(result.dir).broken is False


def test_a_thawed_layer_moves_with_its_statistics_and_the_stem_does_not(tmp_path: Path) -> None:
    write_case(tmp_path)
    result = run_case(tmp_path, overrides=["run.checkpoint.best=null"])
    moved = changed(tmp_path, tensors_of(result.dir))
    assert "layer.1.running_mean" in moved
    assert not any(name.startswith("stem") for name in moved)
    phases = [(e["step"], e["phase"]) for e in read_rows(result.dir / "events.jsonl") if e["event"] == "phase"]
    assert phases == [(10, 1)]
    assert audit_run(result.dir).broken is False


def test_tracking_statistics_drift_and_pinned_ones_do_not(tmp_path: Path) -> None:
    write_case(tmp_path)
    options = ["plan.thaw=[]", "run.epochs=1", "run.checkpoint.best=null"]
    tracking = run_case(tmp_path, "tracking", [*options, "plan.norms=tracking"])
    moved = changed(tmp_path, tensors_of(tracking.dir))
    statistics = {f"{n}.{s}" for n in ("stem.1", "layer.1") for s in ("running_mean", "running_var")}
    assert (
        moved == {"head.weight", "head.bias", "stem.1.num_batches_tracked", "layer.1.num_batches_tracked"} | statistics
    )
    assert audit_run(tracking.dir).broken is False


def test_an_audit_of_a_tampered_model_names_the_tensor(tmp_path: Path) -> None:
    write_case(tmp_path)
    result = run_case(tmp_path, overrides=["plan.thaw=[]", "run.epochs=1"])
    made = tensors_of(result.dir)
    made["stem.1.running_var"][0] += 1e-3
    save_file(made, result.dir / "model" / "model.safetensors")
    report = audit_run(result.dir)
    assert report.moved_buffers == ("stem.1.running_var",)
    assert cli(["audit", str(result.dir)]) == 5


def test_groupnorm_in_place_of_batchnorm_is_exported_and_loads_again(tmp_path: Path) -> None:
    write_case(tmp_path)
    result = run_case(tmp_path, overrides=["plan.norms=groupnorm", "run.epochs=1", "plan.thaw=[]"])
    model = tl.load(result.dir)
    assert isinstance(model.get_submodule("stem.1"), nn.GroupNorm)
    assert json.loads((result.dir / "model" / "vision.json").read_text())["groupnorm"] == ["stem.1", "layer.1"]
    measured = Classifier.open(result.dir).evaluate(tmp_path / "valid").metrics["accuracy"]
    assert measured == pytest.approx(result.metrics["valid/accuracy"])


def test_a_new_head_starts_at_the_loss_of_a_guess(tmp_path: Path) -> None:
    path = write_case(tmp_path)
    task, recipe = VisionTask(), read_recipe(path)
    model = task.build(recipe)
    samples = task.samples(recipe, model, "valid")
    batch = samples.collate([samples.read(i, 0) for i in range(len(samples))])
    loss = task.evaluate(model.eval(), samples, iter([batch])).metrics["loss"]
    assert loss == pytest.approx(math.log(4), abs=0.05)  # weights of spread 0.01 leave the logits near zero
    again = VisionTask().build(recipe)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    other = VisionTask().build(read_recipe(path, ["run.seed=6"]))
    assert not torch.equal(model.head.weight, other.head.weight)  # type: ignore[union-attr]


def test_a_run_on_a_run_keeps_the_rows_of_classes_that_both_know(tmp_path: Path) -> None:
    write_case(tmp_path)
    first = run_case(tmp_path, "first", ["run.epochs=1", "plan.thaw=[]"])
    write_folder(tmp_path / "some", names=("red", "blue"))
    (tmp_path / "some" / "violet").mkdir()
    next((tmp_path / "some" / "red").iterdir()).rename(tmp_path / "some" / "violet" / "x.png")
    task = VisionTask()
    model = task.build(read_recipe(tmp_path / "tiny.yaml", [f"model={first.dir}", f"data.train={tmp_path / 'some'}"]))
    before = tensors_of(first.dir)["head.weight"]
    known = sorted(COLOURS)
    rows = model.head.weight  # type: ignore[union-attr]
    assert task.vision_home.classes == ("blue", "red", "violet")
    assert torch.equal(rows[0], before[known.index("blue")])
    assert torch.equal(rows[1], before[known.index("red")])
    assert task.head_change is not None
    assert (task.head_change.kept, task.head_change.new) == (("blue", "red"), ("violet",))
    assert task.notes == ("head head: 2 rows kept (blue, red), 1 drawn (violet), 2 of the old left out",)


def test_classes_that_the_model_does_not_have_are_refused_with_the_remedy(tmp_path: Path) -> None:
    write_case(tmp_path)
    with pytest.raises(DataError, match="the model has no class 'blue'") as caught:
        run_case(tmp_path, overrides=["options.head=keep"])
    assert "options.head: replace" in caught.value.fix


def test_a_weights_file_without_its_network_is_refused_with_the_remedy(tmp_path: Path) -> None:
    write_case(tmp_path)
    with pytest.raises(CheckpointError, match="do not tell which network") as caught:
        run_case(tmp_path, overrides=['options.model_fn=""'])
    assert "options.model_fn" in caught.value.fix


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("tests.tasks.vision_cases:tinny", "cannot be imported"),
        ("tests.tasks.vision_cases:not_a_network", "not a torch module"),
        ("no_such_module_at_all:f", "cannot be imported"),
    ],
)
def test_a_function_that_makes_no_network_is_refused(tmp_path: Path, given: str, words: str) -> None:
    write_case(tmp_path)
    with pytest.raises(RecipeError, match=words):
        run_case(tmp_path, overrides=[f"options.model_fn={given}"])


def test_weights_of_another_size_are_refused_by_name(tmp_path: Path) -> None:
    write_case(tmp_path)
    with pytest.raises(CheckpointError, match="of another shape") as caught:
        run_case(tmp_path, overrides=["options.model_args={width: 4}"])
    assert "stem.0.weight (8, 3, 3, 3) in the file, (4, 3, 3, 3) in the model" in str(caught.value)


def test_a_random_start_becomes_a_base_that_is_built_from_its_own_files(tmp_path: Path) -> None:
    write_case(tmp_path)
    options = ["init=random", "model=tests.tasks.vision_cases:tiny", 'plan={train: ["**"]}', "run.epochs=1"]
    one = run_case(tmp_path, "one", options)
    other = run_case(tmp_path, "other", options)
    assert sums(one.dir / "model") == sums(other.dir / "model")
    assert (one.dir / "base" / "vision.json").exists()


def test_workers_change_no_bit(tmp_path: Path) -> None:
    write_case(tmp_path)
    one, other = (
        run_case(tmp_path, "one", ["run.epochs=2"]),
        run_case(tmp_path, "two", ["run.epochs=2", "run.workers=2"]),
    )
    assert sums(one.dir / "model") == sums(other.dir / "model")
    assert (one.dir / "metrics.jsonl").read_bytes() == (other.dir / "metrics.jsonl").read_bytes()


def test_one_image_that_is_no_image_costs_one_sample(tmp_path: Path) -> None:
    write_case(tmp_path)
    (tmp_path / "train" / "red" / "03.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    result = run_case(tmp_path, overrides=["run.epochs=1"])
    bad = [e for e in read_rows(result.dir / "events.jsonl") if e["event"] == "bad sample"]
    assert [e["key"] for e in bad] == ["red/03.png"]
    assert "cannot be read as an image" in bad[0]["reason"]


@pytest.mark.long
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    write_case(tmp_path, RECIPE.replace("epochs: 4", "epochs: 14").replace("2 epochs", "7 epochs"))
    whole = run_case(tmp_path, "whole")
    for delay_ms in (0, 40, 90, 150, 220, 300):
        child = spawn(tmp_path)
        assert child.stdout is not None
        child.stdout.readline()  # training has begun
        try:
            child.wait(delay_ms / 1000)
        except subprocess.TimeoutExpired:
            child.kill()
        child.communicate()
    finished = spawn(tmp_path)
    finished.communicate()
    assert finished.returncode == 0
    assert sums(tmp_path / "cut" / "model") == sums(whole.dir / "model")
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (whole.dir / "metrics.jsonl").read_bytes()
    assert audit_run(tmp_path / "cut").broken is False


def spawn(folder: Path) -> subprocess.Popen[bytes]:
    program = (
        "import sys; from pathlib import Path; from thawline.tasks.runs import train;"
        "from thawline.train.monitor import PlainMonitor; folder = Path(sys.argv[1]);"
        "train(folder / 'tiny.yaml', run=folder / 'cut', monitor=PlainMonitor(out=sys.stdout, interval_s=0))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder)],
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )


# --- models of transformers


def write_hf(folder: Path, kind: str) -> Path:
    """A tiny random classifier as `save_pretrained` writes it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    configs: dict[str, Any] = {
        "resnet": lambda: transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=6
        ),
        "vit": lambda: transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=16,
            patch_size=4,
            num_labels=6,
        ),
        "convnext": lambda: transformers.ConvNextConfig(
            hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=6
        ),
    }
    model = transformers.AutoModelForImageClassification.from_config(configs[kind]())
    model.save_pretrained(folder)
    note = {"size": {"shortest_edge": 16}, "image_mean": [0.4] * 3, "image_std": [0.3] * 3, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(note))
    return folder


@pytest.mark.parametrize(
    ("kind", "head", "thawed"),
    [
        ("resnet", "classifier.1", "resnet.encoder.stages[-1]"),
        ("vit", "classifier", "vit.layers[-1]"),
        ("convnext", "classifier", "convnext.encoder.stages[-1]"),
    ],
)
def test_a_transformers_classifier_gets_a_head_trains_and_is_read_by_transformers(
    tmp_path: Path, kind: str, head: str, thawed: str
) -> None:
    transformers = pytest.importorskip("transformers")
    write_case(tmp_path)
    write_hf(tmp_path / kind, kind)
    options = [f"model={tmp_path / kind}", 'options.model_fn=""', "data.conf={}", "run.epochs=2"]
    plan = f'plan={{train: ["{head}"], thaw: [{{after: 1 epoch, train: ["{thawed}"], lr: 0.1}}]}}'
    result = run_case(tmp_path, overrides=[*options, plan])
    ours = Classifier.open(result.dir)
    assert ours.home.classes == tuple(sorted(COLOURS))
    assert (ours.home.input.size, ours.home.input.interpolation) == (16, "bilinear")
    theirs = transformers.AutoModelForImageClassification.from_pretrained(result.dir / "model").eval()
    assert [theirs.config.id2label[i] for i in range(4)] == sorted(COLOURS)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(theirs(images).logits, ours.model(images).logits)
    assert audit_run(result.dir).broken is False


def test_a_tensor_that_is_missing_from_a_renamed_model_is_named(tmp_path: Path) -> None:
    write_hf(tmp_path / "vit", "vit")
    file = tmp_path / "vit" / "model.safetensors"
    tensors = load_file(file)
    assert "vit.encoder.layer.0.attention.attention.key.bias" in tensors
    del tensors["vit.encoder.layer.0.attention.attention.key.bias"]
    tensors["stray"] = torch.zeros(2)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing in it: vit.layers.0.attention.k_proj.bias") as caught:
        tl.load(tmp_path / "vit")
    assert "1 unknown to the model: stray" in str(caught.value)


def test_a_directory_of_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertForMaskedLM"], "model_type": "bert"}))
    with pytest.raises(CheckpointError, match="no image classifier but BertForMaskedLM"):
        VisionHome.of(tmp_path)


# --- a torchvision that does not import


BROKEN = """\
import sys
from pathlib import Path
import thawline as tl
folder = Path(sys.argv[1])
tl.train(folder / "tiny.yaml", sys.argv[2:], run=folder / "run")
print("trained")
"""


def broken_torchvision(folder: Path) -> dict[str, str]:
    """An environment in which torchvision is installed and fails on import, as one built for another torch does."""
    (folder / "site" / "torchvision").mkdir(parents=True)
    (folder / "site" / "torchvision" / "__init__.py").write_text(
        'raise RuntimeError("operator torchvision::nms does not exist")\n'
    )
    note = folder / "site" / "torchvision-0.99.0.dist-info"
    note.mkdir()
    (note / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.99.0\n")
    return {**os.environ, "PYTHONPATH": f"{folder / 'site'}{os.pathsep}{REPOSITORY}", "OMP_NUM_THREADS": "1"}


def in_broken(tmp_path: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BROKEN, str(tmp_path), *overrides],
        env=broken_torchvision(tmp_path),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )


@pytest.mark.long
def test_a_broken_torchvision_does_not_disturb_a_model_of_transformers_and_is_named_in_one_line(tmp_path: Path) -> None:
    write_case(tmp_path)
    write_hf(tmp_path / "resnet", "resnet")
    plan = "plan={train: [classifier.1]}"
    done = in_broken(
        tmp_path, f"model={tmp_path / 'resnet'}", 'options.model_fn=""', "data.conf={}", "run.epochs=1", plan
    )
    assert done.stdout.endswith("trained\n"), done.stderr
    lines = [line for line in done.stderr.splitlines() if "torchvision" in line]
    assert len(lines) == 1
    assert "operator torchvision::nms does not exist" in lines[0]
    assert "pip uninstall torchvision" in lines[0]


def test_a_broken_torchvision_is_not_even_noticed_without_need(tmp_path: Path) -> None:
    write_case(tmp_path)
    done = in_broken(tmp_path, "run.epochs=1")
    assert done.stdout.endswith("trained\n"), done.stderr
    assert "torchvision" not in done.stderr


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_what_needs_torchvision_says_what_is_wrong_and_how_to_mend_it(tmp_path: Path, library: str) -> None:
    write_case(tmp_path)
    done = in_broken(tmp_path, f"model={library}:resnet18", 'options.model_fn=""', "init=random")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-2:]
    assert "operator torchvision::nms does not exist" in last[0]
    assert "install the torchvision that belongs to this torch" in last[1]


# --- the program


def test_evaluate_and_predict_speak_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_case(tmp_path)
    result = run_case(tmp_path, overrides=["run.epochs=12", "optim.lr=0.1"])
    capsys.readouterr()
    rows = tmp_path / "rows.jsonl"
    assert cli(["evaluate", str(result.dir), str(tmp_path / "valid"), "--json", "--out", str(rows)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["images"] == 16
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert figures["accuracy"] == sum(r["label"] == r["predicted"] for r in written) / 16
    image = str(tmp_path / "valid" / "red" / "00.png")
    assert cli(["predict", str(result.dir / "model"), image, "--top", "2", "--json"]) == 0
    (made,) = json.loads(capsys.readouterr().out)["predictions"]
    assert made["file"] == image
    assert made["classes"][0]["class"] == "red"
    assert len(made["classes"]) == 2


def test_predict_names_an_image_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_case(tmp_path)
    result = run_case(tmp_path, overrides=["run.epochs=1"])
    assert cli(["predict", str(result.dir), str(tmp_path / "valid" / "red" / "0.png")]) == 3
    assert "did you mean" in capsys.readouterr().err


def test_tl_load_takes_a_run_its_model_and_a_checkpoint_in_it(tmp_path: Path) -> None:
    write_case(tmp_path)
    result = run_case(tmp_path, overrides=["run.checkpoint.best=null"])
    newest = sorted((result.dir / "checkpoints").iterdir())[-1]
    whole = tensors_of(result.dir)
    for path in (result.dir, result.dir / "model", newest):
        state = tl.load(path).state_dict()
        assert state.keys() == whole.keys()
        assert all(torch.equal(state[name], whole[name]) for name in whole)
        assert kind_of(path) == "vision"


def test_a_model_whose_file_was_cut_is_refused(tmp_path: Path) -> None:
    write_case(tmp_path)
    result = run_case(tmp_path, overrides=["run.epochs=1"])
    file = result.dir / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError):
        tl.load(result.dir)


def test_arrays_and_a_csv_train_as_the_folder_does(tmp_path: Path) -> None:
    write_case(tmp_path)
    lines = [f"train/{p.parent.name}/{p.name},{p.parent.name}" for p in sorted((tmp_path / "train").rglob("*.png"))]
    (tmp_path / "train.csv").write_text("path,label\n" + "\n".join(lines) + "\n")
    folder = run_case(tmp_path, "folder", ["run.epochs=1"])
    table = run_case(tmp_path, "table", ["run.epochs=1", f"data.train={tmp_path / 'train.csv'}"])
    assert sums(folder.dir / "model") == sums(table.dir / "model")
    images = np.stack([np.full((12, 12, 3), i * 10, np.uint8) for i in range(8)])
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(8) % 4, classes=np.array(sorted(COLOURS)))
    assert run_case(tmp_path, "arrays", ["run.epochs=1", f"data.train={tmp_path / 'x.npz'}"]).step == 1


def test_lora_on_a_vit_is_exported_merged(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    write_case(tmp_path)
    write_hf(tmp_path / "vit", "vit")
    names = [n for n, m in tiny_vit(tmp_path / "vit").named_modules() if isinstance(m, nn.Linear) and "layers.0" in n]
    plan = f'plan={{train: [classifier], lora: {{target: ["{names[0]}"], r: 2}}}}'
    result = run_case(
        tmp_path, overrides=[f"model={tmp_path / 'vit'}", 'options.model_fn=""', "data.conf={}", "run.epochs=1", plan]
    )
    base = tiny_vit(tmp_path / "vit").state_dict()
    made = tensors_of(result.dir)
    assert made.keys() == base.keys()
    assert not torch.equal(base[f"{names[0]}.weight"], made[f"{names[0]}.weight"])


def tiny_vit(folder: Path) -> nn.Module:
    return VisionHome.of(folder).load()


def test_a_confusion_matrix_counts_rows_as_truth() -> None:
    rows = [{"label": "a", "predicted": "b"}, {"label": "a", "predicted": "a"}, {"label": "b", "predicted": "b"}]
    assert confusion(rows, ["a", "b"]).tolist() == [[1, 1], [0, 1]]


def test_a_description_that_lacks_a_part_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "vision.json").write_text('{"format": 1, "architecture": {"kind": "function"}}')
    with pytest.raises(CheckpointError, match=r"vision\.json: the description of the model cannot be read: 'name'"):
        tl.load(tmp_path)


def test_evaluate_says_how_many_images_it_could_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_case(tmp_path)
    result = run_case(tmp_path, overrides=["run.epochs=1", "plan.thaw=[]"])
    (tmp_path / "valid" / "blue" / "00.png").write_bytes(b"no image")
    capsys.readouterr()
    assert cli(["evaluate", str(result.dir), str(tmp_path / "valid")]) == 0
    assert "over 15 images\n1 could not be read" in capsys.readouterr().out
