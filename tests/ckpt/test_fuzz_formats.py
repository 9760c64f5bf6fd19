"""Damage of any kind to any format ends in our error or in a whole result: no crash, no file, bounded work."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.ckpt import foreign

from thawline.ckpt.convert import convert
from thawline.ckpt.verify import verify
from thawline.errors import ThawlineError

Maker = Callable[[Path], object]

MAKERS: dict[str, Maker] = {
    "zero-0": lambda path: foreign.zero(path, stage=0),
    "zero-1": lambda path: foreign.zero(path, stage=1),
    "zero-2": lambda path: foreign.zero(path, stage=2),
    "zero-3": lambda path: foreign.zero(path, stage=3),
    "universal": foreign.universal,
    "dcp": foreign.small_dcp,
    "hf": foreign.huggingface,
    "lightning": foreign.lightning,
    "state dict": foreign.state_dict,
    "legacy": lambda path: foreign.state_dict(path, legacy=True),
    "whisper": foreign.whisper,
}

FUZZ = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(params=MAKERS)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "whole"
    MAKERS[request.param](path)
    return path


def files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def copy(path: Path, target: Path) -> Path:
    if target.is_dir():
        shutil.rmtree(target)
    elif target.exists():
        target.unlink()
    return Path(shutil.copytree(path, target) if path.is_dir() else shutil.copy(path, target))


def survives(path: Path, target: Path) -> None:
    """Convert and verify: a whole result or our error, and then no file."""
    target.unlink(missing_ok=True)
    try:
        report = convert(path, target, to="safetensors")
    except ThawlineError:
        report = None
    assert target.exists() == (report is not None)
    if report is not None:
        assert report.verified
        assert verify(target).ok
    verify(path)


@FUZZ
@given(data=st.data())
def test_truncated_files(made: Path, data: st.DataObject) -> None:
    bad = copy(made, made.with_name("bad"))
    victim = data.draw(st.sampled_from(files(bad)))
    content = victim.read_bytes()
    victim.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    survives(bad, made.with_name("out.safetensors"))


@FUZZ
@given(data=st.data())
def test_flipped_bytes(made: Path, data: st.DataObject) -> None:
    bad = copy(made, made.with_name("bad"))
    victim = data.draw(st.sampled_from(files(bad)))
    content = bytearray(victim.read_bytes())
    # Metadata lie at both ends of these files; data, which are most of the bytes, are drawn less often.
    edge = min(len(content), 1500)
    places = (
        st.integers(0, edge - 1) | st.integers(len(content) - edge, len(content) - 1) | st.integers(0, len(content) - 1)
    )
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(places)] = data.draw(st.integers(0, 255))
    victim.write_bytes(content)
    survives(bad, made.with_name("out.safetensors"))


@FUZZ
@given(data=st.data())
def test_numbers_of_headers_set_to_their_extremes(made: Path, data: st.DataObject) -> None:
    bad = copy(made, made.with_name("bad"))
    victim = data.draw(st.sampled_from(files(bad)))
    content = bytearray(victim.read_bytes())
    kind = data.draw(st.sampled_from(["<H", "<L", "<Q"]))
    value = data.draw(st.sampled_from([0, 1, 0x7FFF, 0xFFFF])) if kind == "<H" else data.draw(
        st.sampled_from([0, 1, 0x7FFFFFFF, 0xFFFFFFFF])
    )  # fmt: skip
    signatures = [m for sig in (b"PK\x01\x02", b"PK\x05\x06", b"PK\x03\x04") for m in _all(content, sig)] or [0]
    place = data.draw(st.sampled_from(signatures)) + data.draw(st.integers(0, 48))
    if place + struct.calcsize(kind) <= len(content):
        struct.pack_into(kind, content, place, value)
    victim.write_bytes(content)
    survives(bad, made.with_name("out.safetensors"))


def _all(content: bytearray, signature: bytes) -> Iterator[int]:
    at = content.find(signature)
    while at >= 0:
        yield at
        at = content.find(signature, at + 1)


@FUZZ
@given(data=st.data())
def test_pickles_altered_under_a_valid_checksum(made: Path, data: st.DataObject) -> None:
    # An attacker computes the checksum anew; so must this test, to get past it.
    bad = copy(made, made.with_name("bad"))
    victim = data.draw(st.sampled_from(files(bad)))
    if not zipfile.is_zipfile(victim) or victim.suffix == ".distcp":
        return
    buffer = io.BytesIO()
    with zipfile.ZipFile(victim) as source, zipfile.ZipFile(buffer, "w") as target:
        for info in source.infolist():
            content = bytearray(source.read(info))
            if info.filename.endswith("data.pkl"):
                for _ in range(data.draw(st.integers(1, 5))):
                    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
            target.writestr(info.filename, bytes(content))
    victim.write_bytes(buffer.getvalue())
    survives(bad, made.with_name("out.safetensors"))


_WRONG = st.sampled_from([None, -1, 0, 1 << 62, 1.5, "x", [], {}, ["a", 1], {"shape": [1]}, True, "../x", "\0"])


@FUZZ
@given(data=st.data())
def test_values_of_other_kinds_in_deepspeeds_states(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("zero") / "run"
    stage = data.draw(st.integers(0, 3))
    foreign.zero(folder, stage=stage)
    victim = data.draw(st.sampled_from(sorted((folder / "global_step3").iterdir())))
    with foreign.deepspeed_names():
        value = torch.load(victim, weights_only=False)
        inner = value["optimizer_state_dict"] if "optimizer_state_dict" in value and data.draw(st.booleans()) else value
        inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(_WRONG)
        torch.save(value, victim)
    survives(folder, folder.with_name("out.safetensors"))


@FUZZ
@given(data=st.data())
def test_values_of_other_kinds_in_json(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("hf") / "hf"
    foreign.huggingface(folder)
    victim = folder / data.draw(st.sampled_from(["config.json", "model.safetensors.index.json"]))
    value = json.loads(victim.read_text())
    inner = value["weight_map"] if "weight_map" in value and data.draw(st.booleans()) else value
    inner[data.draw(st.sampled_from(sorted(inner)))] = data.draw(_WRONG)
    victim.write_text(json.dumps(value))
    survives(folder, folder.with_name("out.safetensors"))


@FUZZ
@given(data=st.data())
def test_values_of_other_kinds_in_safetensors_headers(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("st")
    foreign.state_dict(folder / "x.pt")
    convert(folder / "x.pt", folder / "x.safetensors", to="safetensors")
    content = (folder / "x.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(header)))
    if data.draw(st.booleans()):
        header[name] = data.draw(_WRONG)
    else:
        header[name][data.draw(st.sampled_from(sorted(header[name])))] = data.draw(_WRONG)
    text = json.dumps(header).encode()
    (folder / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    survives(folder / "x.safetensors", folder / "out.safetensors")


@FUZZ
@given(data=st.data())
def test_values_of_other_kinds_in_the_metadata_of_distributed_checkpoints(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("dcp") / "ckpt"
    foreign.small_dcp(folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    wrong = data.draw(_WRONG)
    entry = metadata.state_dict_metadata[data.draw(st.sampled_from(["model.rows.w", "model.columns.w", "step"]))]
    place = next(iter(metadata.storage_data.values()))
    chunk = metadata.state_dict_metadata["model.rows.w"].chunks[0]
    target, names = data.draw(
        st.sampled_from(
            [
                (metadata, ["state_dict_metadata", "planner_data", "storage_data"]),
                (entry, ["size", "chunks", "properties"]),
                (place, ["relative_path", "offset", "length"]),
                (chunk, ["offsets", "sizes"]),
            ]
        )
    )
    object.__setattr__(target, data.draw(st.sampled_from(names)), wrong)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    survives(folder, folder.with_name("out.safetensors"))
