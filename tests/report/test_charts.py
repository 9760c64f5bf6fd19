"""Charts as SVG and tables as HTML."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thawline.report.charts import Line, Mark, _thinned, line_chart, matrix, number, smoothed, table, ticks


def test_a_chart_is_whole_xml_with_a_path_for_every_line() -> None:
    chart = line_chart(
        "loss <&>", [Line("a", [(0, 1), (1, 2)]), Line("b", [(0, 3.0)], faint=True)], marks=[Mark(0.5, "phase 1")]
    )
    root = ElementTree.fromstring(chart)
    paths = [e for e in root if e.get("class") == "line"]
    assert len(paths) == 2
    assert any(e.get("class") == "mark" for e in root)
    assert root.get("aria-label") == "loss <&>"


def test_the_highest_point_is_drawn_highest() -> None:
    root = ElementTree.fromstring(line_chart("x", [Line("a", [(0, 1.0), (1, 5.0), (2, 3.0)])]))
    (path,) = [e.get("d") or "" for e in root if e.get("class") == "line"]
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)]
    assert heights[1] < heights[2] < heights[0]  # SVG counts downwards


def test_numbers_that_are_not_finite_are_left_out() -> None:
    chart = line_chart("x", [Line("a", [(0, 1.0), (1, math.nan), (2, math.inf), (3, 2.0)])])
    assert "nan" not in chart
    assert "inf" not in chart
    assert line_chart("x", [Line("a", [(0, math.nan)])]) == ""


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_enclose_the_range_and_are_few(low: float, width: float) -> None:
    made = ticks(low, low + width)
    slack = 1e-6 * max(abs(low), width)
    assert made[0] <= low + slack
    assert made[-1] >= low + width - slack
    assert 2 <= len(made) <= 13


def test_a_smoothed_constant_is_that_constant_from_the_first_point() -> None:
    assert [y for _, y in smoothed([(i, 3.0) for i in range(20)])] == pytest.approx([3.0] * 20)


def test_many_points_are_thinned_and_the_peak_stays() -> None:
    points = [(float(i), 0.0) for i in range(100_000)]
    points[54_321] = (54_321.0, 9.0)
    made = _thinned(points)
    assert len(made) <= 502
    assert (54_321.0, 9.0) in made
    assert made == sorted(made)


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5"), (12.0, "12"), (0.00012, "1.2e-4"), (0.0, "0"), (2_500_000.0, "2.5e6")]
)
def test_numbers_are_written_as_people_write_them(value: float, text: str) -> None:
    assert number(value) == text


def test_a_matrix_names_every_pair_and_many_classes_become_a_list() -> None:
    made = matrix(["cat", "<dog>"], [[3, 1], [0, 4]])
    assert "cat taken for &lt;dog&gt;: 1" in made
    many = [f"c{i}" for i in range(60)]
    counts = [[0] * 60 for _ in many]
    counts[3][5] = 7
    assert matrix(many, counts) == table([{"is": "c3", "taken for": "c5", "times": 7}])
