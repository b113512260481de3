"""Small charts as inline SVG: lines with points and error bars, columns.

Places along x are percent of the picture's width, so that one picture serves every width with text of one size; along y
they are pixels. Colors are classes of the page (`c0`, `c1`, ...), text and rules take `currentColor`.
"""

import html
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

TOP, BOTTOM = 10, 44
"""Pixels above and below the plotted area; for labels of y, style.css leaves some beside it."""
_SHAPES = (
    "M0,-5.5a5.5,5.5 0 1,0 .01,0Z",
    "M-5,-5H5V5H-5Z",
    "M0,-6.5L6.2,5H-6.2Z",
    "M0,-7L6,0L0,7L-6,0Z",
    "M-6.2,-5H6.2L0,6.5Z",
)
"""Outlines of points around the origin: what is told apart by color is told apart without."""


class Point(NamedTuple):
    """A place in units of the axes, half the length of its error bar, what is said of it."""

    x: float
    y: float
    error: float | None = None
    title: str = ""


class Series(NamedTuple):
    """Points that a line joins; `kind` is the number of its color and shape."""

    name: str
    kind: int
    points: Sequence[Point]


class Axis(NamedTuple):
    """From where to where, ticks with their labels, and a function to the share of the way from `low` to `high`."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    logarithmic: bool = False

    def share(self, value: float) -> float:
        """0 at `low`, 1 at `high`, held within."""
        if self.logarithmic:
            low, high, value = math.log(self.low), math.log(self.high), math.log(max(value, self.low))
        else:
            low, high = self.low, self.high
        return min(max((value - low) / (high - low), 0.0), 1.0)


def linear_axis(label: str, values: Sequence[float], show: Callable[[float], str], *, zero: bool = False) -> Axis:
    """An axis around the values with about five round ticks; from 0 if told to."""
    low, high = (0.0 if zero else min(values)), max(values)
    if high - low < 1e-9 * max(abs(high), 1e-30):
        low, high = low - max(abs(low), 1.0) * 0.1, high + max(abs(high), 1.0) * 0.1
    step = _round_step((high - low) / 5)
    low = low if zero else low - 0.06 * (high - low)
    high += 0.06 * (high - low)
    first = math.ceil(low / step - 1e-9)
    ticks = [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]
    return Axis(label, low, high, [(tick, show(tick)) for tick in ticks])


def log_axis(label: str, values: Sequence[float], show: Callable[[float], str]) -> Axis:
    """A logarithmic axis around positive values, with ticks at 1, 2 and 5 of powers of ten, or at the powers alone."""
    low, high = 0.8 * min(values), 1.25 * max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if len(powers) <= 4 else (1,)
    ticks = [digit * 10.0**power for power in powers for digit in digits]
    return Axis(label, low, high, [(tick, show(tick)) for tick in ticks if low <= tick <= high], logarithmic=True)


def lines(label: str, series: Sequence[Series], x: Axis, y: Axis, height: int = 320, *, marks: bool = True) -> str:
    """A chart of the series, the first in front; `label` is what those hear who do not see it."""
    inside = height - TOP - BOTTOM
    drawn = [_frame(x, y, inside), *(_drawn(one, x, y, inside, marks=marks) for one in reversed(series))]
    return picture(label, height, "".join(drawn))


def columns(label: str, stacks: Sequence[tuple[str, float, str]], y: Axis, x_label: str, height: int = 220) -> str:
    """A column per (label, value, title); labels are thinned out where there are many."""
    inside, step = height - TOP - BOTTOM, 100 / len(stacks)
    every = math.ceil(len(stacks) / 12)
    drawn = [_frame(Axis(x_label, 0, 1, []), y, inside)]
    for i, (name, value, title) in enumerate(stacks):
        top = inside * (1 - y.share(value))
        drawn.append(
            f'<rect class="bar" x="{(i + 0.1) * step:.3f}%" y="{top:.1f}" width="{0.8 * step:.3f}%" '
            f'height="{inside - top:.1f}"><title>{html.escape(title)}</title></rect>'
        )
        if i % every == 0:
            drawn.append(_text(f"{(i + 0.5) * step:.3f}%", inside + 16, name, "middle"))
    return picture(label, height, "".join(drawn))


def picture(label: str, height: int, inside: str) -> str:
    """An SVG whose origin and width are those of the plotted area; labels of y lie beside it."""
    return (
        f'<div class="plot"><svg class="chart" role="img" aria-label="{html.escape(label)}" width="100%" '
        f'height="{height}"><g transform="translate(0,{TOP})">{inside}</g></svg></div>'
    )


def mark(kind: int) -> str:
    """A series' point for a legend."""
    return (
        f'<svg class="mark c{kind}" width="16" height="16" aria-hidden="true"><path transform="translate(8,8)" '
        f'd="{_SHAPES[kind % len(_SHAPES)]}"/></svg>'
    )


def _frame(x: Axis, y: Axis, inside: int) -> str:
    parts = []
    for value, label in y.ticks:
        at = inside * (1 - y.share(value))
        parts.append(f'<line class="grid" x1="0" x2="100%" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text("-8", at + 4, label, "end"))
    for value, label in x.ticks:
        at = f"{100 * x.share(value):.3f}%"
        parts.append(f'<line class="tick" x1="{at}" x2="{at}" y1="{inside}" y2="{inside + 5}"/>')
        parts.append(_text(at, inside + 18, label, "middle"))
    parts.append(f'<line class="base" x1="0" x2="100%" y1="{inside}" y2="{inside}"/>')
    parts.append(_text("50%", inside + 37, x.label, "middle", "label"))
    return "".join(parts)


def _drawn(series: Series, x: Axis, y: Axis, inside: int, *, marks: bool) -> str:
    at = [(100 * x.share(p.x), inside * (1 - y.share(p.y)), p) for p in sorted(series.points)]
    parts = [
        f'<line class="line" x1="{a:.3f}%" y1="{b:.1f}" x2="{c:.3f}%" y2="{d:.1f}"/>'
        for (a, b, _), (c, d, _) in itertools.pairwise(at)
    ]
    for across, down, point in at:
        if point.error is not None:
            low, high = (inside * (1 - y.share(point.y + sign * point.error)) for sign in (-1, 1))
            parts.append(f'<line class="error" x1="{across:.3f}%" x2="{across:.3f}%" y1="{low:.1f}" y2="{high:.1f}"/>')
        if marks:
            parts.append(
                f'<svg x="{across:.3f}%" y="{down:.1f}" overflow="visible"><path class="point" '
                f'd="{_SHAPES[series.kind % len(_SHAPES)]}"><title>{html.escape(point.title)}</title></path></svg>'
            )
    return f'<g class="c{series.kind}">{"".join(parts)}</g>'


def _text(x: str, y: float, text: str, anchor: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _round_step(step: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= step * (1 - 1e-9))
