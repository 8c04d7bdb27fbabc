"""The figures of runs and comparisons. Each is a figure of its own: no window, and no global state of pyplot."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from softmax_fused.training.report.sentences import any_difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart; curves also differ in dash and marker.
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
STYLES = [(BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, ":", "^"), (PURPLE, "-.", "D")]
MAX_MARKED = 30  # epochs; curves of more have no markers
LOG_SCALE_RATIO = 1000  # of the largest to the smallest value; from here on, small ones would all lie on a linear axis
GALLERY_COLUMNS = 8

Array = npt.NDArray[np.generic]


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of a size in inches."""
    from matplotlib.figure import Figure  # matplotlib is slow to import, and --help does without it

    return Figure(figsize=(width, height), layout="constrained")


def to_png(figure: "Figure", dpi: int = 120) -> bytes:
    """Return the figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def plot_curves(
    title: str, unit: str, losses: Mapping[str, Sequence[float | None]], accuracies: Mapping[str, Sequence[float]]
) -> "Figure":
    """Draw losses over epochs, None for an epoch without one, and accuracies if there are any."""
    figure = new_figure(11 if accuracies else 7, 4.2)
    figure.suptitle(title, fontsize=None if accuracies else "medium")
    panels = figure.subplots(1, 2 if accuracies else 1, squeeze=False)[0]
    epochs = range(1, len(next(iter(losses.values()))) + 1)
    draw_curves(panels[0], losses, epochs)
    panels[0].set(title="Loss", xlabel="epoch", ylabel=unit)
    if accuracies:
        draw_accuracies(panels[1], accuracies, epochs)
        panels[1].set(title="Accuracy")
    else:
        panels[0].set(yscale="log")
    return figure


def draw_curves(axes: "Axes", curves: Mapping[str, Sequence[float | None]], epochs: range) -> None:
    """Draw curves over epochs, distinct in colour, dash and marker; None is no point, and a curve of None no curve."""
    from matplotlib.ticker import MaxNLocator

    for number, (label, values) in enumerate(curves.items()):
        colour, dash, marker = STYLES[number % len(STYLES)]
        size = 8 - 1.5 * (number % len(STYLES))  # markers on top of one another stay visible
        points = np.array(values, dtype=float)  # None becomes NaN
        if np.isnan(points).all():
            continue
        marker = marker if len(epochs) <= MAX_MARKED else ""
        axes.plot(epochs, points, color=colour, linestyle=dash, marker=marker, label=label, ms=size)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()


def draw_accuracies(axes: "Axes", accuracies: Mapping[str, Sequence[float]], epochs: range) -> None:
    """Draw accuracies over epochs, in percent."""
    from matplotlib.ticker import PercentFormatter

    draw_curves(axes, accuracies, epochs)
    axes.set(xlabel="epoch", ylabel="share classified correctly")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def plot_fit(title: str, features: Array, values: Array, weights: Sequence[float], bias: float) -> "Figure":
    """Draw a linear model's line over each feature, and the values less the contributions of the other features."""
    figure = new_figure(5.2 * len(weights), 4.2)
    figure.suptitle(title, fontsize="medium")
    slopes = np.array(weights)
    for feature, axes in enumerate(figure.subplots(1, len(weights), squeeze=False)[0]):
        x = features[:, feature]
        others = features @ slopes - slopes[feature] * x
        ends = np.array([x.min(), x.max()])
        axes.plot(x, values - others, ".", color=SKY, ms=4, label="examples")
        line = f"{slopes[feature]:.3f} x + {bias:.3f}"
        axes.plot(ends, slopes[feature] * ends + bias, color=ORANGE, label=line)
        axes.set(xlabel=f"feature {feature + 1}", ylabel="value, less the other features' share")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def plot_confusion(title: str, counts: Array, classes: Sequence[str]) -> "Figure":
    """Draw counts of (target, predicted) class, shaded by their share of the target class."""
    from matplotlib.ticker import PercentFormatter

    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = new_figure(8.6, 7.6)
    axes = figure.subplots()
    shading = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(classes))
    slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(ticks, classes, **(slanted if max(map(len, classes)) > 3 else {}))
    axes.set_yticks(ticks, classes)
    axes.set(title=title, xlabel="predicted class", ylabel="true class")
    for (row, column), share in np.ndenumerate(shares):
        colour = "white" if share > 0.5 else "black"
        axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=colour, fontsize=9)
    bar = figure.colorbar(shading, ax=axes, shrink=0.8, label="share of the true class")
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    return figure


def plot_predictions(title: str, images: Array, true: Sequence[str], predicted: Sequence[str]) -> "Figure":
    """Draw a grid of images, each framed and marked as classified right or wrong."""
    rows = max(1, -(-len(images) // GALLERY_COLUMNS))
    figure = new_figure(1.75 * GALLERY_COLUMNS, 2.1 * rows + 0.7)
    set_padding(figure, w_pad=0.08, h_pad=0.06)
    figure.suptitle(
        f"{title}\nabove each image its true class, then the predicted one: "
        "\N{CHECK MARK} right, blue frame; \N{BALLOT X} wrong, dashed orange frame"
    )
    panels = list(figure.subplots(rows, GALLERY_COLUMNS, squeeze=False).flat)
    for panel in panels:
        panel.set_axis_off()
    for panel, image, name, guess in zip(panels, images, true, predicted, strict=False):
        colour, dash, mark = (BLUE, "-", "\N{CHECK MARK}") if name == guess else (ORANGE, "--", "\N{BALLOT X}")
        panel.imshow(image, cmap="gray", vmin=0, vmax=255)
        panel.set_axis_on()
        panel.set(xticks=[], yticks=[])
        for spine in panel.spines.values():
            spine.set(color=colour, linewidth=3, linestyle=dash)
        panel.set_title(f"{name}\n{mark} {guess}", color=colour, fontsize=9)
    return figure


def set_padding(figure: "Figure", **padding: float) -> None:
    """Set the space around the axes of a figure, in inches: `w_pad` beside them, `h_pad` above and below."""
    engine = figure.get_layout_engine()
    assert engine is not None  # new_figure chose one
    engine.set(**padding)


def plot_comparison(title: str, losses: Mapping[str, Mapping[str, Any]]) -> "Figure":
    """Draw the curves and times of losses trained side by side, and where they differ from torch's loss, how far."""
    differ = any_difference(losses)
    figure = new_figure(19 if differ else 14.5, 4.6)
    figure.suptitle(title)
    curves, accuracies, times, *rest = figure.subplots(1, 4 if differ else 3)
    epochs = range(1, len(next(iter(losses.values()))["train_loss"]) + 1)
    units = {loss["unit"] for loss in losses.values()}
    draw_curves(curves, {name: loss["train_loss"] for name, loss in losses.items()}, epochs)
    unit = units.pop() if len(units) == 1 else "each loss in its own unit"
    curves.set(title="Training loss", xlabel="epoch", ylabel=unit)
    draw_accuracies(accuracies, {name: loss["test_accuracy"] for name, loss in losses.items()}, epochs)
    accuracies.set(title="Test accuracy")
    _draw_times(times, losses)
    if differ:
        _draw_differences(rest[0], losses, epochs)
    return figure


def _draw_differences(axes: "Axes", losses: Mapping[str, Mapping[str, Any]], epochs: range) -> None:
    """Draw differences from torch's loss, on a linear axis from 0 or, where they differ widely, on a logarithmic one.

    A loss without any difference takes part without a curve, so that each loss has the same colour in all panels.
    """
    differences = {name: loss["largest_difference"] or [] for name, loss in losses.items()}
    curves = {name: values if any(values) else [None] * len(epochs) for name, values in differences.items()}
    draw_curves(axes, curves, epochs)
    drawn = [value for values in differences.values() if any(values) for value in values]
    if min(drawn) > 0 and max(drawn) / min(drawn) > LOG_SCALE_RATIO:
        axes.set(yscale="log")
    else:
        axes.set(ylim=(0, 1.1 * max(drawn)))
        axes.yaxis.set_major_formatter("{x:.3g}")
    axes.set(title="Largest difference of a step's loss from torch's", xlabel="epoch", ylabel="nats")


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
