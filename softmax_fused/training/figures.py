"""From a run's record to the pictures in its folder."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from softmax_fused.training.checkpoint import write_atomically
from softmax_fused.training.data import Split
from softmax_fused.training.plots import plot_confusion, plot_curves, plot_predictions, to_png
from softmax_fused.training.record import Metrics

SHOWN = 16  # right ones and as many wrong ones


def draw_figures(folder: Path, metrics: Metrics, test: Split, predicted: Tensor) -> None:
    """Write curves.png, confusion.png and predictions.png."""
    title = run_title(metrics)
    accuracies = {
        "training set, during the epoch": metrics["train_accuracy"],
        "test set, after it": metrics["test_accuracy"],
    }
    classes = metrics["dataset"]["classes"]
    pictures = {
        "curves.png": plot_curves(title, metrics["train_loss"], accuracies),
        "confusion.png": plot_confusion(f"{title}\ntest set", np.array(metrics["confusion_matrix"]), classes),
    }
    for name, figure in pictures.items():
        write_atomically(folder / name, to_png(figure))
    write_gallery(folder / "predictions.png", f"{title}, test set", classes, test, predicted)


def write_gallery(path: Path, title: str, classes: list[str], test: Split, predicted: Tensor) -> None:
    """Draw the first test images that were classified right, then the first that were not."""
    right = predicted == test.labels
    rows = torch.cat([right.nonzero().flatten()[:SHOWN], (~right).nonzero().flatten()[:SHOWN]])
    true = [classes[i] for i in test.labels[rows].tolist()]
    guesses = [classes[i] for i in predicted[rows].tolist()]
    write_atomically(path, to_png(plot_predictions(title, test.images[rows].cpu().numpy(), true, guesses)))


def run_title(metrics: Metrics) -> str:
    """Return what was trained on what; a line above it warns of stand-in data."""
    config, data = metrics["config"], metrics["dataset"]
    warning = "STAND-IN DATA: those asked for were not available\n" if data["fallback"] else ""
    loss = f"{config['loss']} loss, " if "loss" in config else ""
    return (
        f"{warning}{config['model']} on {data['name']}, {loss}{config['optimizer']}, "
        f"lr {config['lr']:g}, batch {config['batch_size']}"
    )
