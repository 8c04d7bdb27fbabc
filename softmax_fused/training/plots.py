"""The pictures of a run, drawn on figures of their own: no window, no global state of pyplot."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by colour-blind readers too; right and wrong also differ in mark and line.
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
STYLES = [(BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, ":", "^"), (PURPLE, "-.", "D")]

Array = npt.NDArray[np.generic]


def to_png(figure: Figure, dpi: int = 120) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def plot_curves(title: str, train_loss: Sequence[float], accuracies: dict[str, Sequence[float]]) -> Figure:
    """Training loss, and accuracy on each set, over epochs."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    epochs = range(1, len(train_loss) + 1)
    draw_lines(left, {"training set": train_loss}, epochs)
    left.set(title="Loss", xlabel="epoch", ylabel="mean cross-entropy (nats)")
    draw_lines(right, accuracies, epochs)
    right.set(title="Accuracy", xlabel="epoch", ylabel="share classified correctly")
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    return figure


def draw_lines(axes: "Axes", lines: dict[str, Sequence[float]], epochs: range) -> None:
    """Lines over epochs, distinct in colour, dash and mark."""
    marks = len(epochs) <= 30
    for (label, values), (colour, dash, mark) in zip(lines.items(), STYLES * len(lines), strict=False):
        axes.plot(epochs, values, color=colour, linestyle=dash, marker=mark if marks else None, label=label, ms=5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()


def plot_comparison(title: str, losses: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Loss curves, their distance from torch's, and microseconds, of losses trained side by side."""
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    figure.suptitle(title)
    curves, distances, times = figure.subplots(1, 3)
    curve_of = {name: loss["train_loss"] for name, loss in losses.items()}
    epochs = range(1, len(next(iter(curve_of.values()))) + 1)
    draw_lines(curves, curve_of, epochs)
    curves.set(title="Training loss", xlabel="epoch", ylabel="mean cross-entropy (nats)")
    far = {name: loss["largest_difference"] for name, loss in losses.items() if any(loss["largest_difference"] or [])}
    if far:
        draw_lines(distances, far, epochs)
        distances.set(yscale="log", ylabel="nats")
    else:
        distances.text(0.5, 0.5, "none", ha="center", va="center", transform=distances.transAxes)
    distances.set(title="Largest difference of a step's loss from torch's", xlabel="epoch")
    _draw_times(times, losses)
    return figure


def _draw_times(axes: "Axes", losses: Mapping[str, Mapping[str, Any]]) -> None:
    parts = {"loss_us": ("loss, forward + backward", BLUE, ""), "step_us": ("whole step", SKY, "//")}
    for offset, (key, (label, colour, hatch)) in zip((-0.2, 0.2), parts.items(), strict=True):
        middle = np.array([loss[key]["median"] for loss in losses.values()])
        spread = np.array(
            [
                [loss[key]["median"] - loss[key]["p20"], loss[key]["p80"] - loss[key]["median"]]
                for loss in losses.values()
            ]
        ).T
        bars = axes.bar(
            np.arange(len(losses)) + offset,
            middle,
            0.36,
            yerr=spread,
            capsize=3,
            label=label,
            color=colour,
            hatch=hatch,
        )
        axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_xticks(range(len(losses)), list(losses))
    axes.margins(y=0.25)
    axes.set(title="Time a step: median, 20th to 80th percentile", xlabel="loss", ylabel="microseconds")
    axes.legend(loc="upper center", ncols=2)


def plot_confusion(title: str, counts: Array, classes: Sequence[str]) -> Figure:
    """Counts of (true, predicted) class, shaded by the share of the true class."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(8.6, 7.6), layout="constrained")
    axes = figure.subplots()
    shades = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(classes))
    axes.set_xticks(ticks, classes, rotation=45, ha="right", rotation_mode="anchor")
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
    """A grid of images, eight in a row, framed and marked as right or wrong."""
    columns = 8
    rows = max(1, -(-len(images) // columns))
    figure = Figure(figsize=(1.75 * columns, 2.35 * rows + 0.7), layout="constrained")
    figure.suptitle(f"{title}\nblue frame, \N{CHECK MARK}: right    orange dashed frame, \N{BALLOT X}: wrong")
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
        panel.set_title(f"true: {name}\n{mark} {guess}", color=colour, fontsize=9)
    return figure
