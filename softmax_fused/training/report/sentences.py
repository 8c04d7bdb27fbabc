"""Sentences and lines about results: of one epoch, of a regression's parameters, of losses trained side by side."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from softmax_fused.training.wording import format_decimal

REFERENCE_LOSS = "torch"
DIFFERENCE = "largest_difference"  # the key of each epoch's largest difference of a step's loss from torch's


def describe_epoch(results: dict[str, float], images: int) -> str:
    """Return the results of one epoch in one line, units included."""
    seconds = results["epoch_seconds"]
    accuracies, unit = "", "examples"
    if "test_accuracy" in results:
        accuracies = f"  accuracy train {results['train_accuracy']:.4f} test {results['test_accuracy']:.4f}"
        unit = "images"
    train, test = (
        format_decimal(results[name], 4) if unit == "images" else f"{results[name]:.3g}"
        for name in ("train_loss", "test_loss")
    )
    return f"train loss {train}  test loss {test}{accuracies}  {seconds:.2f} s  {images / seconds:,.0f} {unit}/s"


def describe_parameters(parameters: dict[str, Any]) -> str:
    """Return a linear model's weights and bias, and those that generated the data."""

    def text(weights: list[float], bias: float, digits: int) -> str:
        numbers = ", ".join(format_decimal(weight, digits) for weight in weights)
        return f"weights {numbers}  bias {format_decimal(bias, digits)}"

    found = text(parameters["weights"], parameters["bias"], 4)
    return f"{found}  (made with {text(parameters['true_weights'], parameters['true_bias'], 1)})"


def describe_accuracies(curves: dict[str, list[float]]) -> str:
    """Return in one line the losses in the order of their accuracies, after the first and after the last epoch."""

    def ranking(epoch: int) -> str:
        ranked = sorted(curves, key=lambda name: -curves[name][epoch])
        text = f"{ranked[0]} {curves[ranked[0]][epoch]:.4f}"
        for better, name in pairwise(ranked):
            text += f" {'=' if curves[better][epoch] == curves[name][epoch] else '>'} {name} {curves[name][epoch]:.4f}"
        return text

    epochs = len(next(iter(curves.values())))
    last = f"; after epoch {epochs}: {ranking(-1)}" if epochs > 1 else ""
    return f"test accuracy after epoch 1: {ranking(0)}{last}"


def any_difference(losses: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether any loss differed from torch's at any step."""
    return any(any(loss.get(DIFFERENCE) or []) for loss in losses.values())


def describe_identical(losses: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a sentence on the losses that never differed from torch's; empty where there are none."""
    differences = {name: loss.get(DIFFERENCE) for name, loss in losses.items() if name != REFERENCE_LOSS}
    names = [name for name, values in differences.items() if values and not any(values)]
    return f"{', '.join(names)}: identical to torch's loss to the last bit at every step" if names else ""
