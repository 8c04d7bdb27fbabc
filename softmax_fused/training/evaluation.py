"""What a run says about its test set after an epoch: classes are counted, a regression's parameters read off."""

import math
from typing import Any

import torch
from torch import Tensor

from softmax_fused.training.data import ImageData, Split
from softmax_fused.training.errors import CommonError
from softmax_fused.training.learner import Learner
from softmax_fused.training.loop import confusion_matrix, predict_classes, predict_outputs
from softmax_fused.training.ranks import ALONE, Ranks

CURVES = ("train_loss", "train_accuracy", "test_accuracy", "epoch_seconds")
REGRESSION_CURVES = ("train_loss", "test_loss", "epoch_seconds")


def curve_names(data: ImageData) -> tuple[str, ...]:
    """Return the names of what is recorded each epoch."""
    return CURVES if data.classes else REGRESSION_CURVES


def evaluate(learner: Learner, data: ImageData, ranks: Ranks = ALONE) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the test set's value of a curve, and what the record holds of the last epoch alone.

    Several ranks classify a part of the test set each and add up their counts; all evaluate a regression.
    """
    if data.classes:
        part = Split(data.test.images[ranks.rank :: ranks.size], data.test.labels[ranks.rank :: ranks.size])
        counts = ranks.sum(confusion_matrix(predict_classes(learner, part), part, len(data.classes))).cpu()
        return {"test_accuracy": int(counts.diagonal().sum()) / len(data.test)}, _of_classes(counts, data.classes)
    loss = learner.loss(predict_outputs(learner, data.test).float(), data.test.labels).item()  # as in training
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
