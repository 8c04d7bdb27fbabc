"""Evaluation: loss and predictions on a split, and what the record of a run says about the test set."""

import math
from typing import Any

import torch
from torch import Tensor

from softmax_fused.training.data.datasets import ImageData, Split, to_input
from softmax_fused.training.errors import AllRanksError
from softmax_fused.training.models.learner import Learner
from softmax_fused.training.models.loop import mean_loss
from softmax_fused.training.models.losses import class_logits
from softmax_fused.training.ranks.group import SINGLE_PROCESS, Ranks

EVALUATION_BATCH = 2000  # rows; their float32 pixels, 6 MB, stay in a core's cache
CURVES = ("train_loss", "test_loss", "train_accuracy", "test_accuracy", "epoch_seconds")
REGRESSION_CURVES = ("train_loss", "test_loss", "epoch_seconds")


def curve_names(data: ImageData) -> tuple[str, ...]:
    """Return the names of the values that are recorded for each epoch."""
    return CURVES if data.classes else REGRESSION_CURVES


def evaluate(
    learner: Learner, data: ImageData, ranks: Ranks = SINGLE_PROCESS
) -> tuple[dict[str, float], dict[str, Any]]:
    """Evaluate the test set, of which each of several ranks computes a part.

    The loss is the loss of training, label smoothing included, on targets that are never mixed.

    Returns:
        The epoch's values of the test set's curves; and those entries of the record that describe the last epoch alone:
        confusion matrix and accuracy of each class, or the parameters of a regression.

    Raises:
        AllRanksError: if the loss is not finite.
    """
    part = Split(data.test.images[ranks.rank :: ranks.size], data.test.labels[ranks.rank :: ranks.size])
    outputs, loss = evaluate_split(learner, part, ranks)
    if data.classes:
        predicted = class_logits(outputs).argmax(dim=1)
        counts = ranks.sum(confusion_matrix(predicted, part, len(data.classes))).cpu()
        accuracy = int(counts.diagonal().sum()) / len(data.test)
        per_class = (counts.diagonal().double() / counts.sum(dim=1).clamp(min=1)).tolist()
        return {"test_loss": loss, "test_accuracy": accuracy}, {
            "per_class_accuracy": dict(zip(data.classes, per_class, strict=True)),
            "confusion_matrix": counts.tolist(),
        }
    weights, bias = read_parameters(learner, data.test.images)
    if not all(map(math.isfinite, (loss, *weights, bias))):
        raise AllRanksError(f"expected a finite test loss, got {loss}; {learner.advice}")
    parameters: dict[str, Any] = {"weights": weights, "bias": bias}
    if data.true_parameters:
        parameters |= {"true_weights": list(data.true_parameters[:-1]), "true_bias": data.true_parameters[-1]}
    return {"test_loss": loss}, {"parameters": parameters}


@torch.no_grad()
def evaluate_split(learner: Learner, split: Split, ranks: Ranks = SINGLE_PROCESS) -> tuple[Tensor, float]:
    """Return the model's outputs for this rank's split, and the mean loss over the splits of all ranks.

    Raises:
        AllRanksError: if the mean loss is not finite.
    """
    learner.model.eval()
    learner = learner.for_evaluation()
    outputs, losses, sizes = [], [], []
    batches = (torch.split(tensor, EVALUATION_BATCH) for tensor in (split.images, split.labels))
    for images, target in zip(*batches, strict=True):
        values, loss = learner.outputs_and_loss(to_input(images), target)
        outputs.append(values)
        losses.append(loss if len(target) else torch.zeros_like(loss))  # the mean over no examples is NaN
        sizes.append(len(target))
    return torch.cat(outputs), mean_loss(losses, sizes, learner.advice, ranks, split="test")


@torch.no_grad()
def predict_classes(learner: Learner, split: Split) -> Tensor:
    """Return the predicted class of every image of a split on the learner's device."""
    learner.model.eval()
    with learner.autocast():
        outputs = [learner.model(to_input(images)) for images in torch.split(split.images, EVALUATION_BATCH)]
    return class_logits(torch.cat(outputs)).argmax(dim=1)


def confusion_matrix(predicted: Tensor, split: Split, classes: int) -> Tensor:
    """Return counts of shape (target class, predicted class)."""
    return torch.bincount(split.labels * classes + predicted, minlength=classes**2).view(classes, classes)


@torch.no_grad()
def read_parameters(learner: Learner, features: Tensor) -> tuple[list[float], float]:
    """Return weights and bias of a linear model, from its values at 0 and at the unit vectors."""
    size = features.shape[1]
    points = torch.cat([features.new_zeros(1, size), torch.eye(size, device=features.device)])
    values = learner.logits(points).double()
    return (values[1:] - values[0]).tolist(), values[0].item()
