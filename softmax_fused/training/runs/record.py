"""The record of a run: what metrics.json says besides its curves."""

import platform
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from softmax_fused.training.config import TrainConfig
from softmax_fused.training.data.datasets import ImageData
from softmax_fused.training.models.evaluation import curve_names
from softmax_fused.training.ranks.group import ALONE, Ranks
from softmax_fused.training.runs.checkpoint import write_error
from softmax_fused.training.wording import plural

Metrics = dict[str, Any]


def new_metrics(config: TrainConfig, data: ImageData, device: torch.device, ranks: Ranks = ALONE) -> Metrics:
    """Return the record of a run that has not trained yet."""
    return {
        **surroundings(config, device, ranks),
        "dataset": data.describe(),
        **{name: [] for name in curve_names(data)},
        **({"per_class_accuracy": {}, "confusion_matrix": []} if data.classes else {"parameters": {}}),
    }


def surroundings(config: TrainConfig, device: torch.device, ranks: Ranks = ALONE) -> Metrics:
    """Return settings, versions, device and the number of ranks: what may change when a run is resumed."""
    return {
        "config": config.as_dict(),
        "versions": versions(),
        "device": str(device),
        "device_name": device_name(device),
        "ranks": ranks.size,
    }


def continued_metrics(
    metrics: Metrics, config: TrainConfig, data: ImageData, device: torch.device, ranks: Ranks
) -> Metrics:
    """Return the record of a run that goes on: a curve that it did not have so far is None for the epochs done."""
    epochs = len(metrics["train_loss"])
    begun = {**new_metrics(config, data, device, ranks), **metrics, **surroundings(config, device, ranks)}
    return {**begun, **{name: begun[name] or [None] * epochs for name in curve_names(data)}}


def add_results(metrics: Metrics, results: dict[str, float], last: Metrics) -> None:
    """Append an epoch to the curves; `last` replaces what is known of the last epoch alone."""
    for name, value in results.items():
        metrics[name].append(value)
    metrics.update(last)


def versions() -> dict[str, str | None]:
    """Return versions of what the numbers depend on; None for what is not installed."""
    packages = ("softmax-fused", "torch", "triton", "torchvision", "scikit-learn", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{package: _version(package) for package in packages},
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's architecture and the number of threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"{platform.machine()}, {threads} {plural('thread', threads)}"
    return device.type


def default_folder(label: str) -> Path:
    """Make and return ``runs/<date-time>-<label>``, with a number where another run has that name already."""
    name = f"{datetime.now().astimezone():%Y%m%d-%H%M%S}-{label}"
    folder, taken = Path("runs", name), 1
    try:
        folder.parent.mkdir(exist_ok=True)
        while not _is_made(folder):
            taken += 1
            folder = Path("runs", f"{name}-{taken}")
    except OSError as error:
        raise write_error(folder, error) from error
    return folder


def _is_made(folder: Path) -> bool:
    """Make the folder, unless another process was first."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True
