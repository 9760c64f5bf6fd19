"""The restricted unpickler: plain data come out, nothing is run, damage is named."""

from __future__ import annotations

import collections
import io
import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thawline.ckpt.formats.pickle_names import Inert, Name, TensorRef
from thawline.ckpt.formats.unpickle import unpickle
from thawline.ckpt.source import open_source
from thawline.errors import CheckpointError

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=12,
)


def load(data: bytes) -> object:
    return unpickle(memoryview(data), where="x.pt")[0]


@settings(max_examples=150, deadline=None)
@given(value=PLAIN, protocol=st.integers(1, 5))
def test_plain_data_come_out_as_pickle_itself_gives_them(value: object, protocol: int) -> None:
    assert load(pickle.dumps(value, protocol)) == value


def test_ordered_dicts_and_sets_become_plain_ones() -> None:
    value = collections.OrderedDict(a=1, b={3, 4})
    assert load(pickle.dumps(value)) == {"a": 1, "b": {3, 4}}


def test_attributes_of_a_state_dict_are_not_data() -> None:
    state = collections.OrderedDict(w=1)
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    assert load(pickle.dumps(state)) == {"w": 1}


class Hostile:
    def __init__(self, function: object, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> object:
        return self.call


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (os.system, ("touch pickle_code_ran",)),
        (os.mkdir, ("pickle_code_ran",)),
        (eval, ("open('pickle_code_ran','w')",)),
        (exec, ("open('pickle_code_ran','w')",)),
        (getattr, (dict, "fromkeys")),
        (open, ("pickle_code_ran", "w")),
        (subprocess.Popen, (["touch", "pickle_code_ran"],)),
        (__import__, ("os",)),
        (torch.load, ("x.pt",)),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_hostile_pickle_is_refused_by_the_name_it_wanted_and_does_not_run(
    function: object, args: tuple[object, ...], protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps({"w": Hostile(function, *args)}, protocol)
    with pytest.raises(CheckpointError, match="nothing was run") as caught:
        load(data)
    assert function.__name__ in caught.value.what  # type: ignore[attr-defined]
    assert not os.path.lexists(tmp_path / "pickle_code_ran")


def test_a_hostile_torch_file_is_refused_as_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.zeros(2), "x": Hostile(os.mkdir, "pickle_code_ran")}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match=r"posix\.mkdir"):
        open_source(tmp_path / "evil.pt")
    assert not (tmp_path / "pickle_code_ran").exists()


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02ccollections\nOrderedDict\n}b.",  # state for a class: would change the class for everybody
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02K\x01K\x02b.",
        b"\x80\x02]]s.",
        b"\x80\x02}]K\x01s.",
        b"\x80\x02(.",
        b"\x80\x02.",
        b"\x80\x02K\x01",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x02X\xff\xff\xff\xffabc.",
        b"\x80\x02j\xff\xff\xff\xff.",
        b"\x80\x09.",
        b"\x80\x02\x82\x01.",
        b"",
    ],
)
def test_broken_programs_end_in_our_error(program: bytes) -> None:
    with pytest.raises(CheckpointError):
        load(program)


def test_deep_nesting_neither_crashes_nor_becomes_a_key() -> None:
    deep = b"\x80\x02" + b")" + b"\x85" * 200_000 + b"."
    assert isinstance(load(deep), tuple)
    with pytest.raises(CheckpointError, match="cannot be a key"):
        load(b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"K\x01s.")


def test_a_remembered_index_of_four_billion_costs_no_memory() -> None:
    assert load(b"\x80\x02K\x05r\xff\xff\xff\xff0j\xff\xff\xff\xff.") == 5


def test_tensors_are_described_and_their_data_not_touched(tmp_path: Path) -> None:
    wide = torch.arange(24.0).reshape(4, 6)
    torch.save({"t": wide.t(), "p": torch.nn.Parameter(wide)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        value = load(archive.read("x/data.pkl"))
    assert isinstance(value, dict)
    turned = value["t"]
    assert isinstance(turned, TensorRef)
    assert (turned.dtype, turned.shape, turned.strides, turned.offset) == ("F32", (6, 4), (1, 6), 0)
    assert isinstance(value["p"], TensorRef)


def test_known_foreign_classes_become_inert_objects() -> None:
    from pathlib import PurePosixPath

    value = load(pickle.dumps(PurePosixPath("a/b"), 2))
    assert isinstance(value, Inert)
    assert isinstance(value.name, Name)
    assert value.name.name == "PurePosixPath"


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_altered_programs_end_in_a_value_or_in_our_error(data: st.DataObject) -> None:
    buffer = io.BytesIO()
    state = collections.OrderedDict(a=torch.zeros(2, 3), b=[1, "x", None, (1, 2)])
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as archive:
        program = bytearray(archive.read("archive/data.pkl"))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(program) - 1))
        program[place] = data.draw(st.integers(0, 255))
    try:
        load(bytes(program[: data.draw(st.integers(0, len(program)))]))
    except CheckpointError:
        return


def test_every_instruction_that_torch_and_pickle_use_is_known() -> None:
    from thawline.ckpt.formats import unpickle as module

    known = {*module._INSTRUCTIONS, ord(".")}
    unknown = {op.name for op in pickletools.opcodes if ord(op.code) not in known}
    # Extension codes and out-of-band buffers need an agreement with the reader; nothing here writes them.
    assert unknown == {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER", "PERSID"}


def test_reading_imports_nothing_the_pickle_names() -> None:
    code = (
        "import sys\nfrom thawline.ckpt.formats.unpickle import unpickle\nfrom thawline.errors import CheckpointError\n"
        "try:\n    unpickle(memoryview(b'\\x80\\x02cthis\\ns\\n.'), where='x')\n"
        "except CheckpointError:\n    pass\nassert 'this' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("make", [lambda x: x.conj(), lambda x: x.conj().imag], ids=["conj", "neg"])
def test_a_tensor_that_torch_has_still_to_change_is_refused(
    make: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    value = make(torch.randn(3, dtype=torch.complex64))
    torch.save({"w": value}, tmp_path / "lazy.pt")
    with pytest.raises(CheckpointError, match="values are not its bytes"):
        open_source(tmp_path / "lazy.pt")
    torch.save({"w": value.resolve_conj().resolve_neg()}, tmp_path / "plain.pt")
    with open_source(tmp_path / "plain.pt") as source:
        assert bytes(source.read("w")) == value.resolve_conj().resolve_neg().numpy().tobytes()


def test_tensors_under_names_that_are_no_text_are_mentioned(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), 7: torch.ones(3)}, tmp_path / "m.pt")
    with open_source(tmp_path / "m.pt") as source:
        assert source.names == ("w",)
        assert "tensors whose names are no text, left out: 7" in source.notes
