"""Data sets, read once into uint8 tensors that hold one byte a pixel."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from softmax_fused.training.data.idx import read_folder
from softmax_fused.training.errors import MissingDataError, UsageError

SIDE = 28  # pixels
TEST_DIGITS = 360  # of scikit-learn's 1,797
PULLOVER, COAT = 2, 4  # two classes of Fashion-MNIST that are alike, which makes telling them apart a task
LINEAR_WEIGHTS, LINEAR_BIAS, LINEAR_NOISE = (2.0, -1.2), 3.1, 0.01
LINEAR_EXAMPLES = 1000  # to train on, and as many to test on


class Task(Enum):
    """The kind of target that a data set has, which decides the models and losses that fit it."""

    CLASSES = "several classes"  # logits (N, C); targets are class indices, or probabilities (N, C)
    BINARY = "two classes"  # one logit per example, (N,), that of class 1; targets are class indices 0 and 1
    REGRESSION = "a regression"  # values (N,)


@dataclass(frozen=True)
class Split:
    """Images, uint8 of shape (N, 28, 28), and class indices, int64 of shape (N,), on one device.

    For a regression, `images` are features, float32 of shape (N, D), and `labels` are values, float32 of shape (N,).
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
    """A data set of 28x28 grey images, or of features for a regression, which has no classes.

    Attributes:
        name: One of `DATASETS`.
        classes: The names of the classes; none for a regression.
        train: The training set.
        test: The test set.
        source: Where the data come from.
        fallback: Why these data replace the data set that was asked for; None where they do not.
        true_parameters: The weights, then the bias, from which a regression's values were generated.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    source: str
    fallback: str | None = None
    true_parameters: tuple[float, ...] = ()

    def to(self, device: torch.device) -> "ImageData":
        """Return the same data on `device`."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def head(self, train: int, test: int) -> "ImageData":
        """Return the first `train` training and `test` test images, for short runs."""
        return replace(self, train=self.train.head(train), test=self.test.head(test))

    def describe(self) -> dict[str, Any]:
        """Return what the record of a run says about its data."""
        return {
            "name": self.name,
            "classes": list(self.classes),
            "train_images": len(self.train),
            "test_images": len(self.test),
            "source": self.source,
            "fallback": self.fallback,
        }


def to_input(images: Tensor) -> Tensor:
    """Return a model's input: pixels as float32 from 0 to 1; features, which are float32, unchanged."""
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
    return select_pair(fashion_mnist(root), "fashion-pair", PULLOVER, COAT)


def digits(root: Path) -> ImageData:  # noqa: ARG001 - the files come with scikit-learn
    """Load scikit-learn's digits: 1,797 images of 8x8 pixels in 17 greys, upscaled; seed 0 splits them."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images).float().unsqueeze(1) * (255 / 16)
    images = F.interpolate(small, (SIDE, SIDE), mode="bilinear").squeeze(1).round().to(torch.uint8)
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = (Split(images[rows], labels[rows]) for rows in (order[:TEST_DIGITS], order[TEST_DIGITS:]))
    return ImageData("digits", tuple("0123456789"), train, test, "scikit-learn")


def select_pair(data: ImageData, name: str, first: int, second: int) -> ImageData:
    """Return the examples of two classes of a data set, as classes 0 and 1."""

    def select(split: Split) -> Split:
        rows = (split.labels == first) | (split.labels == second)
        return Split(split.images[rows], (split.labels[rows] == second).long())

    classes = data.classes[first], data.classes[second]
    return replace(data, name=name, classes=classes, train=select(data.train), test=select(data.test))


def linear(root: Path) -> ImageData:  # noqa: ARG001 - generated, not read
    r"""Generate 1,000 + 1,000 examples of a plane with noise, with seed 0.

    .. math::
        y = 2 x_1 - 1.2 x_2 + 3.1 + \epsilon, \qquad
        x_i \sim \mathcal N(0, 1), \qquad \epsilon \sim \mathcal N(0, 0.01^2)
    """
    size, generator = 2 * LINEAR_EXAMPLES, torch.Generator().manual_seed(0)
    features = torch.randn(size, len(LINEAR_WEIGHTS), generator=generator)
    values = features @ torch.tensor(LINEAR_WEIGHTS) + LINEAR_BIAS
    values += LINEAR_NOISE * torch.randn(size, generator=generator)
    train, test = map(Split, features.chunk(2), values.chunk(2))
    return ImageData("linear", (), train, test, "made with seed 0", true_parameters=(*LINEAR_WEIGHTS, LINEAR_BIAS))


def _mnist_family(name: str, root: Path, family: Any, classes: tuple[str, ...]) -> ImageData:
    files = read_folder(root, family)
    train, test = (
        Split(files[f"{part}-images-idx3-ubyte"], files[f"{part}-labels-idx1-ubyte"].long())
        for part in ("train", "t10k")
    )
    return ImageData(name, classes, train, test, str(root / family.__name__ / "raw"))


@dataclass(frozen=True)
class DatasetEntry:
    """How to load a data set, its kind of target, and the default settings of a run on it."""

    load: Callable[[Path], ImageData]
    task: Task = Task.CLASSES
    model: str = "softmax"
    epochs: int = 10
    batch_size: int = 256
    lr: float = 0.1


DATASETS: dict[str, DatasetEntry] = {
    "fashion-mnist": DatasetEntry(fashion_mnist),
    "mnist": DatasetEntry(mnist, batch_size=64, lr=0.5),
    "digits": DatasetEntry(digits),
    "fashion-pair": DatasetEntry(fashion_pair, Task.BINARY, "logistic", lr=0.01),
    "linear": DatasetEntry(linear, Task.REGRESSION, "linear", epochs=3, batch_size=10, lr=0.03),
}


def data_root(folder: str | Path | None = None) -> Path:
    """Return `folder`, else ``$SOFTMAX_FUSED_DATA``, else this user's cache; absolute, because runs record it."""
    from platformdirs import user_cache_path

    root = folder or os.environ.get("SOFTMAX_FUSED_DATA") or user_cache_path("softmax-fused")
    return Path(root).expanduser().absolute()


def load_dataset(name: str, root: Path, *, fallback: bool = False) -> ImageData:
    """Load a data set; with `fallback`, scikit-learn's digits where its files are absent and cannot be downloaded.

    Damaged files are an error even with `fallback`: training on other data would hide the damage.
    """
    try:
        return DATASETS[name].load(root)
    except MissingDataError as missing:
        if not fallback:
            raise
        return replace(digits(root), fallback=str(missing))
