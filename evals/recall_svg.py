"""A scatter plot as inline SVG: labelled axes, one point a configuration, labels that do not overlap.

Verified by: tests/evals/test_recall_svg.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from workbench.evals.svg_axes import Frame, linear_ticks, log_ticks

_WIDTH, _HEIGHT = 860, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 150, 18, 48
_CHAR_WIDTH, _LABEL_HEIGHT = 5.9, 12


@dataclass(frozen=True, slots=True)
class Point:
    """A configuration: x > 0 on a logarithmic axis; `is_marked` draws it in the second colour (the baseline)."""

    name: str
    x: float
    y: float
    is_marked: bool = False


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both: less x and more y; by ascending x."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -p.y, p.name)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best


def scatter(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """The plot with the frontier as a line; a text instead where there is nothing to plot."""
    usable = [point for point in points if point.x > 0 and math.isfinite(point.x) and math.isfinite(point.y)]
    if not usable:
        return "<p>Nothing came back, so there is nothing to plot.</p>"
    xs = log_ticks(min(point.x for point in usable), max(point.x for point in usable))
    ys = linear_ticks(min(point.y for point in usable), max(point.y for point in usable), smallest_step=0.01)
    frame = Frame(_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM, xs, ys, is_log_x=True)
    parts = [frame.opening(x_label, y_label)]
    line = frontier(usable)
    corners = " ".join(f"{frame.x(point.x):.1f},{frame.y(point.y):.1f}" for point in line)
    parts.append(f'<polyline class="f" points="{corners}"/>')
    placed = [(point, frame.x(point.x), frame.y(point.y)) for point in usable]
    for point, x, y in placed:
        kind = "m" if point.is_marked else "p"
        tip = f"{escape(point.name)}: {point.x:,.0f}, {point.y:.3f}"
        parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{tip}</title></circle>')
    first = {point.name for point in line} | {point.name for point in usable if point.is_marked}
    parts += _labels(sorted(placed, key=lambda p: (p[0].name not in first, p[1], p[2], p[0].name)))
    return "".join([*parts, "</svg>"])


def _labels(placed: list[tuple[Point, float, float]]) -> list[str]:
    """The names of as many points as have room, those that come first before others."""
    taken = [(x - 5, y - 5, x + 5, y + 5) for _, x, y in placed]
    parts = []
    for point, x, y in placed:
        width = len(point.name) * _CHAR_WIDTH
        for left, base in ((x + 8, y + 4), (x - 8 - width, y + 4), (x + 8, y - 8), (x + 8, y + 16), (x - width, y - 8)):
            box = (left, base - _LABEL_HEIGHT + 2, left + width, base + 2)
            inside = box[0] >= _LEFT and box[2] <= _WIDTH - 2 and box[1] >= 0 and box[3] <= _HEIGHT - _BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                parts.append(f'<text class="l" x="{left:.1f}" y="{base:.1f}">{escape(point.name)}</text>')
                break
    return parts


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
