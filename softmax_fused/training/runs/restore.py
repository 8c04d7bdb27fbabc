"""From a checkpoint back to a run: each part is checked, and what does not fit is said in one line.

All ranks of a run meet the same checkpoint, so that one of them reports what is wrong with it.
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
from softmax_fused.training.data.datasets import DATASETS
from softmax_fused.training.errors import CommonError, UsageError
from softmax_fused.training.models.evaluation import CURVES, REGRESSION_CURVES
from softmax_fused.training.models.learner import Learner
from softmax_fused.training.report.records import is_number
from softmax_fused.training.runs.checkpoint import Checkpoint, damaged
from softmax_fused.training.tasks import Task

# Settings that version 0.1.0 had not; its runs were what the defaults describe.
ADDED = ("activation", "logit_scale", "label_smoothing", "mixup", "one_hot")


def restore_config(path: Path, state: Checkpoint) -> TrainConfig:
    """Return the settings of a run.

    Raises:
        CommonError: if they are not those of this version.
    """
    settings, defaults = state["config"], TrainConfig().as_dict()
    unknown = [f"unknown setting {name!r}" for name in settings if name not in defaults]
    missing = [f"no setting {name!r}" for name in defaults if name not in settings and name not in ADDED]
    if unknown or missing:
        raise _of_another_version(path, state, (unknown + missing)[0])
    for name, value in settings.items():
        if not _is_like(value, defaults[name]):
            raise damaged(path, f"setting {name} is {value!r}")
    try:
        return TrainConfig(**settings)
    except UsageError as error:
        raise _of_another_version(path, state, str(error).partition(";")[0]) from error


def restore_metrics(path: Path, state: Checkpoint, config: TrainConfig) -> dict[str, Any]:
    """Return the record of a run, with its settings as this version has them.

    Raises:
        CommonError: if a part of it is missing or of another kind.
    """
    metrics, task = state["metrics"], DATASETS[config.dataset].task
    dataset = metrics.get("dataset")
    kinds: dict[str, Any] = {
        "name": str,
        "classes": list,
        "train_images": int,
        "test_images": int,
        "fallback": (str, type(None)),
    }
    if not isinstance(dataset, dict) or not all(isinstance(dataset.get(key, ...), kinds[key]) for key in kinds):
        raise damaged(path, "no description of the data set")
    classes = dataset["classes"]
    count = {Task.CLASSES: max(2, len(classes)), Task.BINARY: 2, Task.REGRESSION: 0}[task]
    if len(classes) != count or not all(isinstance(name, str) for name in classes):
        raise damaged(path, f"classes {classes!r}")
    if not _are_curves(metrics, CURVES if classes else REGRESSION_CURVES):
        raise damaged(path, "curves that are not one number an epoch")
    trained = bool(metrics["train_loss"])
    if trained and not (_is_matrix(metrics.get("confusion_matrix"), count) if classes else _is_line(metrics)):
        raise damaged(path, "no results of the last epoch")
    with _explained(path, "a record that is not plain values"):
        json.dumps(metrics, allow_nan=False)
    return {**metrics, "config": config.as_dict()}


def restore_model(path: Path, learner: Learner, state: Checkpoint) -> None:
    """Give a learner the weights of a checkpoint.

    Raises:
        CommonError: if its model has others.
    """
    saved, own = state["model"], learner.model.state_dict()
    for name in {**own, **saved}:
        there, here = (f"of shape {tuple(w[name].shape)}" if _is_weight(w.get(name)) else "none" for w in (saved, own))
        if there != here:
            raise damaged(path, f"weights {name}: {there}, expected {here} for --model {state['config']['model']}")
    learner.model.load_state_dict(saved)


def restore_training(path: Path, learner: Learner, state: Checkpoint) -> None:
    """Give a learner, and torch's generators, what they had when the checkpoint was written.

    Raises:
        CommonError: if it does not fit.
    """
    with _explained(path, "another optimizer's state"):
        learner.optimizer.load_state_dict(state["optimizer"])
        _try_step(learner)
    with _explained(path, "no state of the gradient scaler"):
        learner.scaler.load_state_dict(state["scaler"])
    with _explained(path, "no state of the random generators"):
        torch.set_rng_state(state["generators"]["cpu"])
        if learner.device.type == "cuda" and "cuda" in state["generators"]:
            torch.cuda.set_rng_state(state["generators"]["cuda"], learner.device)


def _try_step(learner: Learner) -> None:
    """Take two steps on a copy: torch checks little of an optimizer's state before a step needs it."""
    trial, parameters = copy.deepcopy((learner.optimizer, list(learner.model.parameters())))
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    trial.step()
    trial.step()  # which uses the momentum of the first


@contextmanager
def _explained(path: Path, what: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # torch names no kind of exception for a state that does not fit
        raise damaged(path, what) from error


def _of_another_version(path: Path, state: Checkpoint, what: str) -> CommonError:
    versions = state["metrics"].get("versions")
    written = versions.get("softmax-fused") if isinstance(versions, dict) else None
    whose = f"softmax-fused {written}" if written not in (None, __version__) else "another version"
    return CommonError(
        f"expected a checkpoint of softmax-fused {__version__} in {path}, got one of {whose} ({what}); "
        "use that version, or train again"
    )


def _is_like(value: Any, default: Any) -> bool:
    if default is None:
        return value is None or isinstance(value, str)
    return is_number(value) if isinstance(default, float) else type(value) is type(default)


def _is_curve(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_number, value))


def _are_curves(metrics: dict[str, Any], names: tuple[str, ...]) -> bool:
    """Whether there is a number an epoch, but for the test loss of epochs that 0.1.0 trained: it measured none."""
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


def _is_line(metrics: dict[str, Any]) -> bool:
    found = metrics.get("parameters")
    if not isinstance(found, dict):
        return False
    lists, numbers = (
        (found.get("weights"), found.get("true_weights", [])),
        (found.get("bias"), found.get("true_bias", 0)),
    )
    return all(map(_is_curve, lists)) and all(map(is_number, numbers))


def _is_weight(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
