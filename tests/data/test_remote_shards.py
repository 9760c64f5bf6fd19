"""Shards behind network addresses: the bits of local ones, fetched by ranges; a failing network costs what it must."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data.range_server import Served, serving

from thawline.cli.app import run
from thawline.data import byte_range
from thawline.data.loader import BatchRequest, LoadedBatch, Loader
from thawline.data.manifest import read_manifest
from thawline.data.sampler import Batching, BatchPlan, Cursor
from thawline.data.speech import SpeechSamples
from thawline.data.speech_frontend import SpeechFrontend
from thawline.data.text import CharTokenizer, build_units
from thawline.data.utterance import TarRef
from thawline.errors import DataError, MissingExtra

fsspec = pytest.importorskip("fsspec", reason="the extra `remote` is not installed")
pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")
soundfile = pytest.importorskip("soundfile", reason="the speech extra is not installed")

# The clients' own event loop and the servers' threads end with the process, not with the test.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

TOKENIZER = CharTokenizer(build_units(["one two three"]))
FRONTEND = SpeechFrontend(speed_perturb=True)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder; nobody waits between tries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(byte_range, "PAUSES_S", (0.0, 0.0, 0.0))
    return tmp_path / "cache" / "thawline"


@pytest.fixture
def web() -> Iterator[Served]:
    with serving() as served:
        yield served


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

        boto3.client("s3").create_bucket(Bucket="shards")
        yield "s3://shards"
    server.stop()


def shard_bytes(first: int, n: int = 6, seconds: float = 0.5) -> bytes:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as archive:
        for i in range(first, first + n):
            noise = np.random.default_rng(i).uniform(-0.3, 0.3, round(seconds * 8000) + 40 * i).astype(np.float32)
            sound = io.BytesIO()
            soundfile.write(sound, noise, 8000, format="WAV", subtype="FLOAT")
            for name, content in ((f"u{i}.wav", sound.getvalue()), (f"u{i}.txt", b"one two")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return body.getvalue()


SHARDS = {"s0.tar": shard_bytes(0), "s1.tar": shard_bytes(6)}


def local_list(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, body in SHARDS.items():
        (folder / name).write_bytes(body)
    (folder / "data.list").write_text("s0.tar\ns1.tar\n")
    return folder / "data.list"


def remote_list(folder: Path, root: str) -> Path:
    path = folder / "remote.list"
    path.write_text("".join(f"{root}/{name}\n" for name in SHARDS))
    return path


def put(kind: str, request: pytest.FixtureRequest) -> str:
    """The shards on a storage; where they lie."""
    if kind == "http":
        web: Served = request.getfixturevalue("web")
        web.files = {f"/{name}": body for name, body in SHARDS.items()}
        return web.url
    root = f"memory://{time.monotonic_ns()}"
    if kind == "s3":
        root = f"{request.getfixturevalue('bucket')}/{time.monotonic_ns()}"
    for name, body in SHARDS.items():
        fsspec.open(f"{root}/{name}", "wb").open().close()
        with fsspec.open(f"{root}/{name}", "wb") as file:
            file.write(body)
    return root


def loaded(path: Path, *, workers: int = 0, **options: Any) -> list[LoadedBatch[Any]]:
    samples = SpeechSamples(read_manifest(path), FRONTEND, TOKENIZER, training=True, **options)
    plan = BatchPlan(len(samples), seed=3, batching=Batching(frames=300), length=samples.length)
    asked = (BatchRequest(epoch=1, cursor=c, ids=ids) for c, ids in plan.batches(Cursor(1)))
    with Loader(samples, seed=5, workers=workers) as loader:
        return list(loader.iterate(asked))


def bits(batches: list[LoadedBatch[Any]]) -> list[Any]:
    return [(b.batch.keys, b.batch.feats.numpy().tobytes(), b.batch.target.tolist(), b.bad) for b in batches]


@pytest.mark.parametrize("kind", ["memory", "http", "s3"])
def test_remote_shards_give_the_bits_of_local_ones(tmp_path: Path, kind: str, request: pytest.FixtureRequest):
    root = put(kind, request)
    assert bits(loaded(remote_list(tmp_path, root))) == bits(loaded(local_list(tmp_path / "here")))


def test_workers_read_ranges_themselves(tmp_path: Path, request: pytest.FixtureRequest):
    root = put("http", request)
    path = remote_list(tmp_path, root)
    assert bits(loaded(path, workers=2)) == bits(loaded(local_list(tmp_path / "here")))


def test_a_worker_that_dies_changes_no_bit_and_a_bad_member_costs_one_sample(
    tmp_path: Path, request: pytest.FixtureRequest
):
    root = put("http", request)
    path = remote_list(tmp_path, root)
    samples = SpeechSamples(read_manifest(path), FRONTEND, TOKENIZER, training=True)
    asked = [BatchRequest(epoch=0, cursor=Cursor(0, 0, i), ids=(2 * i, 2 * i + 1)) for i in range(6)]
    want = bits(list(Loader(samples, seed=5).iterate(asked)))
    with Loader(samples, seed=5, workers=1, tell=lambda text: None) as loader:
        batches = loader.iterate(asked)
        got = [next(batches)]
        loader._team[0].process.kill()
        got += batches
    assert bits(got) == want
    web: Served = request.getfixturevalue("web")
    body = bytearray(SHARDS["s0.tar"])
    body[body.index(b"u3.wav")] = ord("v")
    web.files["/s0.tar"] = bytes(body)
    with Loader(samples, seed=5, workers=1) as loader:
        after = list(loader.iterate(asked))
    assert [sample.key for batch in after for sample in batch.bad] == ["u3"]
    assert "no member's header lies before this place" in after[1].bad[0].reason


def test_an_index_is_made_of_headers_once_and_again_when_the_shard_changes(tmp_path: Path, web: Served, cache: Path):
    long = shard_bytes(0, n=4, seconds=20)  # 640 kB of sound each
    web.files = {"/s0.tar": long}
    path = tmp_path / "x.list"
    path.write_text(f"{web.url}/s0.tar\n")
    first = list(read_manifest(path))
    assert web.sent_bytes < len(long) / 4
    assert len(list((cache / "shards").iterdir())) == 1
    web.asked.clear()
    assert list(read_manifest(path)) == first
    assert web.sent_bytes == 0
    web.files = {"/s0.tar": shard_bytes(6, n=2)}
    assert [r.key for r in read_manifest(path)] == ["u6", "u7"]


def test_a_server_that_gives_no_mark_of_its_content_is_asked_each_time(tmp_path: Path, web: Served, cache: Path):
    web.files, web.stamped = {"/s0.tar": SHARDS["s0.tar"]}, False
    path = tmp_path / "x.list"
    path.write_text(f"{web.url}/s0.tar\n")
    assert len(read_manifest(path)) == 6
    assert not cache.exists()
    web.files = {"/s0.tar": SHARDS["s1.tar"]}
    assert read_manifest(path)[0].key == "u6"


def test_durations_of_remote_members_are_measured_once(tmp_path: Path, web: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("thawline.data.durations.WORTH_KEEPING", 1)
    web.files = {"/s0.tar": SHARDS["s0.tar"]}
    path = tmp_path / "x.list"
    path.write_text(f"{web.url}/s0.tar\n")
    one = SpeechSamples(read_manifest(path), FRONTEND, TOKENIZER, training=True)
    web.asked.clear()
    two = SpeechSamples(read_manifest(path), FRONTEND, TOKENIZER, training=True)
    assert [one.length(i) for i in range(6)] == [two.length(i) for i in range(6)]
    assert web.sent_bytes == 0


@pytest.mark.parametrize("failures", [[500], [503, 0], [0, 0, 0], [429]])
def test_a_network_that_fails_for_a_moment_costs_nothing(tmp_path: Path, web: Served, failures: list[int]):
    web.files = {"/s0.tar": SHARDS["s0.tar"]}
    path = tmp_path / "x.list"
    path.write_text(f"{web.url}/s0.tar\n")
    web.failures = {"/s0.tar": list(failures)}
    manifest = read_manifest(path)
    samples = SpeechSamples(manifest, FRONTEND, TOKENIZER, training=True)
    web.failures = {"/s0.tar": list(failures)}
    assert samples.read(0, 0).key == "u0"
    assert not web.failures["/s0.tar"]


def test_a_network_that_goes_on_failing_costs_one_sample_after_four_tries(tmp_path: Path, web: Served):
    web.files = {"/s0.tar": SHARDS["s0.tar"]}
    path = tmp_path / "x.list"
    path.write_text(f"{web.url}/s0.tar\n")
    samples = SpeechSamples(read_manifest(path), FRONTEND, TOKENIZER, training=True)
    web.failures = {"/s0.tar": [503] * 4}
    web.asked.clear()
    with Loader(samples, seed=1) as loader:
        (got,) = loader.iterate([BatchRequest(epoch=0, cursor=Cursor(), ids=(0, 1, 2))])
    assert got.batch is not None
    assert got.batch.keys == ("u1", "u2")
    assert [b.key for b in got.bad] == ["u0"]
    assert "cannot be had (4 tries): status 503" in got.bad[0].reason
    assert len(web.asked) == 6


def test_a_server_that_cannot_be_reached_is_waited_for_and_costs_nothing(tmp_path: Path, cache: Path):
    with serving() as served:
        served.files = {"/s0.tar": SHARDS["s0.tar"]}
        path = tmp_path / "x.list"
        path.write_text(f"{served.url}/s0.tar\n")
        samples = SpeechSamples(read_manifest(path), FRONTEND, TOKENIZER, training=True)
        request = BatchRequest(epoch=0, cursor=Cursor(), ids=(0, 1, 2))
        with Loader(samples, seed=1) as loader:
            wanted = bits(list(loader.iterate([request])))
    with pytest.raises(ConnectionRefusedError, match=r"cannot be had \(4 tries\)"):
        samples.read(0, 0)
    port = int(served.url.rpartition(":")[2])
    waits: list[str] = []
    with contextlib.ExitStack() as later:

        def told(text: str) -> None:
            if not waits:  # it is back, at the same address
                back = later.enter_context(serving(port))
                back.files = {"/s0.tar": SHARDS["s0.tar"]}
            waits.append(text)

        with Loader(samples, seed=1, tell=told) as loader:
            assert bits(list(loader.iterate([request]))) == wanted
    assert waits
    assert waits[0].startswith("waiting for storage")


def test_a_server_that_never_answers_is_not_waited_for_without_end(
    tmp_path: Path, web: Served, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(byte_range, "PATIENCE_S", 0.5)
    web.files = {"/s0.tar": SHARDS["s0.tar"]}
    path = tmp_path / "x.list"
    path.write_text(f"{web.url}/s0.tar\n")
    samples = SpeechSamples(read_manifest(path), FRONTEND, TOKENIZER, training=True)
    web.failures = {"/s0.tar": [-1]}
    assert samples.read(0, 0).key == "u0"
    monkeypatch.setattr(byte_range, "PAUSES_S", ())
    web.failures = {"/s0.tar": [-1]}
    with pytest.raises(DataError, match=r"cannot be had \(1 tries\): FSTimeoutError"):
        samples.read(0, 0)


def test_what_the_server_has_decided_is_not_asked_again(tmp_path: Path, web: Served):
    path = tmp_path / "x.list"
    path.write_text(f"{web.url}/s9.tar\n")
    with pytest.raises(DataError) as caught:
        read_manifest(path)
    assert (caught.value.what, caught.value.where) == ("there is no such file", f"{web.url}/s9.tar")
    web.files = {"/s9.tar": b""}
    web.failures = {"/s9.tar": [403] * 9}
    web.asked.clear()
    with pytest.raises(DataError, match="cannot be had: status 403"):
        read_manifest(path)
    assert len(web.asked) <= 2  # fsspec asks by HEAD, then by GET


def test_a_bucket_or_an_object_that_is_not_there_is_named(tmp_path: Path, bucket: str):
    for url in (f"{bucket}/none.tar", "s3://misspelt-bucket/s0.tar"):
        (tmp_path / "x.list").write_text(f"{url}\n")
        with pytest.raises(DataError, match=r"there is no such file\n  fix: check the address") as caught:
            read_manifest(tmp_path / "x.list")
        assert caught.value.where == url


def test_a_shard_that_cannot_be_had_is_left_out_where_that_is_asked(tmp_path: Path, request: pytest.FixtureRequest):
    root = put("memory", request)
    path = remote_list(tmp_path, root)
    path.write_text(f"{root}/none.tar\n" + path.read_text())
    reported: list[DataError] = []
    assert len(read_manifest(path, report=reported.append)) == 12
    assert [e.where for e in reported] == [f"{root}/none.tar"]


def test_a_shard_out_of_reach_is_one_clear_error(tmp_path: Path):
    with serving() as served:
        url = served.url
    path = tmp_path / "x.list"
    path.write_text(f"{url}/s0.tar\n")
    with pytest.raises(DataError) as caught:
        read_manifest(path)
    assert caught.value.exit_code == 3
    assert caught.value.where == f"{url}/s0.tar"
    assert "cannot be had (4 tries)" in caught.value.what


def test_a_server_without_ranges_is_refused_before_it_sends_each_shard_for_each_sample(tmp_path: Path, web: Served):
    web.files, web.ranges = {"/s0.tar": SHARDS["s0.tar"] + b"\0" * 200_000}, False
    path = tmp_path / "x.list"
    path.write_text(f"{web.url}/s0.tar\n")
    with pytest.raises(DataError, match="it does not serve ranges"):
        read_manifest(path)


def test_a_remote_shard_that_changed_after_it_was_indexed_costs_the_sample(tmp_path: Path, request: Any):
    root = put("memory", request)
    rows = list(read_manifest(remote_list(tmp_path, root)))
    samples = SpeechSamples(read_manifest(remote_list(tmp_path, root)), FRONTEND, TOKENIZER, training=True)
    with fsspec.open(f"{root}/s0.tar", "wb") as file:
        file.write(SHARDS["s1.tar"])
    with pytest.raises(DataError, match=r"another member lies here: 'u6\.wav'"):
        samples.read(0, 0)
    with fsspec.open(f"{root}/s0.tar", "wb") as file:
        file.write(SHARDS["s0.tar"][:5000])
    ref = TarRef.parse(rows[0].wav)
    assert ref is not None
    with pytest.raises(DataError, match=r"the file ends early: 5000 of \d+ bytes from byte 0"):
        samples.read(0, 0)


@pytest.mark.parametrize("keep", [300, 700, 20_000, 40_000])
def test_a_remote_shard_cut_short_is_noticed_when_it_is_indexed(tmp_path: Path, web: Served, keep: int):
    web.files = {"/s0.tar": SHARDS["s0.tar"][:keep]}
    path = tmp_path / "x.list"
    path.write_text(f"{web.url}/s0.tar\n")
    with pytest.raises(DataError, match=r"s0\.tar.*(damaged|cut short)"):
        read_manifest(path)


def test_addresses_that_cannot_be_meant_are_named(tmp_path: Path):
    for line, error, message in (
        ("nowhere://x/s0.tar", DataError, "is no address that is known"),
        ("gs://bucket/s0.tar", MissingExtra, "gcsfs"),
    ):
        (tmp_path / "x.list").write_text(f"{line}\n")
        with pytest.raises(error, match=message):
            read_manifest(tmp_path / "x.list")


def test_an_address_may_carry_a_signature(tmp_path: Path, web: Served):
    web.files = {"/s0.tar?X-Signature=abc%3D": SHARDS["s0.tar"]}
    path = tmp_path / "x.list"
    path.write_text(f"{web.url}/s0.tar?X-Signature=abc%3D\n")
    samples = SpeechSamples(read_manifest(path), FRONTEND, TOKENIZER, training=True)
    assert samples.read(5, 0).key == "u5"


def test_a_shard_may_be_kept_here_by_fsspecs_own_cache(tmp_path: Path, request: Any):
    root = put("memory", request)
    path = tmp_path / "x.list"
    path.write_text(f"simplecache::{root}/s0.tar\n")
    assert read_manifest(path)[0].wav.startswith("simplecache::memory://")
    assert SpeechSamples(read_manifest(path), FRONTEND, TOKENIZER, training=True).read(0, 0).key == "u0"


def test_remote_shards_can_be_put_into_a_table_and_checked(
    tmp_path: Path, web: Served, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("pyarrow", reason="the extra `tables` is not installed")
    web.files = {f"/{name}": body for name, body in SHARDS.items()}
    listed = remote_list(tmp_path, web.url)
    assert run(["data", "table", str(listed), str(tmp_path / "t.arrow")]) == 0
    table = read_manifest(tmp_path / "t.arrow")
    assert [r.wav for r in table] == [r.wav for r in read_manifest(listed)]
    assert all(r.duration_s for r in table)
    assert bits(loaded(tmp_path / "t.arrow")) == bits(loaded(listed))
    capsys.readouterr()
    assert run(["data", "check", str(tmp_path / "t.arrow"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["utterances"], report["findings"]) == (12, [])
