"""The activations of an MLP and their slopes, as numbers and as a figure."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from softmax_fused.training.files import write_atomically
from softmax_fused.training.models.architectures import ACTIVATIONS
from softmax_fused.training.report.plots import BLUE, ORANGE, Array, new_figure, to_png

LIMIT = 8.0  # curves are drawn from -LIMIT to LIMIT
POINTS = 1601  # of a curve; an odd number, so that 0 is among them
TABLE_INPUTS = (-LIMIT, -2.0, 0.0, 2.0, LIMIT)
JUMP = 0.5  # curves are interrupted where neighbouring points differ by more

FORMULAS = {
    "relu": ("max(0, x)", "1 for x > 0, else 0"),
    "sigmoid": ("1 / (1 + exp(-x))", "s (1 - s) for s = sigmoid(x)"),
    "tanh": ("(1 - exp(-2x)) / (1 + exp(-2x))", "1 - tanh(x)^2"),
}


def slopes(name: str, inputs: Tensor) -> Tensor:
    """Return the derivative of an activation at every input, computed by autograd.

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
    """Return a line of headings, then a line for each activation: its slope at some inputs, and the largest slope."""
    inputs = torch.tensor(TABLE_INPUTS, dtype=torch.float64)
    lines = [f"{'slope at':10}" + "".join(f"{place:>10g}" for place in TABLE_INPUTS) + f"{'largest':>10}"]
    for name in ACTIVATIONS:
        values = [*slopes(name, inputs).tolist(), slopes(name, _curve_inputs()).max().item()]
        lines.append(f"{name:10}" + "".join(f"{value:>10.3g}" for value in values))
    return lines


def draw_activations(path: Path) -> None:
    """Write a figure of the activations above their slopes."""
    figure, inputs = new_figure(11, 6), _curve_inputs()
    panels = figure.subplots(2, len(ACTIVATIONS), sharex=True)
    for column, (name, (_, function)) in enumerate(ACTIVATIONS.items()):
        formula, derivative = FORMULAS[name]
        curves = (
            (BLUE, function(inputs), f"{name}\n{formula}"),
            (ORANGE, slopes(name, inputs), f"slope of {name}\n{derivative}"),
        )
        for axes, (colour, values, title) in zip(panels[:, column], curves, strict=True):
            axes.plot(*_split_at_jumps(inputs, values), color=colour, linewidth=2)
            axes.set_title(title, fontsize="medium")
            axes.grid(alpha=0.3)
        panels[1, column].set(xlabel="input x", ylim=(-0.05, 1.08))  # one scale, so that slopes can be compared
    panels[0, 0].set_ylabel("output")
    panels[1, 0].set_ylabel("slope")
    write_atomically(path, to_png(figure))


def _curve_inputs() -> Tensor:
    return torch.linspace(-LIMIT, LIMIT, POINTS, dtype=torch.float64)


def _split_at_jumps(inputs: Tensor, values: Tensor) -> tuple[Array, Array]:
    """Return inputs and values with NaN inserted at each jump, where a curve through the points is interrupted."""
    after = (values.diff().abs() > JUMP).nonzero().flatten() + 1
    x, y = (np.insert(tensor.numpy(), after.numpy(), np.nan) for tensor in (inputs, values))
    return x, y
