"""What a run leaves is exported, averaged, mirrored and taken up elsewhere, through the verbs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.cli.speech_fixture import RECIPE, write_all
from torch import Tensor

import thawline as tl
from thawline.ckpt.mirror import whole_steps
from thawline.ckpt.remote import Place
from thawline.ckpt.save import OPTIMIZER, PARKED
from thawline.ckpt.transfer import withdraw
from thawline.cli.app import run

LORA = RECIPE.replace(
    'plan: {train: [ctc, "encoder.encoders[-1]"], norms: pinned}',
    'plan: {train: ["@lora"], norms: pinned, lora: {target: "encoder.**.{linear_q,linear_v}", r: 4, alpha: 8}}',
)
EMA = RECIPE.replace("epochs: 2,", "epochs: 2, ema: {decay: 0.9},")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech")
    write_all(folder)
    return folder


def trained(data: Path, name: str, recipe: str, *overrides: str) -> Path:
    """The finished run of a recipe, made once."""
    if not (data / name).is_dir():
        (data / f"{name}.yaml").write_text(recipe)
        assert run(["train", str(data / f"{name}.yaml"), *overrides, "--run", str(data / name)]) == 0
    return data / name


def steps(folder: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in (folder / "checkpoints").glob("step-*"))


def bits_of(path: Path, base: Path | None = None) -> dict[str, Tensor]:
    return dict(tl.load(path, base).state_dict())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_result_and_a_step_are_exported_in_the_bases_own_form_or_another(data: Path, tmp_path: Path) -> None:
    done = trained(data, "plain", RECIPE)
    step = steps(done)[0]
    assert run(["export", str(done), str(tmp_path / "result")]) == 0
    assert {p.name for p in (tmp_path / "result").iterdir()} >= {"final.pt", "train.yaml", "units.txt"}
    assert same(bits_of(tmp_path / "result"), bits_of(done / "model"))
    assert run(["export", str(done), str(tmp_path / "early"), "--step", str(step)]) == 0
    assert same(bits_of(tmp_path / "early"), bits_of(done / "checkpoints" / f"step-{step:08d}"))
    target = tmp_path / "early.safetensors"
    assert run(["export", str(done), str(target), "--step", str(step), "--to", "safetensors", "--dtype", "bf16"]) == 0
    assert all(t.dtype in (torch.bfloat16, torch.int64) for t in load_file(target).values())
    assert sorted(p.name for p in done.iterdir() if p.name.startswith("thawline-")) == []


def test_what_cannot_be_exported_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = trained(data, "plain", RECIPE)
    for argv, code, message in (
        ([str(done), str(tmp_path / "x"), "--step", "99"], 4, "no checkpoint of step 99"),
        ([str(done), str(tmp_path / "x"), "--only", "ema"], 4, "the run has no run.ema"),
        ([str(done), str(tmp_path / "x"), "--to", "peft"], 4, "its plan has no lora"),
        ([str(done), str(tmp_path / "x"), "--to", "videochat2"], 4, "is no VideoChat2"),
        ([str(tmp_path), str(tmp_path / "x")], 2, "is not a run directory"),
    ):
        assert run(["export", *argv]) == code
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_adapters_are_exported_for_peft_which_makes_of_them_what_the_run_exports(data: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    done = trained(data, "lora", LORA)
    assert run(["export", str(done), str(tmp_path / "adapter"), "--to", "peft"]) == 0
    model = peft.PeftModel.from_pretrained(tl.load(data / "base"), tmp_path / "adapter").merge_and_unload()
    newest = steps(done)[-1]
    assert run(["export", str(done), str(tmp_path / "merged"), "--step", str(newest)]) == 0
    want = bits_of(tmp_path / "merged")
    have = {name.removeprefix("base_model.model."): tensor for name, tensor in model.state_dict().items()}
    assert same(have, want)
    # And our own merging of that folder is the same again.
    assert run(
        ["convert", str(tmp_path / "adapter"), str(tmp_path / "m.safetensors"), "--to", "safetensors", "--base",
         str(data / "base")]
    ) == 0  # fmt: skip
    ours = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(ours[name], tensor) for name, tensor in want.items())


def test_adapters_in_a_delta_away_from_their_run_are_refused_with_what_to_do(data: Path, tmp_path: Path) -> None:
    done = trained(data, "lora", LORA)
    shutil.copyfile(
        done / "checkpoints" / f"step-{steps(done)[-1]:08d}" / "delta.safetensors", tmp_path / "d.safetensors"
    )
    with pytest.raises(tl.CheckpointError, match="holds LoRA adapters") as caught:
        tl.load(tmp_path / "d.safetensors", data / "base")
    assert "thawline export RUN" in caught.value.fix


def test_adapters_are_not_written_into_a_form_that_has_no_place_for_them(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = trained(data, "lora", LORA)
    tag = f"step-{steps(done)[-1]:08d}"
    assert run(["convert", str(done), str(tmp_path / "x.pt"), "--to", "wenet", "--tag", tag]) == 4
    assert "holds LoRA adapters" in capsys.readouterr().err
    assert run(["convert", str(done), str(tmp_path / "x.pt"), "--to", "wenet"]) == 0


@pytest.mark.parametrize("verb", ["export", "average"])
def test_a_run_is_never_replaced_by_what_is_made_of_it(verb: str, data: Path, tmp_path: Path) -> None:
    done = tmp_path / "run"
    shutil.copytree(trained(data, "plain", RECIPE), done)
    last = steps(done)[-1]
    for target in (done, done / "checkpoints" / f"step-{last:08d}"):
        assert run([verb, str(done), str(target), "--step", str(last), "--force"]) == 4
    assert steps(done) == steps(data / "plain")


def test_averages_kept_by_a_run_are_its_result_and_the_raw_weights_can_be_had(data: Path, tmp_path: Path) -> None:
    done = trained(data, "ema", EMA, "run.checkpoint.best=null")
    for only in ("weights", "ema"):
        assert run(["export", str(done), str(tmp_path / only), "--only", only]) == 0
        argv = ["convert", str(done), str(tmp_path / f"{only}.safetensors"), "--to", "safetensors", "--only", only]
        assert run(argv) == 0
        converted = load_file(tmp_path / f"{only}.safetensors")
        exported = torch.load(tmp_path / only / "final.pt", weights_only=True)
        assert all(torch.equal(converted[name], tensor) for name, tensor in exported.items())
    raw, averaged = bits_of(tmp_path / "weights"), bits_of(tmp_path / "ema")
    assert same(averaged, bits_of(done / "model"))
    assert not torch.equal(raw["ctc.ctc_lo.weight"], averaged["ctc.ctc_lo.weight"])
    assert torch.equal(raw["encoder.embed.conv.0.weight"], averaged["encoder.embed.conv.0.weight"])


def test_the_mean_of_the_last_and_of_the_best_checkpoints(data: Path, tmp_path: Path) -> None:
    done = trained(data, "plain", RECIPE)
    assert run(["average", str(done), str(tmp_path / "mean"), "--last", "2"]) == 0
    models = [bits_of(done / "checkpoints" / f"step-{step:08d}") for step in steps(done)[-2:]]
    found = bits_of(tmp_path / "mean")
    for name, tensor in found.items():
        one, two = (model[name] for model in models)
        if tensor.is_floating_point():
            assert torch.equal(tensor, ((one.double() + two.double()) / 2).to(tensor.dtype)), name
        else:
            assert tensor.dtype == one.dtype
    rows = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["valid/loss"] for row in rows if "valid/loss" in row}
    best = min((step for step in losses if step in steps(done)), key=lambda step: losses[step])
    assert run(["average", str(done), str(tmp_path / "best"), "--best", "1"]) == 0
    assert same(bits_of(tmp_path / "best"), bits_of(done / "checkpoints" / f"step-{best:08d}"))


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["--last", "99"], 4, "of the 99 checkpoints asked for"),
        ([], 2, "nothing says which checkpoints to average"),
        (["--last", "1", "--best", "1"], 2, "--last and --best says"),
        (["--step", "1234"], 4, "has 0 of the 1 checkpoints"),
    ],
)
def test_averages_that_cannot_be_meant_are_refused(
    argv: list[str], code: int, message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = trained(data, "plain", RECIPE)
    assert run(["average", str(done), str(tmp_path / "x"), *argv]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_wenets_folder_is_averaged_as_its_average_model_does(shared: Path, tmp_path: Path) -> None:
    source = shared / "parity" / "wenet" / "exp_dir_epoch_mode"
    assert run(["average", str(source), str(tmp_path / "mean"), "--last", "2"]) == 0
    states = [torch.load(source / f"epoch_{n}.pt", weights_only=True) for n in (0, 1)]
    found = torch.load(tmp_path / "mean" / "final.pt", weights_only=True)
    for name, tensor in found.items():
        theirs = torch.true_divide(states[0][name].clone() + states[1][name], 2)  # wenet/bin/average_model.py
        if tensor.is_floating_point():
            # Theirs rounds the sum to fp32 first; halving is exact, so one rounding is all that can differ.
            torch.testing.assert_close(tensor, theirs, rtol=2**-23, atol=0)
        else:
            assert tensor.dtype == states[0][name].dtype
            assert torch.equal(tensor, theirs.trunc().to(tensor.dtype))
    assert (tmp_path / "mean" / "train.yaml").is_file()


def test_wenets_best_epoch_is_the_one_with_the_least_loss(shared: Path, tmp_path: Path) -> None:
    source = tmp_path / "exp"
    shutil.copytree(shared / "parity" / "wenet" / "exp_dir_epoch_mode", source, symlinks=True)
    for n, loss in ((0, 1.0), (1, 2.0)):
        (source / f"epoch_{n}.yaml").chmod(0o644)
        (source / f"epoch_{n}.yaml").write_text(f"epoch: {n}\nloss_dict: {{loss: {loss}, acc: 0.5}}\n")
    assert run(["average", str(source), str(tmp_path / "best.pt"), "--best", "1", "--to", "torch"]) == 0
    found, want = (torch.load(p, weights_only=True) for p in (tmp_path / "best.pt", source / "epoch_0.pt"))
    assert same(found, want)


def test_a_mirrored_run_goes_on_elsewhere_and_ends_in_the_same_bits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fsspec")
    url = f"memory://{tmp_path.name}/run"
    whole = trained(data, "plain", RECIPE)
    recipe = str(data / "plain.yaml")
    assert run(["train", recipe, f"run.checkpoint.mirror={url}", "--run", str(tmp_path / "first")]) == 0
    assert whole_steps(url) == steps(tmp_path / "first")
    assert same(bits_of(url), bits_of(whole / "model"))  # type: ignore[arg-type]  # a URL serves as a path
    for verb, *options in (["export"], ["average", "--last", "2"], ["export", "--only", "weights"]):
        for place in (url, str(tmp_path / "first")):
            assert run([verb, place, str(tmp_path / "out"), *options, "--force"]) == 0
            (tmp_path / "out").rename(tmp_path / ("there" if place == url else "here"))
        assert same(bits_of(tmp_path / "there"), bits_of(tmp_path / "here"))
        shutil.rmtree(tmp_path / "there")
        shutil.rmtree(tmp_path / "here")
    # The machine is gone, and it had not come further than its first checkpoint.
    shutil.rmtree(tmp_path / "first")
    withdraw(Place(f"{url}/model"))
    for step in whole_steps(url)[1:]:
        withdraw(Place(f"{url}/checkpoints/step-{step:08d}"))
    monkeypatch.chdir(tmp_path)
    assert run(["resume", url]) == 0
    assert same(bits_of(tmp_path / "runs/run/model"), bits_of(whole / "model"))
    assert (tmp_path / "runs/run/metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    before = whole_steps(url)
    assert run(["resume", url, "--fork", str(tmp_path / "fork"), "run.epochs=3", "--allow", "run.epochs"]) == 0
    assert whole_steps(url) == before  # a fork does not write where the run it came from is mirrored


def test_a_mirror_that_cannot_be_reached_costs_a_message_and_not_the_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "occupied").write_text("a file where a folder is wanted")
    recipe = str(data / "plain.yaml")
    trained(data, "plain", RECIPE)
    url = f"file://{tmp_path}/occupied/run"
    assert run(["train", recipe, f"run.checkpoint.mirror={url}", "--run", str(tmp_path / "run")]) == 0
    told = capsys.readouterr()
    assert "after the checkpoint of step" in told.out + told.err
    assert f"the result was not sent to {url}" in told.out + told.err
    assert (tmp_path / "run" / "model").is_dir()
    assert run(["train", recipe, "run.checkpoint.mirror=s3//bucket", "--run", str(tmp_path / "other")]) == 2
    assert "is not a URL" in capsys.readouterr().err


def test_verify_ends_in_four_where_it_finds_damage(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = trained(data, "plain", RECIPE)
    copied = tmp_path / "checkpoint"
    shutil.copytree(done / "checkpoints" / f"step-{steps(done)[-1]:08d}", copied)
    assert run(["verify", str(copied)]) == 0
    content = bytearray((copied / OPTIMIZER).read_bytes())
    content[-1] ^= 1
    (copied / OPTIMIZER).write_bytes(content)
    capsys.readouterr()
    assert run(["verify", str(copied), "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert OPTIMIZER in found["problems"][0]


def test_what_a_plan_froze_again_costs_its_moments_once_and_a_fork_costs_nothing(data: Path, tmp_path: Path) -> None:
    moving = RECIPE.replace(
        'plan: {train: [ctc, "encoder.encoders[-1]"], norms: pinned}',
        'plan: {train: ["encoder.encoders[-1]"], norms: pinned, '
        'thaw: [{after: 1 epochs, train: [ctc], freeze: ["encoder.encoders[-1]"]}]}',
    )
    done = trained(data, "moving", moving, "run.checkpoint.every=1 steps")
    last, before = (done / "checkpoints" / f"step-{step:08d}" / PARKED for step in (steps(done)[-1], steps(done)[-2]))
    assert last.samefile(before)
    assert last.stat().st_size > 2 * (last.parent / OPTIMIZER).stat().st_size
    assert run(["resume", str(done), "--fork", str(tmp_path / "fork")]) == 0
    assert (tmp_path / "fork" / "checkpoints" / last.parent.name / PARKED).samefile(last)


def test_a_wenet_file_that_is_averaged_is_not_replaced_and_one_without_a_loss_is_not_among_the_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for epoch, text in enumerate(
        ("loss_dict: {loss: 2.0}", "", "- no mapping", "loss_dict: [", "loss_dict: {loss: 1.0}")
    ):
        torch.save({"w": torch.full((2,), float(epoch))}, tmp_path / f"epoch_{epoch}.pt")
        (tmp_path / f"epoch_{epoch}.yaml").write_text(text)
    assert run(["average", str(tmp_path), str(tmp_path / "avg.pt"), "--best", "2"]) == 0
    assert torch.load(tmp_path / "avg.pt", weights_only=True)["w"].tolist() == [2.0, 2.0]
    assert run(["average", str(tmp_path), str(tmp_path / "avg3.pt"), "--best", "3"]) == 4
    assert "has 2 of the 3" in capsys.readouterr().err
    assert run(["average", str(tmp_path), str(tmp_path / "epoch_4.pt"), "--last", "2", "--force"]) == 4
    assert run(["average", str(tmp_path), str(tmp_path / "x.pt"), "--last", "2", "--only", "ema"]) == 4
    assert "no averaged weights" in capsys.readouterr().err


def test_the_base_of_a_run_may_lie_at_a_url(data: Path, tmp_path: Path) -> None:
    done = trained(data, "plain", RECIPE)
    step = steps(done)[0]
    assert run(["convert", str(data / "base"), "memory://export/base", "--to", "wenet"]) == 0
    for verb in ("export", "average"):
        made = tmp_path / verb
        assert run([verb, str(done), str(made), "--step", str(step), "--base", "memory://export/base"]) == 0
        assert same(bits_of(made), bits_of(done / "checkpoints" / f"step-{step:08d}"))


def test_a_base_that_neither_side_of_a_comparison_needs_is_refused(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(data / "base")
    assert run(["diff", base, base, "--base", base]) == 2
    assert "neither of the two leaves anything" in capsys.readouterr().err
