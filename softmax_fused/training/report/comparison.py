"""What is said of losses trained side by side."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

REFERENCE = "torch"
DIFFERENCE = "largest_difference"  # of a step's loss from torch's, in each epoch
WARM_UP = 10  # steps whose times are not counted


def describe_accuracies(curves: dict[str, list[float]]) -> str:
    """Return in one line who is ahead after the first epoch and after the last."""

    def ranking(epoch: int) -> str:
        ranked = sorted(curves, key=lambda name: -curves[name][epoch])
        text = f"{ranked[0]} {curves[ranked[0]][epoch]:.4f}"
        for ahead, name in pairwise(ranked):
            text += f" {'=' if curves[ahead][epoch] == curves[name][epoch] else '>'} {name} {curves[name][epoch]:.4f}"
        return text

    epochs = len(next(iter(curves.values())))
    last = f"; after epoch {epochs}: {ranking(-1)}" if epochs > 1 else ""
    return f"test accuracy after epoch 1: {ranking(0)}{last}"


def largest_differences(ours: list[Tensor], theirs: list[Tensor]) -> list[float]:
    """Return the largest distance between two losses of the same step, by epoch."""
    return [float((one - other).abs().max()) for one, other in zip(ours, theirs, strict=True)]


def differ(losses: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether any loss was at any step another than torch's: whether there are differences to show."""
    return any(any(loss.get(DIFFERENCE) or []) for loss in losses.values())


def describe_identical(losses: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a sentence on the losses that never differed from torch's, empty where there are none."""
    distances = {name: loss.get(DIFFERENCE) for name, loss in losses.items() if name != REFERENCE}
    names = [name for name, values in distances.items() if values and not any(values)]
    return f"{', '.join(names)}: identical to torch's loss to the last bit at every step" if names else ""


def microseconds(seconds: list[float]) -> dict[str, float]:
    """Return median, 20th and 80th percentile, without the first steps."""
    times = torch.tensor(seconds[WARM_UP:] or seconds, dtype=torch.float64) * 1e6
    p20, middle, p80 = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return {"p20": p20, "median": middle, "p80": p80}
