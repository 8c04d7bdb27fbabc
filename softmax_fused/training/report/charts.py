"""Line charts as numbers that a template draws in SVG: no colours, so that the page's own, light or dark, apply."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 360, 230  # about a phone's width, so that text keeps its size there
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 34  # margins
INSET = 8  # between the vertical axis and the first point
WIDE = 1000  # from this ratio on, small values would all lie on the axis
MOST_MARKS = 30
MOST_POINTS = 500  # more would not be told apart in this width


@dataclass(frozen=True)
class Point:
    """A value and its place."""

    x: float
    y: float
    epoch: int
    value: float


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    points: list[Point]
    marked: bool

    @property
    def path(self) -> str:
        """Return the curve as the points of an SVG polyline."""
        return " ".join(f"{point.x:.1f},{point.y:.1f}" for point in self.points)


@dataclass(frozen=True)
class Tick:
    """A place on an axis and what it says."""

    place: float
    text: str


@dataclass(frozen=True)
class Chart:
    """Curves over epochs, in a box of WIDTH x HEIGHT."""

    title: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


def line_chart(title: str, curves: Mapping[str, Sequence[float | None]]) -> Chart:
    """Return curves over epochs 1, 2, ..., scaled to the box.

    Args:
        title: What they show.
        curves: Values by label, None for an epoch without one; at least one value in all.
    """
    longest = max(len(values) for values in curves.values())
    every = [value for values in curves.values() for value in values if value is not None]
    wide = min(every) > 0 and max(every) / min(every) > WIDE
    scale = math.log10 if wide else float
    low, high = _apart(scale(min(every)), scale(max(every)))
    between = MaxNLocator(nbins=5, integer=wide).tick_values(low, high)
    heights = [10.0**height if wide else float(height) for height in between if low <= height <= high]

    def x(epoch: float) -> float:
        return LEFT + INSET + (WIDTH - LEFT - RIGHT - INSET) * ((epoch - 1) / (longest - 1) if longest > 1 else 0.5)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - scale(value)) / (high - low)

    def line(label: str, values: Sequence[float | None]) -> Line:
        kept = list(enumerate(values, start=1))[:: -(-len(values) // MOST_POINTS) or 1]
        points = [Point(x(epoch), y(value), epoch, value) for epoch, value in kept if value is not None]
        return Line(label, points, len(values) <= MOST_MARKS)

    epochs = MaxNLocator(nbins=6, integer=True).tick_values(1, longest) if longest > 1 else [1]
    return Chart(
        f"{title} (logarithmic scale)" if wide else title,
        [line(label, values) for label, values in curves.items()],
        [Tick(x(epoch), f"{epoch:g}") for epoch in epochs if 1 <= epoch <= longest],
        [Tick(y(value), f"{value:.6g}") for value in heights],
    )


def _apart(low: float, high: float) -> tuple[float, float]:
    """Return the ends of an axis, a little beyond the values and never at the same place."""
    margin = 0.04 * (high - low) or abs(low) / 10 or 1.0
    return low - margin, high + margin
