"""Curves over training steps as inline SVG, several runs in one plot; long ones are thinned so that no peak is lost.

Verified by: tests/evals/test_svg_lines.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from numpy.typing import NDArray

from workbench.evals.svg_axes import Frame, linear_ticks, log_ticks, short

#: A curve of more values than twice this is drawn as the mean of each of so many equal pieces, over a pale line through
#: the lowest and the highest value of each.
NUM_BUCKETS = 400
#: A logarithmic axis is taken where the values are above 0 and the highest is so many times the lowest.
LOG_FROM = 30.0
#: Where plots end: axes cannot be computed far beyond, and a larger value is shown as if it were infinite.
_LARGEST, _SMALLEST = 1e100, 1e-100
NUM_COLOURS = 8

STYLE = """
:root{--s0:#2563a8;--s1:#c2410c;--s2:#15803d;--s3:#7c3aed;--s4:#b91c5c;--s5:#0e7490;--s6:#92650a;--s7:#525b6b}
@media(prefers-color-scheme:dark){:root{--s0:#7db3ee;--s1:#fb923c;--s2:#4ade80;--s3:#b794f6;--s4:#f472b6;--s5:#22d3ee;
--s6:#eab308;--s7:#a3adbd}}
svg polyline.c,svg polyline.e{fill:none;stroke-width:1.4;stroke-linejoin:round}
svg polyline.e{stroke-width:1;opacity:.35}svg .v{stroke:var(--dim);stroke-dasharray:2 3}
svg .h{fill:var(--dim);font-size:10px}
""" + "".join(f".s{n}{{stroke:var(--s{n});fill:var(--s{n})}}" for n in range(NUM_COLOURS))


@dataclass(frozen=True, slots=True)
class Curve:
    """A part of a line, for example a metric of a run in one phase.

    Args: name: told where the pointer rests; colour: number of the run; steps: ascending; values: may be infinite or
        NaN: the line has a gap there.
    """

    name: str
    colour: int
    steps: NDArray[np.float64]
    values: NDArray[np.float64]


Line = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Stretches:
    """What is drawn of a curve: lines through values, and, where it is thinned, through the means of the same pieces;
    holes: steps of values that are not finite, the first of each piece."""

    lines: list[Line] = field(default_factory=list)
    means: list[Line] = field(default_factory=list)
    holes: list[float] = field(default_factory=list)


def thinned(curve: Curve, num_buckets: int = NUM_BUCKETS) -> Stretches:
    """The lowest and the highest finite value of each of so many equal pieces, in the order of steps, the first and the
    last value of all, and the means; short curves as they are. A piece with a value that is not finite ends a line."""
    num = len(curve.steps)
    is_thinned = num > 2 * num_buckets
    found = Stretches([[]], [[]])
    for piece in np.array_split(np.arange(num), num_buckets if is_thinned else num):
        finite = piece[_is_finite(curve.values[piece])]
        if len(finite):
            values = curve.values[finite]
            chosen = {int(finite[values.argmin()]), int(finite[values.argmax()])} | {0, num - 1} & set(finite.tolist())
            found.lines[-1].extend((float(curve.steps[i]), float(curve.values[i])) for i in sorted(chosen))
            found.means[-1].append((float(curve.steps[finite].mean()), float(values.mean())))
        if len(finite) < len(piece):
            found.holes.append(float(curve.steps[piece[~_is_finite(curve.values[piece])][0]]))
            found.lines.append([])
            found.means.append([])
    means = [line for line in found.means if line] if is_thinned else []
    return Stretches([line for line in found.lines if line], means, found.holes)


def _is_finite(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    return np.abs(values) < _LARGEST  # not of NaN


def is_logarithmic(values: NDArray[np.float64]) -> bool:
    """Whether a plot of these values (the finite ones count) takes a logarithmic axis."""
    finite = values[_is_finite(values)]
    return bool(len(finite) and finite.min() > _SMALLEST and finite.max() / finite.min() >= LOG_FROM)


def plot(curves: Sequence[Curve], y_label: str, marks: Sequence[tuple[float, str]] = ()) -> str:
    """The plot; a text instead where no value is finite. Args: marks: (step, what begins there), a dotted line each."""
    values = np.concatenate([curve.values for curve in curves])
    finite = values[_is_finite(values)]
    if not len(finite):
        return f"<p>{escape(y_label)}: no value is a finite number.</p>"
    is_log = is_logarithmic(values)
    ys = (log_ticks if is_log else linear_ticks)(float(finite.min()), float(finite.max()))
    xs = linear_ticks(0.0, max(float(curve.steps[-1]) for curve in curves), smallest_step=1.0)
    frame = Frame(560, 300, 60, 16, 38, 46, xs, ys, is_log_y=is_log)
    parts = [frame.opening("step", f"{y_label} (logarithmic)" if is_log else y_label, is_on_top=True)]
    bottom = frame.height - frame.bottom
    for step, name in marks:
        place = f"{frame.x(step):.1f}"
        parts.append(f'<line class="v" x1="{place}" y1="{frame.top}" x2="{place}" y2="{bottom}"/>')
        parts.append(f'<text class="h" x="{place}" y="{frame.top - 6}">{escape(name)}</text>')
    for curve in curves:
        parts += _drawn(curve, frame, bottom)
    return "".join(parts) + "</svg>"


def _drawn(curve: Curve, frame: Frame, bottom: int) -> list[str]:
    found = thinned(curve)
    kind = f"s{curve.colour % NUM_COLOURS}"
    dashes = f' stroke-dasharray="{2 + 2 * (curve.colour // NUM_COLOURS)} 2"' if curve.colour >= NUM_COLOURS else ""
    title = f"<title>{escape(curve.name)}</title>"
    extremes = f"{kind} e" if found.means else f"{kind} c"
    parts = [_line(line, frame, extremes, dashes, title) for line in found.lines]
    parts += [_line(line, frame, f"{kind} c", dashes, title) for line in found.means]
    for step in found.holes:
        x = frame.x(step)
        corners = f"{x - 4:.1f},{bottom} {x + 4:.1f},{bottom} {x:.1f},{bottom - 8}"
        parts.append(f'<polygon class="{kind}" points="{corners}"><title>{escape(curve.name)}: not a finite number, ')
        parts.append(f"first at step {short(step)}</title></polygon>")
    return parts


def _line(line: Line, frame: Frame, kind: str, dashes: str, title: str) -> str:
    if len(line) == 1:
        ((x, y),) = line
        return f'<circle class="{kind}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2">{title}</circle>'
    corners = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in line)
    return f'<polyline class="{kind}"{dashes} points="{corners}">{title}</polyline>'
