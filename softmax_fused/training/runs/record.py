"""The record of a run: curves, and what they depend on. It is the content of metrics.json."""

import torch

from softmax_fused.training.config import TrainConfig
from softmax_fused.training.data.datasets import ImageData
from softmax_fused.training.models.evaluation import curve_names
from softmax_fused.training.ranks.devices import device_name
from softmax_fused.training.ranks.group import SINGLE_PROCESS, Ranks
from softmax_fused.training.report.records import Metrics
from softmax_fused.training.versions import versions


def new_metrics(config: TrainConfig, data: ImageData, device: torch.device, ranks: Ranks = SINGLE_PROCESS) -> Metrics:
    """Return the record of a run before its first epoch."""
    return {
        **run_environment(config, device, ranks),
        "dataset": data.describe(),
        **{name: [] for name in curve_names(data)},
        **({"per_class_accuracy": {}, "confusion_matrix": []} if data.classes else {"parameters": {}}),
    }


def run_environment(config: TrainConfig, device: torch.device, ranks: Ranks = SINGLE_PROCESS) -> Metrics:
    """Return settings, versions, device and the number of ranks, all of which resuming a run may change."""
    return {
        "config": config.as_dict(),
        "versions": versions(),
        "device": str(device),
        "device_name": device_name(device),
        "ranks": ranks.size,
    }


def resumed_metrics(
    metrics: Metrics, config: TrainConfig, data: ImageData, device: torch.device, ranks: Ranks
) -> Metrics:
    """Return the record of a resumed run; a curve that older versions did not record begins with None."""
    epochs = len(metrics["train_loss"])
    resumed = {**new_metrics(config, data, device, ranks), **metrics, **run_environment(config, device, ranks)}
    return {**resumed, **{name: resumed[name] or [None] * epochs for name in curve_names(data)}}


def add_results(metrics: Metrics, results: dict[str, float], last_epoch: Metrics) -> None:
    """Append an epoch's results to the curves; `last_epoch` replaces the entries about the last epoch alone."""
    for name, value in results.items():
        metrics[name].append(value)
    metrics.update(last_epoch)
