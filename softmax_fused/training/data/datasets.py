"""Data sets, decoded once into uint8 tensors."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softmax_fused.training.data.idx import read_folder
from softmax_fused.training.errors import MissingDataError, UsageError
from softmax_fused.training.tasks import Task

SIDE = 28  # pixels
DIGITS_FOR_TEST = 360  # of 1,797
PAIR = (2, 4)  # pullover and coat: alike enough to be a task
WEIGHTS, BIAS, NOISE = (2.0, -1.2), 3.1, 0.01
EXAMPLES = 1000


@dataclass(frozen=True)
class Split:
    """Images uint8 of shape (N, 28, 28) and class indices int64 of shape (N,), on one device.

    A regression has features float32 of shape (N, D) for images, and values float32 of shape (N,) for labels.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        """Return the same split on `device`."""
        return Split(self.images.to(device), self.labels.to(device))

    def head(self, size: int) -> "Split":
        """Return the first `size` images."""
        if not 0 < size <= len(self):
            raise UsageError(f"expected a size from 1 to {len(self)}, got {size}")
        return Split(self.images[:size], self.labels[:size])


@dataclass(frozen=True)
class ImageData:
    """A data set of 28x28 grey images; `fallback` says why it stands in for the one that was asked for.

    A regression has no classes; `truth` are the weights, then the bias, that its examples were made with.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    source: str
    fallback: str | None = None
    truth: tuple[float, ...] = ()

    def to(self, device: torch.device) -> "ImageData":
        """Return the same data on `device`."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def head(self, train: int, test: int) -> "ImageData":
        """Return the first `train` training and `test` test images: for short runs."""
        return replace(self, train=self.train.head(train), test=self.test.head(test))

    def describe(self) -> dict[str, Any]:
        """Return what a run's record says about its data."""
        return {
            "name": self.name,
            "classes": list(self.classes),
            "train_images": len(self.train),
            "test_images": len(self.test),
            "source": self.source,
            "fallback": self.fallback,
        }


def to_input(images: Tensor) -> Tensor:
    """Return pixels as the models take them, float32 from 0 to 1; features are that already."""
    if images.is_floating_point():
        return images
    return images.to(torch.float32).div_(255)


def fashion_mnist(root: Path) -> ImageData:
    """Load Fashion-MNIST, 60,000 + 10,000 articles of clothing (Xiao, Rasul, Vollgraf 2017)."""
    from torchvision.datasets import FashionMNIST

    return _mnist_family("fashion-mnist", root, FashionMNIST, tuple(FashionMNIST.classes))


def mnist(root: Path) -> ImageData:
    """Load MNIST, 60,000 + 10,000 handwritten digits (LeCun et al. 1998)."""
    from torchvision.datasets import MNIST

    return _mnist_family("mnist", root, MNIST, tuple("0123456789"))


def fashion_pair(root: Path) -> ImageData:
    """Load the pullovers and coats of Fashion-MNIST, 12,000 + 2,000."""
    return pair(fashion_mnist(root), "fashion-pair", *PAIR)


def digits(root: Path) -> ImageData:  # noqa: ARG001 - the files come with scikit-learn
    """Load scikit-learn's digits: 1,797 images of 8x8 in 17 greys, upscaled; their split is drawn with seed 0."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float().unsqueeze(1) * (255 / 16)
    images = F.interpolate(small, (SIDE, SIDE), mode="bilinear").squeeze(1).round().to(torch.uint8)
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, kept = order[:DIGITS_FOR_TEST], order[DIGITS_FOR_TEST:]
    train, test = Split(images[kept], labels[kept]), Split(images[held_out], labels[held_out])
    return ImageData("digits", tuple("0123456789"), train, test, "scikit-learn")


def pair(data: ImageData, name: str, first: int, second: int) -> ImageData:
    """Return two classes of a data set, as classes 0 and 1."""

    def of_both(split: Split) -> Split:
        rows = (split.labels == first) | (split.labels == second)
        return Split(split.images[rows], (split.labels[rows] == second).long())

    classes = data.classes[first], data.classes[second]
    return replace(data, name=name, classes=classes, train=of_both(data.train), test=of_both(data.test))


def linear(root: Path) -> ImageData:  # noqa: ARG001 - made, not read
    """Make 1,000 + 1,000 examples y = <(2, -1.2), x> + 3.1 + noise, x from N(0, 1), noise from N(0, 0.01), seed 0."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2 * EXAMPLES, len(WEIGHTS), generator=generator)
    values = features @ torch.tensor(WEIGHTS) + BIAS + NOISE * torch.randn(2 * EXAMPLES, generator=generator)
    train = Split(features[:EXAMPLES], values[:EXAMPLES])
    test = Split(features[EXAMPLES:], values[EXAMPLES:])
    return ImageData("linear", (), train, test, "made with seed 0", truth=(*WEIGHTS, BIAS))


def _mnist_family(name: str, root: Path, family: Any, classes: tuple[str, ...]) -> ImageData:
    files = read_folder(root, family)
    train, test = (
        Split(files[f"{part}-images-idx3-ubyte"], files[f"{part}-labels-idx1-ubyte"].long())
        for part in ("train", "t10k")
    )
    return ImageData(name, classes, train, test, str(root / family.__name__ / "raw"))


@dataclass(frozen=True)
class DataEntry:
    """A data set: how to load it, what it asks of a model, and the settings that fit it."""

    load: Callable[[Path], ImageData]
    task: Task = Task.CLASSES
    model: str = "softmax"
    epochs: int = 10
    batch_size: int = 256
    lr: float = 0.1


DATASETS: dict[str, DataEntry] = {
    "fashion-mnist": DataEntry(fashion_mnist),
    "mnist": DataEntry(mnist, batch_size=64, lr=0.5),
    "digits": DataEntry(digits),
    "fashion-pair": DataEntry(fashion_pair, Task.BINARY, "logistic", lr=0.01),
    "linear": DataEntry(linear, Task.REGRESSION, "linear", epochs=3, batch_size=10, lr=0.03),
}


def data_root(folder: str | Path | None = None) -> Path:
    """Return `folder`, else ``$SOFTMAX_FUSED_DATA``, else this user's cache; absolute, as it is recorded."""
    from platformdirs import user_cache_path

    return (
        Path(folder or os.environ.get("SOFTMAX_FUSED_DATA") or user_cache_path("softmax-fused")).expanduser().absolute()
    )


def load_dataset(name: str, root: Path, *, fallback: bool = False) -> ImageData:
    """Load a data set, or with `fallback` scikit-learn's digits where its files cannot be had.

    Files that are there but wrong are an error all the same: training on something else would hide them.
    """
    try:
        return DATASETS[name].load(root)
    except MissingDataError as missing:
        if not fallback:
            raise
        return replace(digits(root), fallback=str(missing))
