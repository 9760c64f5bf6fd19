"""Checkpoints on remote storage: whole or not at all, in memory and on an S3 server on loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.ckpt import foreign

from thawline.ckpt import manifest
from thawline.ckpt.convert import convert
from thawline.ckpt.delta import BaseRef
from thawline.ckpt.load import read_checkpoint, read_newest
from thawline.ckpt.mirror import bring_run, mirror_checkpoint, whole_steps
from thawline.ckpt.remote import Place, is_url, local_path
from thawline.ckpt.retention import Keep
from thawline.ckpt.save import save_checkpoint
from thawline.ckpt.source import open_source
from thawline.ckpt.transfer import PARTIAL, fetched, send_folder
from thawline.ckpt.verify import verify
from thawline.core.digest import digest_bytes
from thawline.errors import BaseMismatch, CheckpointError, MissingExtra

pytest.importorskip("fsspec", reason="the extra `remote` is not installed")

# The client's own event loop and the server's threads end with the process, not with the test.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

REF = BaseRef.of({"w": torch.zeros(600)})


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """A bucket on an S3 server of this process, which AWS's variables point to."""
    pytest.importorskip("s3fs", reason="s3fs is not installed (extra `remote`)")
    server_module = pytest.importorskip("moto.server", reason="moto is not installed (extra `dev`)")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import boto3

        boto3.client("s3").create_bucket(Bucket="models")
        yield "s3://models"
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def root(request: pytest.FixtureRequest) -> str:
    """An empty remote folder."""
    unique = f"{request.node.name}-{time.monotonic_ns()}".replace("[", "-").replace("]", "")
    if request.param == "memory":
        return f"memory://{unique}"
    bucket: str = request.getfixturevalue("bucket")
    return f"{bucket}/{unique}"


def begin(run: Path) -> None:
    """What a run directory holds before its first checkpoint."""
    run.mkdir(exist_ok=True)
    (run / "recipe.yaml").write_text("task: speech\n")
    REF.write(run / "base.json")
    (run / "metrics.jsonl").write_text("")


def checkpoint(run: Path, step: int) -> Path:
    """A checkpoint in which every file says the step, and the row that leads to it."""
    begin(run)
    with (run / "metrics.jsonl").open("a") as rows:
        rows.write(f'{{"step": {step}}}\n')
    return save_checkpoint(
        run / "checkpoints",
        step=step,
        delta={"w": torch.full((600,), float(step))},
        optimizer={"w/exp_avg": torch.full((600,), float(step))},
        state={"step": step},
        base=REF,
    )


def test_what_is_a_url_and_what_a_path() -> None:
    assert [is_url(p) for p in ("s3://b/x", "memory://x", "runs/a", "file:///x", Path("s3://b/x"), "c:/x")] == [
        True, True, False, False, False, False,
    ]  # fmt: skip
    assert local_path("file:///tmp/x") == Path("/tmp/x")


def test_a_storage_without_its_package_and_one_that_is_unknown_are_named() -> None:
    with pytest.raises(MissingExtra, match="gcsfs"):
        Place("gs://bucket/x")
    with pytest.raises(CheckpointError, match="nowhere"):
        Place("nowhere://x")


def test_a_bucket_that_does_not_exist_is_refused_and_not_made(bucket: str, tmp_path: Path) -> None:
    import boto3

    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"s3://misspelt/m.pt: "):
        convert(tmp_path / "x.pt", "s3://misspelt/m.pt", to="torch")
    assert [b["Name"] for b in boto3.client("s3").list_buckets()["Buckets"]] == ["models"]


# --- conversion ---


def test_a_checkpoint_is_converted_from_a_url_and_to_one(root: str, tmp_path: Path) -> None:
    want = foreign.zero(tmp_path / "run", stage=2)
    send_folder(tmp_path / "run", Place(f"{root}/run"))
    report = convert(f"{root}/run", f"{root}/out/m.safetensors", to="safetensors")
    assert (report.source, report.target) == (f"{root}/run", f"{root}/out/m.safetensors")
    assert report.files == (f"{root}/out/m.safetensors",)
    Place(f"{root}/out/m.safetensors").bring(tmp_path / "m.safetensors")
    have = load_file(tmp_path / "m.safetensors")
    assert have.keys() == want.keys()
    assert all(torch.equal(have[name], want[name]) for name in want)
    with pytest.raises(CheckpointError, match="exists already"):
        convert(f"{root}/run", f"{root}/out/m.safetensors", to="safetensors")
    assert convert(f"{root}/run", f"{root}/out/m.safetensors", to="safetensors", force=True).verified
    found = verify(f"{root}/out/m.safetensors")
    assert found.ok
    assert found.path == f"{root}/out/m.safetensors"
    assert found.fingerprint == report.fingerprint


def test_a_folder_and_a_file_with_its_configuration_go_to_a_url_whole(root: str, tmp_path: Path) -> None:
    foreign.huggingface(tmp_path / "hf")
    convert(tmp_path / "hf", f"{root}/hf", to="hf", max_shard_bytes=100)
    names = Place(f"{root}/hf").files()
    assert {"config.json", "model.safetensors.index.json", manifest.NAME} <= set(names)
    assert PARTIAL not in names
    assert verify(f"{root}/hf").fingerprint == verify(tmp_path / "hf").fingerprint
    (tmp_path / "wenet").mkdir()
    torch.save({"w": torch.ones(3)}, tmp_path / "wenet/final.pt")
    (tmp_path / "wenet/train.yaml").write_text("encoder: conformer\n")
    convert(tmp_path / "wenet", f"{root}/out/w.pt", to="wenet")
    assert set(Place(f"{root}/out").files()) == {"w.pt", "w.yaml"}
    again = convert(f"{root}/out/w.pt", tmp_path / "back.pt", to="wenet")
    assert (tmp_path / "back.yaml").read_text() == "encoder: conformer\n"
    assert again.verified


def test_a_base_may_lie_at_a_url_and_the_delta_names_it_so(root: str, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3), "b": torch.ones(3)}, tmp_path / "base.pt")
    torch.save({"a": torch.zeros(3), "b": torch.full((3,), 2.0)}, tmp_path / "new.pt")
    torch.save({"a": torch.ones(3), "b": torch.ones(3)}, tmp_path / "other.pt")
    for name in ("base", "other"):
        Place(f"{root}/{name}.pt").send(tmp_path / f"{name}.pt")
    convert(tmp_path / "new.pt", f"{root}/d.safetensors", to="delta", base=f"{root}/base.pt")
    convert(f"{root}/d.safetensors", tmp_path / "full.pt", to="torch", base=f"{root}/base.pt")
    assert torch.load(tmp_path / "full.pt")["b"].tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(BaseMismatch) as caught:
        convert(f"{root}/d.safetensors", tmp_path / "x.pt", to="torch", base=f"{root}/other.pt")
    assert f"({root}/base.pt)" in caught.value.what
    assert caught.value.where == f"{root}/d.safetensors"


def test_what_is_not_there_is_refused_by_its_url(root: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{root}/absent: does not exist"):
        convert(f"{root}/absent", tmp_path / "x", to="torch")


@pytest.mark.parametrize("target", ["run", "run/inside", ""])
def test_a_target_on_in_or_around_the_source_is_refused(target: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"what it is made from|lies inside|must stay"):
        convert("memory://a/run", f"memory://a/{target}".rstrip("/"), to="torch", force=True)


# --- whole or not at all ---


def test_the_manifest_is_written_last_and_takes_the_markers_place(
    tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(tmp_path / "run", 1)
    seen: list[str] = []
    for method in ("write", "send", "remove"):
        honest = getattr(Place, method)

        def noted(self: Place, *args: object, method: str = method, honest: object = honest) -> object:
            seen.append(f"{method} {self.name}")
            return honest(self, *args)  # type: ignore[operator]

        monkeypatch.setattr(Place, method, noted)
    send_folder(path, Place(f"{root}/step-00000001"))
    sent = [f"send {name}" for name in ("delta.safetensors", "optimizer.safetensors", "state.json")]
    assert seen == [f"write {PARTIAL}", *sent, f"write {manifest.NAME}", f"remove {PARTIAL}"]


def test_stopped_between_any_two_files_the_old_checkpoint_is_the_newest_whole_one(
    tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    mirror_checkpoint(checkpoint(run, 1), root)
    new = checkpoint(run, 2)
    for calls in range(8):
        left = calls

        def dying(self: Place, *args: object, honest: object) -> object:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return honest(self, *args)  # type: ignore[operator]

        with monkeypatch.context() as patch:
            for method in ("write", "send", "remove"):
                honest = getattr(Place, method)
                patch.setattr(Place, method, lambda self, *a, honest=honest: dying(self, *a, honest=honest))
            with pytest.raises(KeyboardInterrupt):
                mirror_checkpoint(new, root)
        whole = whole_steps(root)
        assert whole == [1]
        target = tmp_path / f"other-{calls}"
        bring_run(root, target)
        assert read_checkpoint(target / "checkpoints/step-00000001").state == {"step": 1}
    mirror_checkpoint(new, root)  # after all that
    assert whole_steps(root) == [1, 2]


def test_a_run_that_went_back_takes_the_future_it_gave_up_away_from_its_mirror(tmp_path: Path, root: str) -> None:
    run = tmp_path / "run"
    for step in (1, 3, 4, 2):  # back to 1 after 4
        mirror_checkpoint(checkpoint(run, step), root)
    assert whole_steps(root) == [1, 2]


def test_rows_that_are_appended_while_they_are_sent_do_not_spoil_the_mirror(
    tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    new = checkpoint(run, 1)
    rows = run / "metrics.jsonl"
    rows.write_text("1\n")
    honest = Place.send

    def send(self: Place, path: Path) -> object:
        with rows.open("a") as log:
            log.write("2\n")
        return honest(self, path)

    monkeypatch.setattr(Place, "send", send)
    mirror_checkpoint(new, root)
    sent = (Place(root) / "metrics.jsonl").read()
    assert rows.read_bytes().startswith(sent)
    assert len(sent) < rows.stat().st_size  # as it was before the last file was sent


def test_a_folder_that_was_not_sent_whole_is_no_model(root: str, tmp_path: Path) -> None:
    foreign.huggingface(tmp_path / "hf")
    send_folder(tmp_path / "hf", Place(f"{root}/hf"))
    listed = (Place(f"{root}/hf") / manifest.NAME).read()
    (Place(f"{root}/hf") / manifest.NAME).remove()
    (Place(f"{root}/hf") / PARTIAL).write(listed)
    with pytest.raises(CheckpointError, match=f"{root}/hf: was not sent whole"):
        convert(f"{root}/hf", tmp_path / "x", to="torch")


def test_a_file_altered_in_the_storage_is_found_and_the_checkpoint_before_it_is_taken(
    root: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for step in (1, 2):
        mirror_checkpoint(checkpoint(run, step), root)
    place = Place(f"{root}/checkpoints/step-00000002/delta.safetensors")
    data = bytearray(place.read())
    data[-1] ^= 1
    place.write(bytes(data))
    with fetched(root) as here:
        assert [p.name for p in (here / "checkpoints").iterdir()] == ["step-00000001"]
    with pytest.raises(CheckpointError, match=r"delta.safetensors: altered"), fetched(root, tag="step-00000002"):
        pass


def test_bytes_that_arrive_altered_are_found_by_reading_them_again(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(tmp_path / "run", 1)
    fs = Place(root)._fs
    honest = fs.put_file

    def altering(source: str, target: str, **options: object) -> object:
        if target.endswith("optimizer.safetensors"):
            (tmp_path / "altered").write_bytes(Path(source).read_bytes()[:-1] + b"!")
            source = str(tmp_path / "altered")
        return honest(source, target, **options)

    monkeypatch.setattr(fs, "put_file", altering)
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors: reading it again gives other bytes"):
        mirror_checkpoint(path, root)
    assert whole_steps(root) == []


def test_sending_the_same_checkpoint_again_sends_nothing(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(tmp_path / "run", 1)
    mirror_checkpoint(path, root)
    sent: list[str] = []
    honest = Place.send
    monkeypatch.setattr(Place, "send", lambda self, source: (sent.append(source.name), honest(self, source))[1])
    mirror_checkpoint(path, root)
    assert sent == ["recipe.yaml", "base.json", "metrics.jsonl"]  # small, and grown meanwhile


# --- runs ---


def test_a_run_goes_on_elsewhere_from_its_newest_checkpoint_or_an_earlier_one(root: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (1, 2, 3):
        mirror_checkpoint(checkpoint(run, step), root, keep=Keep(last=2))
    assert whole_steps(root) == [2, 3]
    bring_run(root, tmp_path / "other")
    assert (tmp_path / "other/metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()
    assert [p.name for p in (tmp_path / "other/checkpoints").iterdir()] == ["step-00000003"]
    bring_run(root, tmp_path / "earlier", step=2)
    assert [p.name for p in (tmp_path / "earlier/checkpoints").iterdir()] == ["step-00000002"]
    with pytest.raises(CheckpointError, match=r"no whole checkpoint 'step-00000001'\n  fix: whole are: step-00000002"):
        bring_run(root, tmp_path / "gone", step=1)
    with pytest.raises(CheckpointError, match="exists already"):
        bring_run(root, tmp_path / "other")
    with open_source(tmp_path / "earlier/checkpoints/step-00000002/delta.safetensors") as source:
        want = torch.full((600,), 2.0).numpy().tobytes()
        assert source.digest("w") == digest_bytes("F32", (600,), want)


def test_a_folder_serves_as_a_mirror_and_is_a_run_that_can_be_read(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/nas/run"
    for step in (1, 2, 3):
        mirror_checkpoint(checkpoint(tmp_path / "run", step), url, keep=Keep(last=2))
    assert whole_steps(url) == [2, 3]
    assert read_newest(tmp_path / "nas/run/checkpoints", report=print).state == {"step": 3}


def test_the_best_checkpoint_outlives_the_newer_ones(root: str, tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        scores = {1: 0.9, 2: 0.1, 3: 0.5, 4: 0.7}
        mirror_checkpoint(checkpoint(tmp_path / "run", step), root, keep=Keep(last=1, best=1), scores=scores)
    assert whole_steps(root) == [2, 4]


@pytest.mark.long
def test_a_real_sigkill_while_sending_leaves_a_whole_newest_checkpoint(bucket: str, tmp_path: Path) -> None:
    root = f"{bucket}/killed-{time.monotonic_ns()}"
    run = tmp_path / "run"
    for step in (1, 2):
        checkpoint(run, step)
    mirror_checkpoint(run / "checkpoints/step-00000001", root)
    code = textwrap.dedent("""
        import sys
        from pathlib import Path
        from thawline.ckpt.mirror import mirror_checkpoint
        print("go", flush=True)
        mirror_checkpoint(Path(sys.argv[1]), sys.argv[2])
    """)
    outcomes = set()
    for delay_ms in (0, 100, 200, 300, 500, None):
        command = [sys.executable, "-c", code, run / "checkpoints/step-00000002", root]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, env=dict(os.environ))
        assert child.stdout is not None
        child.stdout.readline()
        if delay_ms is not None:  # the last one is let be
            time.sleep(delay_ms / 1000)
            child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        newest = whole_steps(root)[-1]
        outcomes.add(newest)
        target = tmp_path / f"at-{delay_ms}"
        bring_run(root, target)
        assert read_checkpoint(target / f"checkpoints/step-{newest:08d}").state == {"step": newest}
    assert 1 in outcomes
    assert 2 in outcomes
