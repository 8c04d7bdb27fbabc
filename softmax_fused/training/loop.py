"""The training loop: one epoch, one evaluation. Nothing here reads a value back before an epoch ends."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from softmax_fused.training.batches import Batch
from softmax_fused.training.data import Split, to_input
from softmax_fused.training.errors import LabError
from softmax_fused.training.learner import Learner
from softmax_fused.training.losses import class_scores

EVALUATION_BATCH = 2000  # rows whose float32 pixels, 6 MB, stay in a core's cache


def train_epoch(learner: Learner, batches: Iterable[Batch]) -> tuple[float, float]:
    """Train on every batch once.

    Returns:
        The mean loss over the epoch's images and the share of them classified correctly, each at its own step; of
        soft labels the likeliest class counts, and for a regression the share is NaN.

    Raises:
        LabError: if the mean loss is not finite.
    """
    learner.model.train()
    losses, correct, sizes = [], [], []
    for images, target in batches:
        loss, predicted = learner.loss_and_predictions(images, target)
        learner.update(loss)
        losses.append(loss.detach())
        correct.append(_count_right(predicted, target))
        sizes.append(len(target))
    return mean_loss(losses, sizes, learner.advice), torch.stack(correct).sum().item() / sum(sizes)


def _count_right(predicted: Tensor | None, target: Tensor) -> Tensor:
    if predicted is None:
        return torch.full((), torch.nan, device=target.device)
    return (predicted == (target.argmax(dim=1) if target.is_floating_point() else target)).sum()


def mean_loss(losses: list[Tensor], sizes: list[int], advice: str) -> float:
    """Return the mean over images of batches' mean losses, summed in float64.

    Raises:
        LabError: if it is not finite; `advice` says what to do about it.
    """
    mean = torch.stack(losses).cpu().double().dot(torch.tensor(sizes).double()).item() / sum(sizes)
    if not math.isfinite(mean):
        raise LabError(f"expected a finite training loss, got {mean}; {advice}")
    return mean


@torch.no_grad()
def predict_outputs(learner: Learner, split: Split) -> Tensor:
    """Return what the model makes of every input of a split on the learner's device: logits, or values."""
    learner.model.eval()
    slices = torch.split(split.images, EVALUATION_BATCH)
    with learner.autocast():
        return torch.cat([learner.model(to_input(images)) for images in slices])


def predict_classes(learner: Learner, split: Split) -> Tensor:
    """Return the class index of every image of a split on the learner's device."""
    return class_scores(predict_outputs(learner, split)).argmax(dim=1)


def confusion_matrix(predicted: Tensor, split: Split, classes: int) -> Tensor:
    """Return counts of shape (true class, predicted class)."""
    return torch.bincount(split.labels * classes + predicted, minlength=classes**2).view(classes, classes)
