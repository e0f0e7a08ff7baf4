"""The frame of a plot as inline SVG: ticks, grid, labelled axes, and where a value lies.

Verified by: tests/evals/test_recall_svg.py, tests/evals/test_svg_lines.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks 1, 2, 5 x 10^n that enclose low to high, both above 0; whole powers alone over more than three decades."""
    first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2
    factors = (1, 2, 5) if high / low <= 1000 else (1,)
    step = max(1, (last - first) // 8) if len(factors) == 1 else 1
    ticks = [factor * 10.0**decade for decade in range(first, last + step, step) for factor in factors]
    inner = [tick for tick in ticks if low < tick < high]
    return [max(t for t in ticks if t <= low), *inner, min(t for t in ticks if t >= high and t > low)]


def linear_ticks(low: float, high: float, smallest_step: float = 0.0) -> list[float]:
    """At most ten ticks of one step (1, 2 or 5 x 10^n) that enclose low to high."""
    smallest = max(1e-9 * max(abs(low), abs(high)), 1e-250)  # a step that floats still tell apart
    span = max(high - low, smallest) if high > low else max(abs(low) / 10, smallest) if low else 1.0
    power = 10.0 ** math.floor(math.log10(span / 8))
    step = max(next(f * power for f in (1, 2, 5, 10) if span / (f * power) <= 8.000001), smallest_step)
    start = math.floor(low / step + 1e-9)
    end = max(start + 1, math.ceil(high / step - 1e-9))
    digits = min(300, max(0, 1 - math.floor(math.log10(step))))
    return [round(number * step, digits) for number in range(start, end + 1)]


def short(value: float) -> str:
    """A number as axes and tables show it: 4 digits, thousands with commas, powers of ten where it is far from 1."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclass(frozen=True, slots=True)
class Frame:
    """A plot's measures in pixels and its axes.

    Args: xs, ys: ticks; the first and the last are the ends of the axis; is_log_x, is_log_y: logarithmic axes.
    """

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    xs: Sequence[float]
    ys: Sequence[float]
    is_log_x: bool = False
    is_log_y: bool = False

    def x(self, value: float) -> float:
        """Pixels from the left."""
        return self.left + _share(value, self.xs, self.is_log_x) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        up = _share(value, self.ys, self.is_log_y)
        return self.height - self.bottom - up * (self.height - self.top - self.bottom)

    def opening(self, x_label: str, y_label: str, is_on_top: bool = False) -> str:
        """The opening tag, the grid, the ticks and the labels; the caller adds what is plotted and `</svg>`.

        Args: is_on_top: the y label stands above the plot, where a long one has room, not turned beside it.
        """
        parts = [f'<svg viewBox="0 0 {self.width} {self.height}" role="img" ']
        parts.append(f'aria-label="{escape(y_label)} by {escape(x_label)}">')
        bottom, right = self.height - self.bottom, self.width - self.right
        for x, x_text in zip(self.xs, _texts(self.xs, self.is_log_x), strict=True):
            place = f"{self.x(x):.1f}"
            parts.append(f'<line class="g" x1="{place}" y1="{self.top}" x2="{place}" y2="{bottom}"/>')
            parts.append(f'<text class="t" x="{place}" y="{bottom + 16}" text-anchor="middle">{x_text}</text>')
        for y, y_text in zip(self.ys, _texts(self.ys, self.is_log_y), strict=True):
            place = self.y(y)
            parts.append(f'<line class="g" x1="{self.left}" y1="{place:.1f}" x2="{right}" y2="{place:.1f}"/>')
            parts.append(f'<text class="t" x="{self.left - 8}" y="{place + 4:.1f}" text-anchor="end">{y_text}</text>')
        across, middle = (self.left + right) / 2, (self.top + bottom) / 2
        parts.append(f'<text class="a" x="{across}" y="{self.height - 8}" text-anchor="middle">')
        parts.append(f"{escape(x_label)}</text>")
        place = 'x="4" y="14"' if is_on_top else f'transform="translate(16 {middle}) rotate(-90)" text-anchor="middle"'
        parts.append(f'<text class="a" {place}>{escape(y_label)}</text>')
        return "".join(parts)


def _share(value: float, ticks: Sequence[float], is_log: bool) -> float:
    """Where the axis has the value: 0 at its first tick, 1 at its last."""
    low, high = ticks[0], ticks[-1]
    if is_log:
        return (math.log10(value) - math.log10(low)) / (math.log10(high) - math.log10(low))
    return (value - low) / (high - low)


def _texts(ticks: Sequence[float], is_log: bool) -> list[str]:
    """With as many digits as tell one tick from the next."""
    if is_log:
        return [short(tick) for tick in ticks]
    step, largest = ticks[1] - ticks[0], max(abs(tick) for tick in ticks)
    if largest >= 1e6 or step < 1e-5:
        return [f"{tick:.{math.floor(math.log10(largest / step)) + 2}g}" for tick in ticks]
    return [f"{tick:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}" for tick in ticks]
