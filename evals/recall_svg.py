"""A scatter plot as inline SVG: labelled axes, one point a configuration, labels that do not overlap.

Verified by: tests/evals/test_recall_svg.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

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
    xs, ys = _x_axis(usable), _y_axis(usable)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - math.log10(xs[0])) / (math.log10(xs[-1]) - math.log10(xs[0]))
        up = (y - ys[0]) / (ys[-1] - ys[0])
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(y_label)} by {escape(x_label)}">']
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for x in xs:
        place = f"{at(x, ys[0])[0]:.1f}"
        parts.append(f'<line class="g" x1="{place}" y1="{_TOP}" x2="{place}" y2="{bottom}"/>')
        parts.append(f'<text class="t" x="{place}" y="{bottom + 16}" text-anchor="middle">{x:,.0f}</text>')
    for y in ys:
        place = at(xs[0], y)[1]
        parts.append(f'<line class="g" x1="{_LEFT}" y1="{place:.1f}" x2="{right}" y2="{place:.1f}"/>')
        parts.append(f'<text class="t" x="{_LEFT - 8}" y="{place + 4:.1f}" text-anchor="end">{y:.2f}</text>')
    middle = (_TOP + bottom) / 2
    parts.append(f'<text class="a" x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_label)}')
    parts.append(f'</text><text class="a" transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">')
    parts.append(f"{escape(y_label)}</text>")
    line = frontier(usable)
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(p.x, p.y) for p in line))
    parts.append(f'<polyline class="f" points="{corners}"/>')
    placed = [(point, *at(point.x, point.y)) for point in usable]
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


def _x_axis(points: Sequence[Point]) -> list[float]:
    """Ticks 1, 2, 5 x 10^n that enclose the points."""
    low, high = min(p.x for p in points), max(p.x for p in points)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    ticks = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
    inner = [tick for tick in ticks if low < tick < high]
    return [max(t for t in ticks if t <= low), *inner, min(t for t in ticks if t >= high and t > low)]


def _y_axis(points: Sequence[Point]) -> list[float]:
    """Ticks of one step that enclose the points."""
    low, high = min(p.y for p in points), max(p.y for p in points)
    step = next((s for s in (0.01, 0.02, 0.05, 0.1) if (high - low) / s <= 8), 0.2)
    start = math.floor(low / step + 1e-9)
    end = max(start + 1, math.ceil(high / step - 1e-9))
    return [round(number * step, 4) for number in range(start, end + 1)]
