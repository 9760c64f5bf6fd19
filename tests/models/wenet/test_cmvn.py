"""Statistics files in both of WeNet's forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from thawline.errors import DataError
from thawline.models.wenet.cmvn import GlobalCMVN, read_cmvn


def test_kaldi_text_and_json_say_the_same(tmp_path: Path) -> None:
    frames = torch.randn(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 + 5
    sums, squares = frames.sum(0).tolist(), frames.square().sum(0).tolist()
    (tmp_path / "json").write_text(json.dumps({"mean_stat": sums, "var_stat": squares, "frame_num": 500}))
    rows = [[*map(repr, sums), "500"], [*map(repr, squares), "0"]]
    (tmp_path / "kaldi").write_text(" [\n  " + "\n  ".join(" ".join(r) for r in rows) + " ]\n")
    one, two = read_cmvn(tmp_path / "json", is_json=True), read_cmvn(tmp_path / "kaldi", is_json=False)
    assert one == two
    assert one.mean == pytest.approx(frames.mean(0).tolist())
    assert one.istd == pytest.approx((1 / frames.std(0, correction=0)).tolist())


def test_a_bin_that_never_varies_does_not_divide_by_zero(tmp_path: Path) -> None:
    (tmp_path / "cmvn").write_text(json.dumps({"mean_stat": [10.0], "var_stat": [20.0], "frame_num": 5}))
    assert read_cmvn(tmp_path / "cmvn", is_json=True).istd == pytest.approx((1e10,))


@pytest.mark.parametrize(
    ("content", "is_json", "words"),
    [
        (b"\0BFM \x04", False, "binary"),
        (b"\xff\xfe\0", False, "binary"),
        (b"[ 1 2 3 ]", False, "Kaldi text"),
        (b"[ 1 2 3 4 5 1 ]", False, "not in 0"),
        (b"{}", True, "mean_stat"),
        (b'{"mean_stat": [1], "var_stat": [1], "frame_num": 0}', True, "JSON"),
        (b'{"mean_stat": [1], "var_stat": [1, 2], "frame_num": 3}', True, "1 sums and 2"),
        (b"[ 1 2 1 2 0 ]", True, "JSON"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, content: bytes, is_json: bool, words: str) -> None:
    path = tmp_path / "global_cmvn"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_cmvn(path, is_json=is_json)
    assert caught.value.where == str(path)
    assert words in str(caught.value)


def test_without_statistics_the_buffers_are_nan_so_that_forgetting_them_shows() -> None:
    assert bool(GlobalCMVN(4)(torch.zeros(1, 1, 4)).isnan().all())


def test_statistics_of_another_width_are_refused(wenet_case: Any) -> None:
    case = wenet_case("u2_conformer")
    statistics = read_cmvn(case.folder / "global_cmvn", is_json=True)
    with pytest.raises(DataError, match="for 80 bins, the model takes 40"):
        GlobalCMVN(40, statistics)
