"""From a run's record to the pictures in its folder."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from softmax_fused.training.data.datasets import Split
from softmax_fused.training.models.learner import Learner
from softmax_fused.training.models.loop import predict_classes
from softmax_fused.training.models.losses import LOSSES
from softmax_fused.training.report.plots import plot_confusion, plot_curves, plot_fit, plot_predictions, to_png
from softmax_fused.training.runs.checkpoint import write_atomically
from softmax_fused.training.runs.record import Metrics
from softmax_fused.training.wording import plural

SHOWN = 16  # right ones and as many wrong ones


def draw_figures(folder: Path, metrics: Metrics, test: Split, learner: Learner) -> None:
    """Write curves.png, and confusion.png and predictions.png, or for a regression fit.png."""
    title, unit = run_title(metrics), LOSSES[metrics["config"]["loss"]].unit
    losses = {"training set, during the epoch": metrics["train_loss"], "test set, after it": metrics["test_loss"]}
    classes = metrics["dataset"]["classes"]
    if not classes:
        write_atomically(folder / "curves.png", to_png(plot_curves(title, unit, losses, {})))
        write_fit(folder / "fit.png", metrics, test)
        return
    accuracies = {
        "training set, during the epoch": metrics["train_accuracy"],
        "test set, after it": metrics["test_accuracy"],
    }
    pictures = {
        "curves.png": plot_curves(title, unit, losses, accuracies),
        "confusion.png": plot_confusion(f"{title}\ntest set", np.array(metrics["confusion_matrix"]), classes),
    }
    for name, figure in pictures.items():
        write_atomically(folder / name, to_png(figure))
    write_gallery(folder / "predictions.png", title, classes, test, predict_classes(learner, test))


def write_fit(path: Path, metrics: Metrics, test: Split) -> None:
    """Draw a linear model's lines through the test examples."""
    found = metrics["parameters"]
    features, values = test.images.cpu().numpy(), test.labels.cpu().numpy()
    figure = plot_fit(f"{run_title(metrics)}, test set", features, values, found["weights"], found["bias"])
    write_atomically(path, to_png(figure))


def write_gallery(path: Path, title: str, classes: list[str], test: Split, predicted: Tensor) -> None:
    """Draw the first test images that were classified right, then the first that were not."""
    right, wrong = ((predicted == test.labels) == answer for answer in (True, False))
    rows = torch.cat([group.nonzero().flatten()[:SHOWN] for group in (right, wrong)])
    title = f"{title}\n{describe_choice(int(right.sum()), int(wrong.sum()))}"
    true = [classes[i] for i in test.labels[rows].tolist()]
    guesses = [classes[i] for i in predicted[rows].tolist()]
    write_atomically(path, to_png(plot_predictions(title, test.images[rows].cpu().numpy(), true, guesses)))


def describe_choice(right: int, wrong: int) -> str:
    """Return the accuracy on the whole test set, and which of its images a gallery shows: they are no random sample."""
    images = f"{right + wrong:,} {plural('image', right + wrong)}"
    shown = min(right, SHOWN), min(wrong, SHOWN)
    return (
        f"test set: {right:,} of {images} classified right, an accuracy of {right / (right + wrong):.2%}\n"
        f"shown, in the test set's order: {_first(right)} right, then {_first(wrong)} wrong; "
        f"{shown[0]} of these {sum(shown)} right, by choice"
    )


def _first(number: int) -> str:
    """Return which of a number of images a gallery shows."""
    if number > SHOWN:
        return f"the first {SHOWN} of {number:,}"
    return {0: "none", 1: "the only one"}.get(number, f"all {number}")


def run_title(metrics: Metrics) -> str:
    """Return what was trained on what; a line above it warns of stand-in data."""
    config, data = metrics["config"], metrics["dataset"]
    warning = "STAND-IN DATA: those asked for were not available\n" if data["fallback"] else ""
    parts = [f"{config['model']} on {data['name']}"]
    parts += [config["activation"]] * bool(config.get("activation"))
    parts += [f"{config.get('loss')} loss"] * ("loss" in config)
    parts += [f"logits x {config['logit_scale']:g}"] * (config.get("logit_scale", 1) != 1)
    soft = {name: config.get(name) for name in ("label_smoothing", "mixup")}
    parts += [f"{name.replace('_', ' ')} {value:g}" for name, value in soft.items() if value]
    parts += ["one-hot targets"] * config.get("one_hot", False)
    return warning + ", ".join([*parts, config["optimizer"], f"lr {config['lr']:g}", f"batch {config['batch_size']}"])
