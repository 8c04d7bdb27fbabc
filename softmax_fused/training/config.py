"""What a run is: every setting that changes its numbers, checked once."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from softmax_fused.training.data import DATASETS
from softmax_fused.training.errors import LabError, UsageError
from softmax_fused.training.learner import OPTIMIZERS
from softmax_fused.training.losses import LOSSES
from softmax_fused.training.models import MODELS

MAY_CHANGE = ("epochs", "device", "data_dir", "workers")  # when a run is resumed


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run; the defaults are the textbook's.

    Raises:
        UsageError: if a name is unknown or a number out of range.
    """

    dataset: str = "fashion-mnist"
    model: str = "softmax"
    loss: str = "fused"
    epochs: int = 10
    batch_size: int = 256
    lr: float = 0.1
    optimizer: str = "sgd"
    device: str = "auto"
    data_dir: str | None = None
    seed: int = 0
    workers: int = 0
    amp: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        check_name("dataset", self.dataset, DATASETS)
        check_name("model", self.model, MODELS)
        check_name("loss", self.loss, LOSSES)
        check_name("optimizer", self.optimizer, OPTIMIZERS)
        check_range("epochs", self.epochs, 1, 1_000_000)
        check_range("batch-size", self.batch_size, 1, 2**31 - 1)
        check_range("seed", self.seed, 0, 2**32 - 1)
        check_range("workers", self.workers, 0, 1024)
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UsageError(f"expected --lr to be a finite number above 0, got {self.lr}; the default is 0.1")

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as checkpoints and metrics.json hold them."""
        return asdict(self)


def check_changes(config: TrainConfig, changes: dict[str, Any], *, epochs_done: int) -> TrainConfig:
    """Return the settings of a run that is resumed with `changes`.

    Raises:
        UsageError: if they would make it another run, or one shorter than it is.
    """
    for name, value in changes.items():
        known = getattr(config, name)
        if name not in MAY_CHANGE and value != known:
            option = name.replace("_", "-")
            raise UsageError(
                f"expected --{option} to stay {known!r}, as the run began, got {value!r}; "
                f"leave it out, or train anew without --resume"
            )
    config = replace(config, **changes)
    if config.epochs < epochs_done:
        raise UsageError(f"expected --epochs of at least {epochs_done}, which the run has done, got {config.epochs}")
    return config


def check_name(option: str, name: str, known: Iterable[str]) -> None:
    """Raise `UsageError` unless `name` is one of `known`."""
    names = list(known)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        advice = f"did you mean {close[0]}?" if close else f"the default is {names[0]}"
        raise UsageError(f"expected --{option} to be one of {', '.join(names)}, got {name!r}; {advice}")


def check_range(option: str, value: int, low: int, high: int) -> None:
    """Raise `UsageError` unless `value` is from `low` to `high`."""
    if not low <= value <= high:
        raise UsageError(f"expected --{option} to be from {low} to {high}, got {value}; choose a value in that range")


def pick_device(name: str) -> torch.device:
    """Return the device called `name`; ``auto`` is the first CUDA (or ROCm) device, else the CPU.

    Raises:
        UsageError: if torch knows no such device.
        LabError: if this machine has none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(
            f"expected --device to be auto, cpu, cuda or cuda:N, got {name!r}; use --device auto"
        ) from None
    try:
        torch.zeros(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise LabError(f"expected a {name} device on this machine, got none ({reason}); use --device auto") from error
    return device
