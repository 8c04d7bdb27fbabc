"""What is in a data set: numbers, and a picture of some images of each class."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from softmax_fused.training.data.datasets import ImageData, Split
from softmax_fused.training.report.plots import to_png
from softmax_fused.training.runs.checkpoint import write_atomically

SHOWN = 10  # images of each class
GAP, PAPER = 2, 255  # pixels between images, and their grey


def describe_data(data: ImageData) -> list[str]:
    """Return a data set in lines: where it is from, its sizes, its pixels, its classes."""
    height, width = data.train.images.shape[1:]
    mean, deviation = pixel_moments(data.train)
    table = {
        "data set": f"{data.name}, from {data.source}",
        "images": f"{len(data.train):,} to train, {len(data.test):,} to test",
        "pixels": f"{height}x{width} greys from 0 to 1, mean {mean:.4f}, standard deviation {deviation:.4f}",
        "memory": f"{data.train.images.nbytes / 1e6:.1f} MB to train, {data.test.images.nbytes / 1e6:.1f} MB to test",
    }
    lines = [f"{name:10}{text}" for name, text in table.items()]
    train, test = (split.labels.bincount(minlength=len(data.classes)).tolist() for split in (data.train, data.test))
    lines.append(f"{'class':18}{'train':>8}{'test':>8}")
    lines += [f"{name:18}{train[i]:8,}{test[i]:8,}" for i, name in enumerate(data.classes)]
    return lines


def pixel_moments(split: Split) -> tuple[float, float]:
    """Return mean and standard deviation of all pixels, exactly, from the counts of 256 greys."""
    counts = split.images.flatten().bincount(minlength=256).double()
    shares, greys = counts / counts.sum(), torch.arange(256, dtype=torch.float64) / 255
    mean = shares.dot(greys)
    return mean.item(), shares.dot((greys - mean) ** 2).sqrt().item()


def draw_samples(data: ImageData, path: Path) -> None:
    """Write a picture of the first training images of each class, a row a class."""
    title = f"{data.name}: the first {SHOWN} training images of each class"
    write_atomically(path, to_png(plot_samples(title, data.train, data.classes)))


def plot_samples(title: str, split: Split, classes: tuple[str, ...]) -> Figure:
    """Draw images of each class in a row that begins with its name."""
    side = split.images.shape[-1] + GAP
    sheet = np.full((side * len(classes), side * SHOWN), PAPER, dtype=np.uint8)
    for label in range(len(classes)):
        rows = (split.labels == label).nonzero().flatten()[:SHOWN]
        for place, image in enumerate(split.images[rows].cpu().numpy()):
            top, left = label * side, place * side
            sheet[top : top + side - GAP, left : left + side - GAP] = image
    figure = Figure(figsize=(SHOWN + 1.6, len(classes) + 0.6), layout=ConstrainedLayoutEngine(w_pad=0.12))
    axes = figure.subplots()
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=255)
    axes.set_yticks([(label + 0.5) * side - GAP / 2 for label in range(len(classes))], classes, fontsize=12)
    axes.set(title=title, xticks=[])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure
