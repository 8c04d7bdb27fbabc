"""Curves over epochs as the coordinates that the report's template draws in SVG.

There are no colours here, because the page's own apply, which differ between light and dark.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from softmax_fused.training.report.plots import LOG_SCALE_RATIO, MAX_MARKED

WIDTH, HEIGHT = 360, 230  # about the width of a phone, on which text then has its usual size
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 34  # margins
INSET = 8  # from the vertical axis to the first point
MAX_POINTS = 500  # of a curve; more could not be told apart in this width


@dataclass(frozen=True)
class Point:
    """The value of an epoch, and its position in the chart."""

    x: float
    y: float
    epoch: int
    value: float


@dataclass(frozen=True)
class Line:
    """A curve; its points have markers if `marked`."""

    label: str
    points: list[Point]
    marked: bool

    @property
    def path(self) -> str:
        """Return the curve as the points of an SVG polyline."""
        return " ".join(f"{point.x:.1f},{point.y:.1f}" for point in self.points)


@dataclass(frozen=True)
class Tick:
    """A position on an axis and its text."""

    position: float
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
        title: What the curves show.
        curves: Values by label, None for an epoch without one; there is at least one value.
    """
    from matplotlib.ticker import MaxNLocator

    epochs = max(len(values) for values in curves.values())
    known = [value for values in curves.values() for value in values if value is not None]
    logarithmic = min(known) > 0 and max(known) / min(known) > LOG_SCALE_RATIO
    scale = math.log10 if logarithmic else float
    low, high = _axis_limits(scale(min(known)), scale(max(known)))
    ticks = [float(tick) for tick in MaxNLocator(nbins=5, integer=logarithmic).tick_values(low, high)]
    levels = [10.0**tick if logarithmic else tick for tick in ticks if low <= tick <= high]

    def x(epoch: float) -> float:
        return LEFT + INSET + (WIDTH - LEFT - RIGHT - INSET) * ((epoch - 1) / (epochs - 1) if epochs > 1 else 0.5)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - scale(value)) / (high - low)

    def line(label: str, values: Sequence[float | None]) -> Line:
        kept = list(enumerate(values, start=1))[:: -(-len(values) // MAX_POINTS) or 1]
        points = [Point(x(epoch), y(value), epoch, value) for epoch, value in kept if value is not None]
        return Line(label, points, len(values) <= MAX_MARKED)

    epoch_ticks = MaxNLocator(nbins=6, integer=True).tick_values(1, epochs) if epochs > 1 else [1]
    return Chart(
        f"{title} (logarithmic scale)" if logarithmic else title,
        [line(label, values) for label, values in curves.items()],
        [Tick(x(epoch), f"{epoch:g}") for epoch in epoch_ticks if 1 <= epoch <= epochs],
        [Tick(y(level), f"{level:.6g}") for level in levels],
    )


def _axis_limits(low: float, high: float) -> tuple[float, float]:
    """Return limits a little beyond the values, and apart even if the values are equal."""
    margin = 0.04 * (high - low) or abs(low) / 10 or 1.0
    return low - margin, high + margin
