"""`verify` reads everything and reports damage of every kind as a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.ckpt import foreign

from thawline.ckpt import tensor_digest
from thawline.ckpt.convert import convert
from thawline.ckpt.delta import BaseRef, delta_of, write_delta
from thawline.ckpt.save import save_checkpoint
from thawline.ckpt.verify import verify
from thawline.errors import CheckpointError


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x01
    path.write_bytes(data)


def test_a_whole_checkpoint_is_described(tmp_path: Path) -> None:
    expected = foreign.zero(tmp_path / "run", stage=3)
    report = verify(tmp_path / "run")
    assert report.ok
    assert report.tensors == len(expected)
    assert report.dtypes == {"F32": 6, "BF16": 2, "I64": 1, "BOOL": 1}
    assert report.tied == {"head.weight": "embed.weight"}
    assert len(report.fingerprint) == 64
    assert "whole" in report.table()
    report.raise_if_broken()


def test_the_same_weights_have_the_same_fingerprint_in_every_format(tmp_path: Path) -> None:
    foreign.zero(tmp_path / "run", stage=2)
    convert(tmp_path / "run", tmp_path / "a.safetensors", to="safetensors")
    convert(tmp_path / "run", tmp_path / "b.pt", to="torch")
    convert(tmp_path / "run", tmp_path / "c", to="hf")
    prints = {verify(tmp_path / name).fingerprint for name in ("a.safetensors", "b.pt", "c")}
    assert len(prints) == 1


def test_bytes_whose_digest_the_file_states_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {"w": torch.randn(4, 3), "half": torch.randn(2).half(), "n": torch.tensor(3), "empty": torch.zeros(0)}
    torch.save(tensors, tmp_path / "m.pt")
    convert(tmp_path / "m.pt", tmp_path / "m.safetensors", to="safetensors")
    want = BaseRef.of(tensors).digests

    def hashed_again(*_: object) -> str:
        raise AssertionError("the comparison with the stated digest has hashed these bytes already")

    monkeypatch.setattr(tensor_digest, "digest", hashed_again)
    assert verify(tmp_path / "m.safetensors").digests == want
    with pytest.raises(AssertionError):
        verify(tmp_path / "m.pt")  # a CRC-32 is no digest


@pytest.mark.parametrize(("to", "name"), [("safetensors", "m.safetensors"), ("torch", "m.pt")])
def test_a_flipped_byte_anywhere_in_our_data_is_found(to: str, name: str, tmp_path: Path) -> None:
    foreign.state_dict(tmp_path / "x.pt")
    convert(tmp_path / "x.pt", tmp_path / name, to=to)
    size = (tmp_path / name).stat().st_size
    start = size - 600 if to == "safetensors" else 64 * 60
    flip(tmp_path / name, start)
    report = verify(tmp_path / name)
    assert not report.ok
    with pytest.raises(CheckpointError, match="altered"):
        report.raise_if_broken()


def test_what_cannot_be_opened_is_a_problem_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"PK\x03\x04" + bytes(200))
    report = verify(tmp_path / "x.pt")
    assert report.problems == ("the zip archive has no end: the file is cut short",)
    assert "BROKEN" in report.table()
    json.dumps(report.to_json())
    with pytest.raises(CheckpointError, match="does not exist"):
        verify(tmp_path / "absent")


def test_tensors_that_contradict_the_configuration_are_a_problem(tmp_path: Path) -> None:
    foreign.huggingface(tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text()) | {"hidden_size": 5, "num_hidden_layers": 2}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "hf/model-00002-of-00002.safetensors")
    assert "the configuration says (6, 5)" in verify(tmp_path / "hf").problems[0]


def test_our_own_checkpoints_and_deltas_are_verified_with_their_base(tmp_path: Path) -> None:
    base = {n: t.float() for n, t in foreign.model()[0].items()}
    save_file(base, tmp_path / "base.safetensors")
    reference = BaseRef.of(base, path=str(tmp_path / "base.safetensors"))
    trained = base | {"up.bias": torch.zeros(11)}
    run = tmp_path / "run"
    for step in (10, 20):
        save_checkpoint(run / "checkpoints", step=step, delta=trained, optimizer={}, state={}, base=reference)
    reference.write(run / "base.json")
    report = verify(run)
    assert report.ok
    assert report.tensors == len(base)
    flip(run / "checkpoints/step-00000020/delta.safetensors", -1)
    report = verify(run)
    assert report.ok
    assert "step-00000020 is damaged and was passed over" in report.notes[0]
    assert not verify(run / "checkpoints/step-00000020").ok
    write_delta(tmp_path / "d.safetensors", delta_of(reference, trained))
    assert verify(tmp_path / "d.safetensors").not_held == {
        name: "unchanged from the base" for name in sorted(base) if name != "up.bias"
    }


def test_every_real_checkpoint_verifies(shared: Path) -> None:
    root = shared / "parity/sharded"
    for case in json.loads((root / "manifest.json").read_text())["checkpoints"]:
        report = verify(root / case["path"])
        assert report.ok, report.table()
        assert report.tensors == case["tensors"]


@pytest.mark.parametrize("to", ["safetensors", "hf", "delta"])
def test_a_flipped_byte_in_what_was_converted_stops_the_next_conversion_too(to: str, tmp_path: Path) -> None:
    base = foreign.state_dict(tmp_path / "base.pt")
    torch.save(base | {"up.bias": torch.full((11,), 3.0)}, tmp_path / "x.pt")
    made = tmp_path / ("m" if to == "hf" else "m.safetensors")
    convert(tmp_path / "x.pt", made, to=to, base=tmp_path / "base.pt" if to == "delta" else None)
    flip(made / "model.safetensors" if to == "hf" else made, -3)
    assert "is altered: digest" in verify(made).problems[0]
    with pytest.raises(CheckpointError, match="is altered: digest"):
        convert(made, tmp_path / "y.pt", to="torch", base=tmp_path / "base.pt" if to == "delta" else None)
    assert not (tmp_path / "y.pt").exists()


def test_a_tensor_that_the_record_of_digests_names_and_the_file_lacks_is_a_problem(tmp_path: Path) -> None:
    for record, message in (({"b": "0" * 64}, "1 tensors are missing, first 'b'"), ({"a": 3}, "damaged")):
        save_file({"a": torch.ones(1)}, tmp_path / "m.safetensors", metadata={"thawline.digests": json.dumps(record)})
        assert message in verify(tmp_path / "m.safetensors").problems[0]


def test_a_name_that_is_no_text_is_damage(tmp_path: Path) -> None:
    header = b'{"x\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "m.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "its metadata are damaged" in verify(tmp_path / "m.safetensors").problems[0]


def test_a_checkpoint_whose_base_is_gone_is_verified_alone(tmp_path: Path) -> None:
    base = {"w": torch.ones(2), "b": torch.zeros(2)}
    gone = BaseRef.of(base, path=str(tmp_path / "gone"))
    path = save_checkpoint(tmp_path, step=1, delta=base | {"b": torch.ones(2)}, optimizer={}, state={}, base=gone)
    report = verify(path)
    assert report.ok
    assert report.not_held == {"w": "unchanged from the base"}
    with pytest.raises(CheckpointError, match="a base that is not given"):
        convert(path, tmp_path / "m.pt", to="torch")
