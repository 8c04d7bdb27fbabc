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


def plot_curves(title: str, train_loss: Sequence[float], accuracies: dict[str, Sequence[float]]) -> Figure:
    """Draw training loss, and accuracy on each set, over epochs."""
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


def draw_lines(axes: "Axes", lines: Mapping[str, Sequence[float] | Array], epochs: range) -> None:
    """Draw lines over epochs, distinct in colour, dash and mark."""
    marks = len(epochs) <= 30
    for place, (label, values) in enumerate(lines.items()):
        colour, dash, mark = STYLES[place % len(STYLES)]
        size = 8 - 1.5 * (place % len(STYLES))  # so that marks on top of each other are all seen
        axes.plot(epochs, values, color=colour, linestyle=dash, marker=mark if marks else None, label=label, ms=size)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()


def plot_comparison(title: str, losses: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw loss curves, their distance from torch's, and microseconds, of losses trained side by side."""
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    figure.suptitle(title)
    curves, distances, times = figure.subplots(1, 3)
    curve_of = {name: loss["train_loss"] for name, loss in losses.items()}
    epochs = range(1, len(next(iter(curve_of.values()))) + 1)
    draw_lines(curves, curve_of, epochs)
    curves.set(title="Training loss", xlabel="epoch", ylabel="mean cross-entropy (nats)")
    _draw_distances(distances, losses, epochs)
    _draw_times(times, losses)
    return figure


def _draw_distances(axes: "Axes", losses: Mapping[str, Mapping[str, Any]], epochs: range) -> None:
    """Draw distances on a log axis, which has no place for zeros: the legend names the losses that are nothing else."""
    axes.set(title="Largest difference of a step's loss from torch's", xlabel="epoch", ylabel="nats")
    distances = {name: np.array(loss["largest_difference"] or [], dtype=float) for name, loss in losses.items()}
    seen = np.concatenate([values[values > 0] for values in distances.values()])
    if not len(seen):
        axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes)
        return
    labels = {name: name if values.any() else f"{name} (0 throughout)" for name, values in distances.items()}
    draw_lines(axes, {labels[name]: np.where(values > 0, values, np.nan) for name, values in distances.items()}, epochs)
    low, high = np.floor(np.log10(seen.min())), np.floor(np.log10(seen.max())) + 1
    axes.set(yscale="log", ylim=(10.0**low, 10.0**high))


def _draw_times(axes: "Axes", losses: Mapping[str, Mapping[str, Any]]) -> None:
    parts = {"loss_us": ("loss, forward + backward", BLUE, ""), "step_us": ("whole step", SKY, "//")}
    for offset, (key, (label, colour, hatch)) in zip((-0.2, 0.2), parts.items(), strict=True):
        medians = [loss[key]["median"] for loss in losses.values()]
        bars = axes.bar(np.arange(len(losses)) + offset, medians, 0.36, label=label, color=colour, hatch=hatch)
        axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_xticks(range(len(losses)), list(losses))
    axes.margins(y=0.25)
    axes.set(title="Median time", xlabel="loss", ylabel="microseconds")
    axes.legend(loc="upper center", ncols=2)


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
