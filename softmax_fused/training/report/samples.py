"""What a data set contains: numbers, and a figure with some images of each class."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from softmax_fused.training.data.datasets import ImageData, Split
from softmax_fused.training.files import write_atomically
from softmax_fused.training.report.plots import new_figure, set_padding, to_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLES = 10  # images of each class
GAP, WHITE = 2, 255  # pixels between images, and their grey


def describe_data(data: ImageData) -> list[str]:
    """Return lines with a data set's source, its sizes, its pixels and its classes."""
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
    """Return mean and standard deviation of all pixels, exactly, from the frequencies of the 256 greys."""
    counts = split.images.flatten().bincount(minlength=256).double()
    frequencies, greys = counts / counts.sum(), torch.arange(256, dtype=torch.float64) / 255
    mean = frequencies.dot(greys)
    return mean.item(), frequencies.dot((greys - mean) ** 2).sqrt().item()


def draw_samples(data: ImageData, path: Path) -> None:
    """Write a figure of the first training images of each class."""
    title = f"{data.name}: the first {SAMPLES} training images of each class"
    write_atomically(path, to_png(plot_samples(title, data.train, data.classes)))


def plot_samples(title: str, split: Split, classes: tuple[str, ...]) -> "Figure":
    """Draw a row of images for each class, with its name in front."""
    rows = [split.images[split.labels == label][:SAMPLES].cpu() for label in range(len(classes))]
    rows = [F.pad(images, (0, GAP, 0, GAP, 0, SAMPLES - len(images)), value=WHITE) for images in rows]
    sheet = torch.stack(rows).transpose(1, 2).flatten(2, 3).flatten(0, 1).numpy()  # (class, image, y, x) to (y, x)
    pitch = split.images.shape[-1] + GAP
    figure = new_figure(SAMPLES + 1.6, len(classes) + 0.6)
    set_padding(figure, w_pad=0.12)
    axes = figure.subplots()
    axes.imshow(sheet, cmap="gray", vmin=0, vmax=255)
    axes.set_yticks([(label + 0.5) * pitch - GAP / 2 for label in range(len(classes))], classes, fontsize=12)
    axes.set(title=title, xticks=[])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure
