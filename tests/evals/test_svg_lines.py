"""Curves: thinning keeps every peak, axes hold every value, labels tell ticks apart, gaps are shown."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from workbench.evals.svg_axes import Frame, linear_ticks, log_ticks, short
from workbench.evals.svg_lines import NUM_BUCKETS, Curve, is_logarithmic, plot, thinned

Values = st.lists(st.floats(-1e6, 1e6) | st.sampled_from([math.nan, math.inf, -math.inf]), min_size=1, max_size=200)


def curve(values: list[float], name: str = "a", colour: int = 0, start: int = 1) -> Curve:
    return Curve(name, colour, np.arange(start, start + len(values), dtype=np.float64), np.array(values, np.float64))


@given(values=Values, num_buckets=st.integers(1, 20))
def test_thinning_keeps_the_ends_and_every_extreme(values: list[float], num_buckets: int) -> None:
    given_curve = curve(values)
    found = thinned(given_curve, num_buckets)
    points = [point for line in found.lines for point in line]
    finite = [(float(step), value) for step, value in enumerate(values, 1) if math.isfinite(value)]
    assert set(points) <= set(finite)
    assert [step for step, _ in points] == sorted({step for step, _ in points})
    assert len(points) <= 2 * num_buckets + 2
    assert bool(found.holes) == (len(finite) < len(values))
    if finite:
        assert {min(v for _, v in finite), max(v for _, v in finite)} <= {v for _, v in points}
        ends = [end for end in (values[0], values[-1]) if math.isfinite(end)]
        assert all(end in [value for _, value in points] for end in ends)
    if len(values) <= 2 * num_buckets:
        assert points == finite
        assert not found.means
    elif finite:
        means = [value for line in found.means for _, value in line]
        assert 1 <= len(means) <= num_buckets
        assert all(min(v for _, v in finite) - 1e-6 <= mean <= max(v for _, v in finite) + 1e-6 for mean in means)


def test_means_are_those_of_the_pieces() -> None:
    (line,) = thinned(curve([0.0, 2.0, 4.0, 6.0, 1.0, 3.0, 5.0, 7.0]), 2).means
    assert line == [(2.5, 3.0), (6.5, 4.0)]


@given(values=Values)
def test_no_line_crosses_a_value_that_is_not_finite(values: list[float]) -> None:
    for line in thinned(curve(values)).lines:
        steps = [step for step, _ in line]
        assert steps == list(range(int(steps[0]), int(steps[-1]) + 1))


@given(values=st.lists(st.floats(), min_size=1, max_size=5))
def test_any_values_can_be_plotted(values: list[float]) -> None:
    text = plot([curve(values)], "loss")
    if text.startswith("<svg"):
        assert not re.search("nan|inf", text)
        for circle in ElementTree.fromstring(text).findall("circle"):
            assert 38 <= float(circle.get("cy", 0)) <= 254


def test_a_single_peak_of_a_long_run_is_drawn() -> None:
    values = [1.0 + 0.001 * (i % 7) for i in range(50_000)]
    values[31_415] = 9.0
    root = ElementTree.fromstring(plot([curve(values)], "loss"))
    line, means = root.findall("polyline")
    assert (line.get("class"), means.get("class")) == ("s0 e", "s0 c")
    assert len(means.get("points", "").split()) == NUM_BUCKETS
    corners = [tuple(map(float, corner.split(","))) for corner in line.get("points", "").split()]
    assert len(corners) <= 2 * NUM_BUCKETS + 2
    highest = min(corners, key=lambda corner: corner[1])
    assert sum(y < highest[1] + 50 for _, y in corners) == 1
    assert highest[0] == pytest.approx(60 + 31_416 / 50_000 * (560 - 60 - 16), abs=0.5)


@settings(deadline=None)
@given(low=st.floats(-1e9, 1e9), span=st.floats(0, 1e9))
@example(low=0.0, span=2.2250738585072014e-308)
def test_linear_ticks_enclose_and_can_be_told_apart(low: float, span: float) -> None:
    high = low + span
    ticks = linear_ticks(low, high)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-6 * step
    assert ticks[-1] >= high - 1e-6 * step
    assert 2 <= len(ticks) <= 11
    frame = Frame(560, 300, 76, 16, 22, 46, [0.0, 1.0], ticks)
    root = ElementTree.fromstring(frame.opening("x", "y") + "</svg>")
    texts = [text.text for text in root.findall("text") if text.get("text-anchor") == "end"]
    assert len(set(texts)) == len(ticks)
    assert [float((text or "").replace(",", "")) for text in texts] == pytest.approx(ticks, abs=step / 2)


@given(low=st.floats(1e-12, 1e9), factor=st.floats(1, 1e15))
def test_logarithmic_ticks_enclose(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert ticks[0] <= low
    assert low * factor <= ticks[-1]
    assert 2 <= len(ticks) <= 16
    assert ticks == sorted(set(ticks))


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, 29.0], False), ([1.0, 31.0], True), ([0.0, 100.0], False), ([-1.0, 100.0], False), ([math.nan], False),
     ([1.0, math.inf, 100.0], True)],
)  # fmt: skip
def test_a_logarithmic_axis_is_taken_where_it_is_useful_and_said(values: list[float], expected: bool) -> None:
    assert is_logarithmic(np.array(values)) == expected
    assert ("(logarithmic)" in plot([curve(values)], "loss")) == expected


def test_gaps_single_values_many_runs_and_evil_names() -> None:
    evil = "</svg><script>alert(1)</script>"
    curves = [curve([1, math.nan, 3, 4], evil), curve([2.0], "b", 1), curve([1.0, 2.0], "c", 9)]
    root = ElementTree.fromstring(plot(curves, evil, [(2.0, evil)]))
    assert len(root.findall("polyline")) == 2
    assert len(root.findall("circle")) == 2  # the value before the gap, and the run of one value
    (hole,) = root.findall("polygon")
    assert "not a finite number, first at step 2" in "".join(hole.itertext())
    dashed = [line for line in root.findall("polyline") if line.get("stroke-dasharray")]
    assert [line.get("class") for line in dashed] == ["s1 c"]
    assert root.findtext("polyline/title") == evil
    assert "script" not in {element.tag for element in root.iter()}
    assert "no value is a finite number" in plot([curve([math.nan, math.inf])], "loss")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.00011, "0.00011"), (0.25, "0.25"), (1234.5, "1,234"), (2e6, "2e+06"), (-3.14159, "-3.142")]
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text
