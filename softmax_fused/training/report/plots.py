"""The pictures of a run, drawn on figures of their own: no window, no global state of pyplot."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by colour-blind readers too; right and wrong also differ in mark and line.
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
STYLES = [(BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, ":", "^"), (PURPLE, "-.", "D")]

Array = npt.NDArray[np.generic]


def to_png(figure: Figure, dpi: int = 120) -> bytes:
    """Return the figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def plot_curves(
    title: str, unit: str, losses: Mapping[str, Sequence[float | None]], accuracies: Mapping[str, Sequence[float]]
) -> Figure:
    """Draw losses, None for an epoch without one, and accuracies if there are any, over epochs."""
    figure = Figure(figsize=(11, 4.2) if accuracies else (7, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=None if accuracies else "medium")
    panels = figure.subplots(1, 2 if accuracies else 1, squeeze=False)[0]
    epochs = range(1, len(next(iter(losses.values()))) + 1)
    draw_lines(panels[0], losses, epochs)
    panels[0].set(title="Loss", xlabel="epoch", ylabel=unit)
    if accuracies:
        draw_accuracies(panels[1], accuracies, epochs)
        panels[1].set(title="Accuracy")
    else:
        panels[0].set(yscale="log")
    return figure


def draw_accuracies(axes: "Axes", accuracies: Mapping[str, Sequence[float]], epochs: range) -> None:
    """Draw shares over epochs, in percent."""
    draw_lines(axes, accuracies, epochs)
    axes.set(xlabel="epoch", ylabel="share classified correctly")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def plot_fit(title: str, features: Array, values: Array, weights: Sequence[float], bias: float) -> Figure:
    """Draw values over each feature, less what the other features explain, and the model's line through them."""
    figure = Figure(figsize=(5.2 * len(weights), 4.2), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    slopes = np.array(weights)
    for place, axes in enumerate(figure.subplots(1, len(weights), squeeze=False)[0]):
        x = features[:, place]
        others = features @ slopes - slopes[place] * x
        ends = np.array([x.min(), x.max()])
        axes.plot(x, values - others, ".", color=SKY, ms=4, label="examples")
        line = f"{slopes[place]:.3f} x + {bias:.3f}"
        axes.plot(ends, slopes[place] * ends + bias, color=ORANGE, label=line)
        axes.set(xlabel=f"feature {place + 1}", ylabel="value, less the other features' share")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def draw_lines(axes: "Axes", lines: Mapping[str, Sequence[float | None]], epochs: range) -> None:
    """Draw lines over epochs, distinct in colour, dash and mark; None is no point, all None no line."""
    marks = len(epochs) <= 30
    for place, (label, values) in enumerate(lines.items()):
        colour, dash, mark = STYLES[place % len(STYLES)]
        size = 8 - 1.5 * (place % len(STYLES))  # so that marks on top of each other are all seen
        points = np.array(values, dtype=float)  # None becomes NaN
        if np.isnan(points).all():
            continue
        axes.plot(epochs, points, color=colour, linestyle=dash, marker=mark if marks else None, label=label, ms=size)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()


def plot_confusion(title: str, counts: Array, classes: Sequence[str]) -> Figure:
    """Draw counts of (true, predicted) class, shaded by the share of the true class."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(8.6, 7.6), layout="constrained")
    axes = figure.subplots()
    shades = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(classes))
    slanted: dict[str, Any] = (
        {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, classes)) > 3 else {}
    )
    axes.set_xticks(ticks, classes, **slanted)
    axes.set_yticks(ticks, classes)
    axes.set(title=title, xlabel="predicted class", ylabel="true class")
    for row in ticks:
        for column in ticks:
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=colour, fontsize=9)
    bar = figure.colorbar(shades, ax=axes, shrink=0.8, label="share of the true class")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def plot_predictions(title: str, images: Array, true: Sequence[str], predicted: Sequence[str]) -> Figure:
    """Draw a grid of images, eight in a row, framed and marked as right or wrong."""
    columns = 8
    rows = max(1, -(-len(images) // columns))
    figure = Figure(figsize=(1.75 * columns, 2.1 * rows + 0.7), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
    figure.suptitle(
        f"{title}\nabove each image its true class, then the predicted one: "
        "\N{CHECK MARK} right, blue frame; \N{BALLOT X} wrong, dashed orange frame"
    )
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.set_axis_off()
    for panel, image, name, guess in zip(panels, images, true, predicted, strict=False):
        right = name == guess
        colour, dash, mark = (BLUE, "-", "\N{CHECK MARK}") if right else (ORANGE, "--", "\N{BALLOT X}")
        panel.imshow(image, cmap="gray", vmin=0, vmax=255)
        panel.set_axis_on()
        panel.set(xticks=[], yticks=[])
        for spine in panel.spines.values():
            spine.set(color=colour, linewidth=3, linestyle=dash)
        panel.set_title(f"{name}\n{mark} {guess}", color=colour, fontsize=9)
    return figure
