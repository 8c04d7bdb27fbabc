"""What a run is: every setting that changes its numbers, checked once."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from softmax_fused.training.errors import LabError, UsageError
from softmax_fused.training.fitting import check_name, check_names, check_options, fitting_settings
from softmax_fused.training.models.learner import OPTIMIZERS

MACHINE = ("device", "data_dir", "workers")  # what may differ between ranks
MAY_CHANGE = ("epochs", *MACHINE)  # when a run is resumed


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run; the defaults are the textbook's for softmax regression.

    Raises:
        UsageError: if a name is unknown, a number out of range, or two settings do not fit each other.
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
    activation: str | None = None
    logit_scale: float = 1.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    one_hot: bool = False

    @classmethod
    def fitting(cls, given: dict[str, Any]) -> "TrainConfig":
        """Return a config of `given` settings by name, and for the others what fits the data set and the model."""
        return cls(**fitting_settings(given, cls.dataset))

    def __post_init__(self) -> None:
        check_names(self)
        check_name("optimizer", self.optimizer, OPTIMIZERS)
        check_range("epochs", self.epochs, 1, 1_000_000)
        check_range("batch-size", self.batch_size, 1, 2**31 - 1)
        check_range("seed", self.seed, 0, 2**32 - 1)
        check_range("workers", self.workers, 0, 1024)
        check_range("label-smoothing", self.label_smoothing, 0, 1)
        check_range("mixup", self.mixup, 0, 1000)
        check_positive("lr", self.lr, 0.1)
        check_positive("logit-scale", self.logit_scale, 1)
        check_options(self)

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


def check_range(option: str, value: float, low: int, high: int) -> None:
    """Raise `UsageError` unless `value` is from `low` to `high`."""
    if not low <= value <= high:
        raise UsageError(f"expected --{option} to be from {low} to {high}, got {value}; choose a value in that range")


def check_positive(option: str, value: float, usual: float) -> None:
    """Raise `UsageError` unless `value` is finite and above 0."""
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"expected --{option} to be a finite number above 0, got {value}; {usual} is usual")


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
