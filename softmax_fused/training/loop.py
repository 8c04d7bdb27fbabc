"""The training loop: one epoch, one evaluation. Nothing here reads a value back before an epoch ends."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from softmax_fused.training.batches import Batch
from softmax_fused.training.data import Split, to_input
from softmax_fused.training.errors import LabError
from softmax_fused.training.learner import Learner

EVALUATION_BATCH = 2000  # rows whose float32 pixels, 6 MB, stay in a core's cache


def train_epoch(learner: Learner, batches: Iterable[Batch]) -> tuple[float, float]:
    """Train on every batch once.

    Returns:
        The mean loss over the epoch's images and the share of them classified correctly, each at its own step.

    Raises:
        LabError: if a loss is not finite.
    """
    learner.model.train()
    losses, correct, sizes = [], [], []
    for images, labels in batches:
        logits = learner.logits(images)
        loss = learner.loss(logits, labels)
        learner.update(loss)
        losses.append(loss.detach())
        correct.append((logits.detach().argmax(dim=1) == labels).sum())
        sizes.append(len(labels))
    return mean_loss(losses, sizes), int(torch.stack(correct).sum()) / sum(sizes)


def mean_loss(losses: list[Tensor], sizes: list[int]) -> float:
    """Return the mean over images of batches' mean losses, summed in float64.

    Raises:
        LabError: if it is not finite.
    """
    mean = torch.stack(losses).cpu().double().dot(torch.tensor(sizes).double()).item() / sum(sizes)
    if not math.isfinite(mean):
        raise LabError(f"expected a finite training loss, got {mean}; choose a smaller --lr")
    return mean


@torch.no_grad()
def predict_classes(learner: Learner, split: Split) -> Tensor:
    """Return the class index of every image of a split on the learner's device."""
    learner.model.eval()
    slices = torch.split(split.images, EVALUATION_BATCH)
    with learner.autocast():
        return torch.cat([learner.model(to_input(images)).argmax(dim=1) for images in slices])


def confusion_matrix(predicted: Tensor, split: Split, classes: int) -> Tensor:
    """Return counts of shape (true class, predicted class)."""
    return torch.bincount(split.labels * classes + predicted, minlength=classes**2).view(classes, classes)
