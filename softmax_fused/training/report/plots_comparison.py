"""The picture of losses trained side by side."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from softmax_fused.training.report.charts import WIDE
from softmax_fused.training.report.comparison import differ
from softmax_fused.training.report.plots import BLUE, SKY, draw_accuracies, draw_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_comparison(title: str, losses: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw loss curves, accuracies, microseconds, and the losses' differences from torch's where there are any."""
    apart = differ(losses)
    figure = Figure(figsize=(19 if apart else 14.5, 4.6), layout="constrained")
    figure.suptitle(title)
    curves, accuracies, times, *rest = figure.subplots(1, 4 if apart else 3)
    epochs = range(1, len(next(iter(losses.values()))["train_loss"]) + 1)
    units = {loss["unit"] for loss in losses.values()}
    draw_lines(curves, {name: loss["train_loss"] for name, loss in losses.items()}, epochs)
    own = "each loss in its own unit"
    curves.set(title="Training loss", xlabel="epoch", ylabel=units.pop() if len(units) == 1 else own)
    draw_accuracies(accuracies, {name: loss["test_accuracy"] for name, loss in losses.items()}, epochs)
    accuracies.set(title="Test accuracy")
    _draw_times(times, losses)
    if apart:
        _draw_distances(rest[0], losses, epochs)
    return figure


def _draw_distances(axes: "Axes", losses: Mapping[str, Mapping[str, Any]], epochs: range) -> None:
    """Draw the differences of the losses that have any, from 0 on, or on a log axis where they are far apart.

    The other losses keep their places without a line, so that each has the colour of the panels beside.
    """
    distances = {name: loss["largest_difference"] or [] for name, loss in losses.items()}
    draw_lines(
        axes, {name: values if any(values) else [None] * len(epochs) for name, values in distances.items()}, epochs
    )
    every = [value for values in distances.values() if any(values) for value in values]
    if min(every) > 0 and max(every) / min(every) > WIDE:
        axes.set(yscale="log")
    else:
        axes.set(ylim=(0, 1.1 * max(every)))
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
