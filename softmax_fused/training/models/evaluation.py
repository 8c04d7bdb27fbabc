"""What a run says about its test set after an epoch: classes are counted, a regression's parameters read off."""

import math
from typing import Any

import torch
from torch import Tensor

from softmax_fused.training.data.datasets import ImageData, Split
from softmax_fused.training.errors import CommonError
from softmax_fused.training.models.learner import Learner
from softmax_fused.training.models.loop import confusion_matrix, evaluate_split
from softmax_fused.training.models.losses import class_scores
from softmax_fused.training.ranks.group import ALONE, Ranks

CURVES = ("train_loss", "test_loss", "train_accuracy", "test_accuracy", "epoch_seconds")
REGRESSION_CURVES = ("train_loss", "test_loss", "epoch_seconds")


def curve_names(data: ImageData) -> tuple[str, ...]:
    """Return the names of what is recorded each epoch."""
    return CURVES if data.classes else REGRESSION_CURVES


def evaluate(learner: Learner, data: ImageData, ranks: Ranks = ALONE) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the test set's values of the curves, and what the record holds of the last epoch alone.

    The loss is the one that is trained with, of the labels as they are: smoothed if they are in training, not mixed.
    Several ranks evaluate a part of the test set each and add up their losses and counts.

    Raises:
        CommonError: if the loss is not finite.
    """
    part = Split(data.test.images[ranks.rank :: ranks.size], data.test.labels[ranks.rank :: ranks.size])
    outputs, loss = evaluate_split(learner, part, ranks)
    if data.classes:
        predicted = class_scores(outputs).argmax(dim=1)
        counts = ranks.sum(confusion_matrix(predicted, part, len(data.classes))).cpu()
        accuracy = int(counts.diagonal().sum()) / len(data.test)
        return {"test_loss": loss, "test_accuracy": accuracy}, _of_classes(counts, data.classes)
    weights, bias = read_parameters(learner, data.test.images)
    if not all(map(math.isfinite, (loss, *weights, bias))):
        raise CommonError(f"expected a finite test loss, got {loss}; {learner.advice}")
    found = {"weights": weights, "bias": bias}
    true = {"true_weights": list(data.truth[:-1]), "true_bias": data.truth[-1]} if data.truth else {}
    return {"test_loss": loss}, {"parameters": {**found, **true}}


def _of_classes(counts: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """Return the confusion matrix, rows being true classes, and accuracies."""
    shares = (counts.diagonal().double() / counts.sum(dim=1).clamp(min=1)).tolist()
    return {"per_class_accuracy": dict(zip(classes, shares, strict=True)), "confusion_matrix": counts.tolist()}


@torch.no_grad()
def read_parameters(learner: Learner, features: Tensor) -> tuple[list[float], float]:
    """Return weights and bias of a linear model, from its values at 0 and at the unit vectors."""
    size = features.shape[1]
    points = torch.cat([features.new_zeros(1, size), torch.eye(size, device=features.device)])
    values = learner.logits(points).double()
    return (values[1:] - values[0]).tolist(), values[0].item()
