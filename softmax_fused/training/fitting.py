"""Which settings fit together: what to take where none is asked for, and what to refuse."""

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from softmax_fused.training.data.datasets import DATASETS
from softmax_fused.training.errors import UsageError
from softmax_fused.training.models.architectures import ACTIVATIONS, MODELS
from softmax_fused.training.models.losses import LOSSES
from softmax_fused.training.tasks import Task

if TYPE_CHECKING:
    from softmax_fused.training.config import TrainConfig

SCRATCH_OPTIMIZER = "scratch-sgd"


def fitting_settings(given: dict[str, Any], dataset: str = "fashion-mnist") -> dict[str, Any]:
    """Return `given` settings with those that fit the data set, and the model, for what is not given."""
    dataset = given.get("dataset", dataset)
    if dataset not in DATASETS:
        return {**given, "dataset": dataset}  # for the check that names it
    data = DATASETS[dataset]
    fit = {"model": data.model, "epochs": data.epochs, "batch_size": data.batch_size, "lr": data.lr}
    model = MODELS.get(given.get("model", data.model))
    if model:
        fit["loss"] = model.loss
        fit["optimizer"] = SCRATCH_OPTIMIZER if model.scratch else "sgd"
        fit["activation"] = next(iter(ACTIVATIONS)) if model.hidden else None
    return {**fit, **given, "dataset": dataset}


def models_for(dataset: str) -> list[str]:
    """Return the names of the models that fit a data set."""
    return [name for name, entry in MODELS.items() if entry.task is DATASETS[dataset].task]


def losses_for(dataset: str) -> list[str]:
    """Return the names of the losses that fit a data set."""
    return [name for name, entry in LOSSES.items() if entry.task is DATASETS[dataset].task]


def check_name(option: str, name: str, known: Iterable[str], whose: str = "") -> None:
    """Raise `UsageError` unless `name` is one of `known`."""
    names = list(known)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        advice = f"did you mean {close[0]}?" if close else f"the default is {names[0]}"
        raise UsageError(f"expected --{option} to be one of {', '.join(names)}{whose}, got {name!r}; {advice}")


def check_names(config: "TrainConfig") -> None:
    """Raise `UsageError` unless data set, model and loss are known and fit each other."""
    check_name("dataset", config.dataset, DATASETS)
    whose = f" for --dataset {config.dataset} ({DATASETS[config.dataset].task.value})"
    check_name("model", config.model, models_for(config.dataset), whose)
    check_name("loss", config.loss, losses_for(config.dataset), whose)
    if LOSSES[config.loss].layer and MODELS[config.model].scratch:
        layered = " or ".join(name for name in models_for(config.dataset) if not MODELS[name].scratch)
        raise UsageError(
            f"expected --loss {config.loss} with --model {layered}, which end in nn.Linear, got it with --model "
            f"{config.model}; choose --loss fused"
        )
    if config.activation is None:
        return
    check_name("activation", config.activation, ACTIVATIONS)
    if not MODELS[config.model].hidden:
        deep = " or ".join(name for name, entry in MODELS.items() if entry.hidden)
        raise UsageError(
            f"expected --activation with --model {deep}, got it with --model {config.model}, "
            "which has no hidden layer; leave it out"
        )


def check_options(config: "TrainConfig") -> None:
    """Raise `UsageError` if an option is on that the data set, the loss or the model cannot have."""
    task = DATASETS[config.dataset].task
    labels = {"label-smoothing": config.label_smoothing, "mixup": config.mixup, "one-hot": config.one_hot}
    for option, value in {**labels, "logit-scale": config.logit_scale != 1}.items():
        if value and task is not Task.CLASSES:
            raise UsageError(
                f"expected --{option} with a data set of several classes, got it with --dataset {config.dataset} "
                f"({task.value}); leave it out"
            )
    soft = [name for name, entry in LOSSES.items() if entry.soft]
    for option, value in labels.items():
        if value and config.loss not in soft:
            raise UsageError(f"expected --{option} with --loss {' or '.join(soft)}, got it with --loss {config.loss}")
    parts = {"model": config.model, "optimizer": config.optimizer}
    for option, value in {"amp": config.amp, "compile": config.compile}.items():
        for part, name in parts.items():
            if value and name.startswith("scratch"):
                raise UsageError(f"expected --{option} with library parts, got it with --{part} {name}; leave it out")
