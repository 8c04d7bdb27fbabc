"""A run restored from its checkpoint. Every part is checked, and what does not fit is reported in one line.

All ranks of a run read the same checkpoint, so that rank 0 alone reports what is wrong with it.
"""

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softmax_fused import __version__
from softmax_fused.training.config import TrainConfig
from softmax_fused.training.data.datasets import DATASETS, Task
from softmax_fused.training.errors import AllRanksError, UsageError
from softmax_fused.training.models.evaluation import CURVES, REGRESSION_CURVES
from softmax_fused.training.models.learner import Learner
from softmax_fused.training.report.records import Metrics, is_number
from softmax_fused.training.runs.checkpoint import Checkpoint, damaged

# Settings that version 0.1.0 did not have; their defaults are what its runs did.
ADDED_SETTINGS = ("activation", "logit_scale", "label_smoothing", "mixup", "one_hot")


def restore_config(path: Path, state: Checkpoint) -> TrainConfig:
    """Return the settings of a run.

    Raises:
        AllRanksError: if they are not settings of this version.
    """
    settings, defaults = state["config"], TrainConfig().as_dict()
    unknown = [f"unknown setting {name!r}" for name in settings if name not in defaults]
    missing = [f"no setting {name!r}" for name in defaults if name not in settings and name not in ADDED_SETTINGS]
    if unknown or missing:
        raise _another_version(path, state, (unknown + missing)[0])
    for name, value in settings.items():
        if not _has_type_of(value, defaults[name]):
            raise damaged(path, f"setting {name} is {value!r}")
    try:
        return TrainConfig(**settings)
    except UsageError as error:
        raise _another_version(path, state, str(error).partition(";")[0]) from error


def restore_metrics(path: Path, state: Checkpoint, config: TrainConfig) -> Metrics:
    """Return the record of a run, with its settings completed to those of this version.

    Raises:
        AllRanksError: if a part of it is missing or has another type.
    """
    metrics, task = state["metrics"], DATASETS[config.dataset].task
    dataset = metrics.get("dataset")
    types: dict[str, Any] = {
        "name": str,
        "classes": list,
        "train_images": int,
        "test_images": int,
        "fallback": (str, type(None)),
    }
    if not isinstance(dataset, dict) or not all(isinstance(dataset.get(key, ...), types[key]) for key in types):
        raise damaged(path, "no description of the data set")
    classes = dataset["classes"]
    count = {Task.CLASSES: max(2, len(classes)), Task.BINARY: 2, Task.REGRESSION: 0}[task]
    if len(classes) != count or not all(isinstance(name, str) for name in classes):
        raise damaged(path, f"classes {classes!r}")
    if not _has_curves(metrics, CURVES if classes else REGRESSION_CURVES):
        raise damaged(path, "curves that are not one number an epoch")
    trained = bool(metrics["train_loss"])
    if trained and not (_is_matrix(metrics.get("confusion_matrix"), count) if classes else _has_parameters(metrics)):
        raise damaged(path, "no results of the last epoch")
    with _damage_reported(path, "a record that is not plain values"):
        json.dumps(metrics, allow_nan=False)
    return {**metrics, "config": config.as_dict()}


def restore_model(path: Path, learner: Learner, state: Checkpoint) -> None:
    """Copy the weights of a checkpoint into a learner's model.

    Raises:
        AllRanksError: if the model has other weights.
    """
    saved, own = state["model"], learner.model.state_dict()
    for name in {**own, **saved}:
        there, here = (f"of shape {tuple(w[name].shape)}" if _is_weight(w.get(name)) else "none" for w in (saved, own))
        if there != here:
            raise damaged(path, f"weights {name}: {there}, expected {here} for --model {state['config']['model']}")
    learner.model.load_state_dict(saved)


def restore_training(path: Path, learner: Learner, state: Checkpoint) -> None:
    """Restore optimiser, gradient scaler and torch's random generators.

    Raises:
        AllRanksError: if a state does not fit.
    """
    with _damage_reported(path, "another optimizer's state"):
        learner.optimizer.load_state_dict(state["optimizer"])
        _try_steps(learner)
    with _damage_reported(path, "no state of the gradient scaler"):
        learner.scaler.load_state_dict(state["scaler"])
    with _damage_reported(path, "no state of the random generators"):
        torch.set_rng_state(state["generators"]["cpu"])
        if learner.device.type == "cuda" and "cuda" in state["generators"]:
            torch.cuda.set_rng_state(state["generators"]["cuda"], learner.device)


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's global generators. The lab's models do not draw from them; others may."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _try_steps(learner: Learner) -> None:
    """Take two steps on a copy of the optimiser: torch checks most of a loaded state only when a step uses it.

    The second step uses the momentum that the first one stores.
    """
    trial, parameters = copy.deepcopy((learner.optimizer, list(learner.model.parameters())))
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    trial.step()
    trial.step()


@contextmanager
def _damage_reported(path: Path, what: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # torch has no exception of its own for a state that does not fit
        raise damaged(path, what) from error


def _another_version(path: Path, state: Checkpoint, what: str) -> AllRanksError:
    versions = state["metrics"].get("versions")
    written_by = versions.get("softmax-fused") if isinstance(versions, dict) else None
    version = f"softmax-fused {written_by}" if written_by not in (None, __version__) else "another version"
    return AllRanksError(
        f"expected a checkpoint of softmax-fused {__version__} in {path}, got one of {version} ({what}); "
        "use that version, or train again"
    )


def _has_type_of(value: Any, default: Any) -> bool:
    if default is None:
        return value is None or isinstance(value, str)
    return is_number(value) if isinstance(default, float) else type(value) is type(default)


def _is_curve(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_number, value))


def _has_curves(metrics: Metrics, names: tuple[str, ...]) -> bool:
    """Whether each curve has a number for each epoch; version 0.1.0 had no test loss for classes, which may be None."""
    curves: dict[str, Any] = {name: metrics.get(name) for name in names}
    epochs = curves["train_loss"]
    if not isinstance(epochs, list):
        return False
    if names is CURVES:
        measured = metrics.get("test_loss", epochs)
        curves["test_loss"] = [0 if loss is None else loss for loss in measured] if isinstance(measured, list) else None
    return all(_is_curve(curve) and len(curve) == len(epochs) for curve in curves.values())


def _is_matrix(value: Any, size: int) -> bool:
    return isinstance(value, list) and len(value) == size and all(_is_curve(row) and len(row) == size for row in value)


def _has_parameters(metrics: Metrics) -> bool:
    found = metrics.get("parameters")
    if not isinstance(found, dict):
        return False
    weights, biases = (
        (found.get("weights"), found.get("true_weights", [])),
        (found.get("bias"), found.get("true_bias", 0)),
    )
    return all(map(_is_curve, weights)) and all(map(is_number, biases))


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
