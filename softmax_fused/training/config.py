"""The settings of a run: their defaults, their checks, and the learner that they describe."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from softmax_fused.training.data.datasets import DATASETS, Task
from softmax_fused.training.errors import UsageError
from softmax_fused.training.models.architectures import ACTIVATIONS, DEFAULT_ACTIVATION, MODELS, build_model
from softmax_fused.training.models.learner import OPTIMIZERS, Learner, build_learner
from softmax_fused.training.models.losses import LOSSES, build_loss
from softmax_fused.training.ranks.group import Ranks

MACHINE_SETTINGS = ("device", "data_dir", "workers")  # these may differ between ranks
RESUMABLE_SETTINGS = ("epochs", *MACHINE_SETTINGS)  # these may change when a run is resumed


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run; the defaults are the textbook's for softmax regression.

    Raises:
        UsageError: if a name is unknown, a number is out of range, or two settings exclude each other.
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
    def with_defaults(cls, given: dict[str, Any]) -> "TrainConfig":
        """Return a config of the `given` settings and, for the others, the defaults of the data set and the model."""
        return cls(**_defaults(given), **given)

    def __post_init__(self) -> None:
        _check_names(self)
        check_range("epochs", self.epochs, 1, 1_000_000)
        check_range("batch-size", self.batch_size, 1, 2**31 - 1)
        check_range("seed", self.seed, 0, 2**32 - 1)
        check_range("workers", self.workers, 0, 1024)
        check_range("label-smoothing", self.label_smoothing, 0, 1)
        check_range("mixup", self.mixup, 0, 1000)
        _check_positive("lr", self.lr, 0.1)
        _check_positive("logit-scale", self.logit_scale, 1)
        _check_combinations(self)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, for checkpoints and metrics.json."""
        return asdict(self)


def learner_for(config: TrainConfig, classes: int, device: torch.device) -> Learner:
    """Return the learner that the settings describe, with its initial weights."""
    loss = LOSSES[config.loss]
    return build_learner(
        build_model(config.model, classes, config.seed, config.activation),
        build_loss(config.loss, config.label_smoothing),
        optimizer=config.optimizer,
        lr=config.lr,
        device=device,
        amp=config.amp,
        compile=config.compile,
        input_shape=MODELS[config.model].input_shape,
        logit_scale=config.logit_scale,
        advice=loss.advice,
        includes_last_layer=loss.includes_last_layer,
    )


def models_for(dataset: str) -> list[str]:
    """Return the names of the models for a data set's kind of target."""
    return [name for name, entry in MODELS.items() if entry.task is DATASETS[dataset].task]


def losses_for(dataset: str) -> list[str]:
    """Return the names of the losses for a data set's kind of target."""
    return [name for name, entry in LOSSES.items() if entry.task is DATASETS[dataset].task]


def check_changes(config: TrainConfig, changes: dict[str, Any], *, epochs_done: int) -> TrainConfig:
    """Return the settings of a run that is resumed with `changes`.

    Raises:
        UsageError: if a changed setting is not one of `RESUMABLE_SETTINGS`, or the run has done more epochs already.
    """
    for name, value in changes.items():
        known = getattr(config, name)
        if name not in RESUMABLE_SETTINGS and value != known:
            option = name.replace("_", "-")
            raise UsageError(
                f"expected --{option} to stay {known!r}, as the run began, got {value!r}; "
                f"leave it out, or train anew without --resume"
            )
    config = replace(config, **changes)
    if config.epochs < epochs_done:
        raise UsageError(f"expected --epochs of at least {epochs_done}, which the run has done, got {config.epochs}")
    return config


def check_name(option: str, name: str, known: Iterable[str], condition: str = "") -> None:
    """Raise `UsageError` unless `name` is one of `known`; `condition` says when it has to be one of these."""
    names = list(known)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        advice = f"did you mean {close[0]}?" if close else f"the default is {names[0]}"
        raise UsageError(f"expected --{option} to be one of {', '.join(names)}{condition}, got {name!r}; {advice}")


def check_range(option: str, value: float, low: int, high: int) -> None:
    """Raise `UsageError` unless `value` is from `low` to `high`."""
    if not low <= value <= high:
        raise UsageError(f"expected --{option} to be from {low} to {high}, got {value}; choose a value in that range")


def check_ranks(model: str, ranks: Ranks) -> None:
    """Raise `UsageError` if several ranks are to train a model from scratch: DistributedDataParallel takes a module."""
    if ranks.size > 1 and MODELS[model].scratch:
        library = " or ".join(
            name for name, entry in MODELS.items() if not entry.scratch and entry.task is MODELS[model].task
        )
        raise UsageError(f"expected --model {library} with several ranks, got {model}; start it without torchrun")


def _defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults of the given data set and model, for settings that are not given."""
    dataset = DATASETS.get(given.get("dataset", TrainConfig.dataset))
    if dataset is None:  # unknown, which the checks report
        return {}
    defaults: dict[str, Any] = {
        "model": dataset.model,
        "epochs": dataset.epochs,
        "batch_size": dataset.batch_size,
        "lr": dataset.lr,
    }
    model = MODELS.get(given.get("model", dataset.model))
    if model:
        defaults["loss"] = model.loss
        defaults["optimizer"] = "scratch-sgd" if model.scratch else "sgd"
        defaults["activation"] = DEFAULT_ACTIVATION if model.hidden else None
    return {name: value for name, value in defaults.items() if name not in given}


def _check_positive(option: str, value: float, usual: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"expected --{option} to be a finite number above 0, got {value}; {usual} is usual")


def _check_names(config: TrainConfig) -> None:
    """Raise `UsageError` unless all names are known, and data set, model and loss have the same kind of target."""
    check_name("dataset", config.dataset, DATASETS)
    condition = f" for --dataset {config.dataset} ({DATASETS[config.dataset].task.value})"
    check_name("model", config.model, models_for(config.dataset), condition)
    check_name("loss", config.loss, losses_for(config.dataset), condition)
    if LOSSES[config.loss].includes_last_layer and MODELS[config.model].scratch:
        library = " or ".join(name for name in models_for(config.dataset) if not MODELS[name].scratch)
        raise UsageError(
            f"expected --loss {config.loss} with --model {library}, which end in nn.Linear, got it with --model "
            f"{config.model}; choose --loss fused"
        )
    if config.activation is not None:
        check_name("activation", config.activation, ACTIVATIONS)
        if not MODELS[config.model].hidden:
            deep = " or ".join(name for name, entry in MODELS.items() if entry.hidden)
            raise UsageError(
                f"expected --activation with --model {deep}, got it with --model {config.model}, "
                "which has no hidden layer; leave it out"
            )
    check_name("optimizer", config.optimizer, OPTIMIZERS)


def _check_combinations(config: TrainConfig) -> None:
    """Raise `UsageError` if an option is on that the data set, the loss, the model or the optimiser excludes."""
    task = DATASETS[config.dataset].task
    soft_labels = {"label-smoothing": config.label_smoothing, "mixup": config.mixup, "one-hot": config.one_hot}
    for option, value in {**soft_labels, "logit-scale": config.logit_scale != 1}.items():
        if value and task is not Task.CLASSES:
            raise UsageError(
                f"expected --{option} with a data set of several classes, got it with --dataset {config.dataset} "
                f"({task.value}); leave it out"
            )
    losses = [name for name, entry in LOSSES.items() if entry.accepts_probabilities]
    for option, value in soft_labels.items():
        if value and config.loss not in losses:
            raise UsageError(f"expected --{option} with --loss {' or '.join(losses)}, got it with --loss {config.loss}")
    parts = {"model": config.model, "optimizer": config.optimizer}
    for option, value in {"amp": config.amp, "compile": config.compile}.items():
        for part, name in parts.items():
            if value and name.startswith("scratch"):
                raise UsageError(f"expected --{option} with library parts, got it with --{part} {name}; leave it out")
