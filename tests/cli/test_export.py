"""What a run leaves is exported, averaged, mirrored and taken up elsewhere, through the verbs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file
from tests.cli.speech_fixture import RECIPE, write_all
from torch import Tensor

import thawline as tl
from thawline.ckpt.mirror import whole_steps
from thawline.ckpt.remote import Place
from thawline.ckpt.save import OPTIMIZER, PARKED
from thawline.ckpt.source import open_source
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
        ([f"{done}s", str(tmp_path / "x")], 4, f"did you mean {done}?"),
        ([str(done), str(tmp_path / "x"), "--to", "hf", "--step", str(steps(done)[0])], 4, f"error: {done}: tensor"),
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


@pytest.fixture
def alone(data: Path, tmp_path: Path) -> Path:
    """The last delta of a run with LoRA, as one file away from it."""
    done = trained(data, "lora", LORA)
    last = done / "checkpoints" / f"step-{steps(done)[-1]:08d}"
    return Path(shutil.copyfile(last / "delta.safetensors", tmp_path / "alone.safetensors"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("to", "name"), [("torch", "x.pt"), ("safetensors", "x.safetensors"), ("wenet", "x")])
def test_a_delta_with_adapters_is_converted_as_its_run_is_exported(
    to: str, name: str, data: Path, alone: Path, tmp_path: Path
) -> None:
    done, base = data / "lora", str(data / "base")
    tag = f"step-{steps(done)[-1]:08d}"
    assert run(["export", str(done), str(tmp_path / "run"), "--step", str(steps(done)[-1])]) == 0
    assert run(["convert", str(alone), str(tmp_path / name), "--to", to, "--base", base]) == 0
    assert run(["convert", str(done), str(tmp_path / f"run-{name}"), "--to", to, "--tag", tag]) == 0
    with open_source(tmp_path / "run") as exported:
        want = {name: exported.digest(name) for name in exported.names}
    for made in (tmp_path / name, tmp_path / f"run-{name}"):
        with open_source(made) as source:
            assert {name: source.digest(name) for name in source.names} == want


def test_a_delta_with_adapters_is_exported_loaded_verified_and_compared_like_its_run(
    data: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done, base = data / "lora", str(data / "base")
    step = steps(done)[-1]
    last = done / "checkpoints" / f"step-{step:08d}"
    assert run(["export", str(done), str(tmp_path / "run"), "--step", str(step)]) == 0
    assert run(["export", str(alone), str(tmp_path / "made"), "--base", base]) == 0
    assert files_of(tmp_path / "made") == files_of(tmp_path / "run")
    assert run(["export", str(done), str(tmp_path / "run-peft"), "--step", str(step), "--to", "peft"]) == 0
    assert run(["export", str(alone), str(tmp_path / "made-peft"), "--base", base, "--to", "peft"]) == 0
    assert files_of(tmp_path / "made-peft") == files_of(tmp_path / "run-peft")
    model, theirs = tl.load(alone, data / "base"), tl.load(last)
    assert same(dict(model.state_dict()), dict(theirs.state_dict()))
    feats, lengths = torch.randn(2, 40, 80), torch.tensor([40, 33])
    assert torch.equal(model.encode(feats, lengths)[0], theirs.encode(feats, lengths)[0])  # type: ignore[operator]
    capsys.readouterr()
    prints = []
    for path in (alone, last):
        assert run(["verify", str(path), "--base", base, "--json"]) == 0
        prints.append(json.loads(capsys.readouterr().out)["fingerprint"])
    assert prints[0] == prints[1]
    assert run(["diff", str(alone), str(last), "--base", base]) == 0
    assert run(["diff", str(alone), str(tmp_path / "run"), "--base", base]) == 0  # merged there, so merged here too


def test_deltas_with_adapters_are_averaged_like_the_checkpoints_of_their_run(data: Path, tmp_path: Path) -> None:
    done = trained(data, "lora", LORA)
    (tmp_path / "deltas").mkdir()
    for step in steps(done):
        place = done / "checkpoints" / f"step-{step:08d}"
        shutil.copyfile(place / "delta.safetensors", tmp_path / "deltas" / f"d-{step}.safetensors")
        shutil.copytree(place, tmp_path / "checkpoints" / place.name)
    assert run(["average", str(done), str(tmp_path / "run"), "--last", "2"]) == 0
    for name in ("deltas", "checkpoints"):
        argv = ["average", str(tmp_path / name), str(tmp_path / f"mean-{name}"), "--last", "2"]
        assert run([*argv, "--base", str(data / "base")]) == 0
        assert same(bits_of(tmp_path / f"mean-{name}"), bits_of(tmp_path / "run"))


def test_deltas_whose_base_is_gone_are_not_averaged_alone(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step, name in ((1, "a"), (2, "b")):
        torch.save({"w": torch.full((2,), float(step)), "same": torch.ones(2)}, tmp_path / f"{name}.pt")
    torch.save({"w": torch.zeros(2), "same": torch.ones(2)}, tmp_path / "base.pt")
    (tmp_path / "deltas").mkdir()
    for step, name in ((1, "a"), (2, "b")):
        argv = [str(tmp_path / f"{name}.pt"), str(tmp_path / "deltas" / f"d-{step}"), "--to", "delta"]
        assert run(["convert", *argv, "--base", str(tmp_path / "base.pt")]) == 0
    argv = ["average", str(tmp_path / "deltas"), str(tmp_path / "mean.pt"), "--last", "2", "--to", "torch"]
    (tmp_path / "base.pt").rename(tmp_path / "moved.pt")
    assert run(argv) == 4
    assert "is a delta: 1 tensors are in its base only" in capsys.readouterr().err
    assert run([*argv, "--base", str(tmp_path / "moved.pt")]) == 0
    mean = torch.load(tmp_path / "mean.pt", weights_only=True)
    assert (mean["w"].tolist(), mean["same"].tolist()) == ([1.5, 1.5], [1.0, 1.0])
    assert "the mean of d-1, d-2" in capsys.readouterr().out


def test_a_delta_is_known_whatever_it_is_called(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"w": torch.zeros(2), "same": torch.ones(2)}, tmp_path / "base.pt")
    torch.save({"w": torch.ones(2), "same": torch.ones(2)}, tmp_path / "full.pt")
    argv = ["convert", str(tmp_path / "full.pt"), str(tmp_path / "d.bin"), "--to", "delta"]
    assert run([*argv, "--base", str(tmp_path / "base.pt")]) == 0
    (tmp_path / "base.pt").rename(tmp_path / "moved.pt")
    assert run(["convert", str(tmp_path / "d.bin"), str(tmp_path / "x.pt"), "--to", "torch"]) == 4
    assert "is a delta: 1 tensors are in its base only" in capsys.readouterr().err
    (tmp_path / "moved.pt").rename(tmp_path / "base.pt")
    assert run(["convert", str(tmp_path / "d.bin"), str(tmp_path / "x.pt"), "--to", "torch"]) == 0
    assert torch.load(tmp_path / "x.pt", weights_only=True)["same"].tolist() == [1.0, 1.0]


def rewritten(path: Path, change: Callable[[dict[str, str]], object], *, seal: bool) -> None:
    """Change the metadata of a delta; with `seal` the check of itself too."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header["__metadata__"]
    change(metadata)
    if seal:
        del metadata["check"]
        metadata["check"] = blake3(json.dumps(dict(sorted(metadata.items()))).encode()).hexdigest()
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "seal", "message"),
    [
        (('"alpha":8.0', '"alpha":9.0'), False, "metadata are altered"),
        (('"scale":2.0', '"scale":4.0'), True, "rank 4 and alpha 8.0 has the scale 2.0, not 4.0"),
        (('"alpha":8.0', '"alpha":16.0'), True, "has the scale 4.0, not 2.0"),
        (('"rank":4', '"dora":true,"rank":4'), True, "'dora', which this version does not know"),
        (('"rank":4,"alpha":8.0', '"rank":2,"alpha":4.0'), True, "have rank 4, its record says 2"),
    ],
)
def test_an_altered_scale_is_refused(
    change: tuple[str, str], seal: bool, message: str, data: Path, alone: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rewritten(alone, lambda m: m.update(adapters=m["adapters"].replace(*change)), seal=seal)
    for verb, *options in (
        ["convert", str(tmp_path / "x.pt"), "--to", "torch"],
        ["verify"],
        ["export", str(tmp_path / "x")],
    ):
        assert run([verb, str(alone), *options, "--base", str(data / "base")]) == 4
        told = capsys.readouterr()
        assert message in told.err + told.out
    with pytest.raises(tl.CheckpointError, match=r"altered|damaged"):
        tl.load(alone, data / "base")
    assert not (tmp_path / "x.pt").exists()


def test_a_delta_that_does_not_record_the_scale_is_refused_with_what_to_do(
    data: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewritten(alone, lambda metadata: metadata.pop("adapters"), seal=True)  # as an older Thawline wrote it
    with pytest.raises(tl.CheckpointError, match="not what they are scaled by") as caught:
        tl.load(alone, data / "base")
    assert "thawline export RUN" in caught.value.fix
    base = str(data / "base")
    assert run(["convert", str(alone), str(tmp_path / "x.pt"), "--to", "wenet", "--base", base]) == 4
    assert "holds LoRA adapters" in capsys.readouterr().err
    assert run(["average", str(alone), str(tmp_path / "x.pt"), "--last", "1", "--base", base]) == 4
    assert not (tmp_path / "x.pt").exists()
    assert run(["convert", str(alone), str(tmp_path / "x.pt"), "--to", "torch", "--base", base]) == 0
    assert "not what they are scaled by" in capsys.readouterr().out  # as they are, and said


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
    for taken in ("epoch_4.pt", "epoch_0.pt"):  # the one is averaged, the other is left out
        assert run(["average", str(tmp_path), str(tmp_path / taken), "--last", "2", "--force"]) == 4
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
