"""The activations of an MLP and their slopes, as numbers and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib.figure import Figure
from torch import Tensor

from softmax_fused.training.models.architectures import ACTIVATIONS
from softmax_fused.training.report.plots import BLUE, ORANGE, to_png
from softmax_fused.training.runs.checkpoint import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REACH = 8.0  # the picture's inputs are from -REACH to REACH
POINTS = 1601  # an odd number, so that 0 is among them
PLACES = (-REACH, -2.0, 0.0, 2.0, REACH)
JUMP = 0.5  # a larger step between neighbouring points is a jump, through which no line is drawn

FORMULAS = {
    "relu": ("max(0, x)", "1 for x > 0, else 0"),
    "sigmoid": ("1 / (1 + exp(-x))", "s (1 - s) for s = sigmoid(x)"),
    "tanh": ("(1 - exp(-2x)) / (1 + exp(-2x))", "1 - tanh(x)^2"),
}


def slopes(name: str, inputs: Tensor) -> Tensor:
    """Return an activation's derivative at every input, by autograd.

    Args:
        name: One of `ACTIVATIONS`.
        inputs: Any shape, a floating-point type.

    Returns:
        The same shape.

    Example:
        >>> slopes("sigmoid", torch.tensor([0.0, 2.0]))
        tensor([0.2500, 0.1050])
    """
    inputs = inputs.detach().requires_grad_()
    _, function = ACTIVATIONS[name]
    (slope,) = torch.autograd.grad(function(inputs).sum(), inputs)
    return slope


def describe_activations() -> list[str]:
    """Return a line of headings, then a line for each activation: its slope at some places, and the largest."""
    places = torch.tensor(PLACES, dtype=torch.float64)
    lines = [f"{'slope at':10}" + "".join(f"{place:>10g}" for place in PLACES) + f"{'largest':>10}"]
    for name in ACTIVATIONS:
        values = [*slopes(name, places).tolist(), slopes(name, _inputs()).max().item()]
        lines.append(f"{name:10}" + "".join(f"{value:>10.3g}" for value in values))
    return lines


def draw_activations(path: Path) -> None:
    """Write a picture of the activations above their slopes."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(2, len(ACTIVATIONS), sharex=True)
    inputs = _inputs()
    for (name, (_, function)), (above, below) in zip(ACTIVATIONS.items(), panels.T, strict=True):
        formula, derivative = FORMULAS[name]
        _draw(above, inputs, function(inputs), BLUE, f"{name}\n{formula}")
        _draw(below, inputs, slopes(name, inputs), ORANGE, f"slope of {name}\n{derivative}")
        below.set(xlabel="input x", ylim=(-0.05, 1.08))  # one scale, so that heights can be compared
    panels[0, 0].set_ylabel("output")
    panels[1, 0].set_ylabel("slope")
    write_atomically(path, to_png(figure))


def _inputs() -> Tensor:
    return torch.linspace(-REACH, REACH, POINTS, dtype=torch.float64)


def _draw(axes: "Axes", inputs: Tensor, values: Tensor, colour: str, title: str) -> None:
    x, y = _split_at_jumps(inputs, values)
    axes.plot(x, y, color=colour, linewidth=2)
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.3)


def _split_at_jumps(inputs: Tensor, values: Tensor) -> tuple[Sequence[float], Sequence[float]]:
    """Return both with NaN between the points of a jump, so that a line through them is interrupted there."""
    after = (values.diff().abs() > JUMP).nonzero().flatten() + 1
    places = after.tolist()
    x, y = inputs.tolist(), values.tolist()
    for place in reversed(places):
        x.insert(place, float("nan"))
        y.insert(place, float("nan"))
    return x, y
