"""The plot of the report: what lies on the frontier, labels that do not overlap, axes that hold every point."""

from __future__ import annotations

import random
from xml.etree import ElementTree

import pytest

from workbench.evals.recall_svg import Point, frontier, scatter


def test_the_frontier_keeps_what_nothing_beats() -> None:
    points = [Point("a", 10, 0.3), Point("b", 20, 0.5), Point("c", 30, 0.4), Point("d", 10, 0.2), Point("e", 40, 0.6)]
    assert [point.name for point in frontier(points)] == ["a", "b", "e"]


@pytest.mark.parametrize("seed", range(4))
def test_labels_do_not_overlap_and_all_points_lie_within_the_axes(seed: int) -> None:
    rng = random.Random(seed)
    points = [
        Point(f"layer mode <{i}> & more", 10 ** rng.uniform(1, 4), rng.uniform(0.2, 0.5), i == 3) for i in range(40)
    ]
    root = ElementTree.fromstring(scatter(points, "tokens", "ndcg@10"))
    circles = root.findall("circle")
    assert len(circles) == 40
    assert sum(circle.get("class") == "m" for circle in circles) == 1
    for circle in circles:
        assert 62 <= float(circle.get("cx", 0)) <= 710
        assert 18 <= float(circle.get("cy", 0)) <= 392
    labels = [text for text in root.findall("text") if text.get("class") == "l"]
    assert len(labels) > 8
    boxes = []
    for label in labels:
        x, y = float(label.get("x", 0)), float(label.get("y", 0))
        boxes.append((x, y - 10, x + 5.9 * len(label.text or ""), y + 2))
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])
    assert "layer mode <3> & more" in [label.text for label in labels]
    axes = [text.text for text in root.findall("text") if text.get("class") == "a"]
    assert axes == ["tokens", "ndcg@10"]


@pytest.mark.parametrize("points", [[Point("one", 100, 0.5)], [Point("a", 5, 0.1), Point("b", 5, 0.1)]])
def test_few_points_are_plotted(points: list[Point]) -> None:
    assert len(ElementTree.fromstring(scatter(points, "x", "y")).findall("circle")) == len(points)


def test_nothing_to_plot_is_said() -> None:
    assert "nothing to plot" in scatter([Point("silent", 0, 0.0)], "x", "y")
