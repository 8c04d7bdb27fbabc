"""The figures in a run folder, drawn from the record of the run."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from softmax_fused.training.data.datasets import Split
from softmax_fused.training.files import write_atomically
from softmax_fused.training.models.evaluation import predict_classes
from softmax_fused.training.models.learner import Learner
from softmax_fused.training.models.losses import LOSSES
from softmax_fused.training.report.plots import plot_confusion, plot_curves, plot_fit, plot_predictions, to_png
from softmax_fused.training.report.records import Metrics
from softmax_fused.training.wording import plural

GALLERY_SIZE = 16  # images classified right, and as many classified wrong


def draw_figures(folder: Path, metrics: Metrics, test: Split, learner: Learner) -> None:
    """Write curves.png; for classes confusion.png and predictions.png, for a regression fit.png."""
    title, unit = run_title(metrics), LOSSES[metrics["config"]["loss"]].unit
    classes = metrics["dataset"]["classes"]
    losses, accuracies = (
        {"training set, during the epoch": metrics[f"train_{name}"], "test set, after it": metrics[f"test_{name}"]}
        if f"train_{name}" in metrics
        else {}
        for name in ("loss", "accuracy")
    )
    write_atomically(folder / "curves.png", to_png(plot_curves(title, unit, losses, accuracies)))
    if not classes:
        draw_fit(folder / "fit.png", metrics, test)
        return
    confusion = plot_confusion(f"{title}\ntest set", np.array(metrics["confusion_matrix"]), classes)
    write_atomically(folder / "confusion.png", to_png(confusion))
    draw_gallery(folder / "predictions.png", title, classes, test, predict_classes(learner, test))


def draw_fit(path: Path, metrics: Metrics, test: Split) -> None:
    """Draw a linear model's lines through the test examples."""
    found = metrics["parameters"]
    features, values = test.images.cpu().numpy(), test.labels.cpu().numpy()
    figure = plot_fit(f"{run_title(metrics)}, test set", features, values, found["weights"], found["bias"])
    write_atomically(path, to_png(figure))


def draw_gallery(path: Path, title: str, classes: list[str], test: Split, predicted: Tensor) -> None:
    """Draw the first test images that were classified right, then the first that were classified wrong."""
    right, wrong = ((predicted == test.labels) == answer for answer in (True, False))
    rows = torch.cat([group.nonzero().flatten()[:GALLERY_SIZE] for group in (right, wrong)])
    title = f"{title}\n{describe_gallery(int(right.sum()), int(wrong.sum()))}"
    true = [classes[i] for i in test.labels[rows].tolist()]
    guesses = [classes[i] for i in predicted[rows].tolist()]
    write_atomically(path, to_png(plot_predictions(title, test.images[rows].cpu().numpy(), true, guesses)))


def describe_gallery(right: int, wrong: int) -> str:
    """Return the accuracy on the whole test set, and which of its images a gallery shows: not a random sample."""
    total = right + wrong
    images = f"{total:,} {plural('image', total)}"
    shown = min(right, GALLERY_SIZE), min(wrong, GALLERY_SIZE)
    return (
        f"test set: {right:,} of {images} classified right, an accuracy of {right / total:.2%}\n"
        f"shown, in the test set's order: {_describe_first(right)} right, then {_describe_first(wrong)} wrong; "
        f"{shown[0]} of these {sum(shown)} right, by choice"
    )


def _describe_first(number: int) -> str:
    """Return which of `number` images a gallery shows."""
    if number > GALLERY_SIZE:
        return f"the first {GALLERY_SIZE} of {number:,}"
    return {0: "none", 1: "the only one"}.get(number, f"all {number}")


def run_title(metrics: Metrics) -> str:
    """Return what was trained on what; a line above it warns where other data replace those asked for."""
    config, data = metrics["config"], metrics["dataset"]
    warning = "STAND-IN DATA: those asked for were not available\n" if data["fallback"] else ""
    parts = [f"{config['model']} on {data['name']}"]
    parts += [config["activation"]] * bool(config.get("activation"))
    parts += [f"{config.get('loss')} loss"] * ("loss" in config)
    parts += [f"logits x {config['logit_scale']:g}"] * (config.get("logit_scale", 1) != 1)
    soft_labels = {name: config.get(name) for name in ("label_smoothing", "mixup")}
    parts += [f"{name.replace('_', ' ')} {value:g}" for name, value in soft_labels.items() if value]
    parts += ["one-hot targets"] * config.get("one_hot", False)
    return warning + ", ".join([*parts, config["optimizer"], f"lr {config['lr']:g}", f"batch {config['batch_size']}"])
