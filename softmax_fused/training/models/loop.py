"""The training loop: one epoch, one evaluation. Nothing here reads a value back before an epoch ends."""

import math
from collections.abc import Iterable
from itertools import repeat

import torch
from torch import Tensor

from softmax_fused.training.data.batches import Batch
from softmax_fused.training.data.datasets import Split, to_input
from softmax_fused.training.errors import CommonError
from softmax_fused.training.models.learner import Learner
from softmax_fused.training.models.losses import class_scores
from softmax_fused.training.ranks.group import ALONE, Ranks
from softmax_fused.training.ranks.shards import Shares

EVALUATION_BATCH = 2000  # rows whose float32 pixels, 6 MB, stay in a core's cache


def train_epoch(learner: Learner, batches: Iterable[Batch], shares: Shares | None = None) -> tuple[float, float]:
    """Train on every batch once.

    Args:
        learner: What to train.
        batches: All of an epoch.
        shares: What `batches` are of the global batches, where several ranks train.

    Returns:
        The mean loss over the epoch's images and the share of them classified correctly, each at its own step; of
        soft labels the likeliest class counts, and for a regression the share is NaN.

    Raises:
        CommonError: if the mean loss is not finite, or a weight after the last step.
    """
    learner.model.train()
    losses, correct, sizes = [], [], []
    for (images, target), share in zip(batches, shares or repeat(None), strict=False):
        loss, predicted = learner.loss_and_predictions(images, target)
        learner.update(loss if share is None else loss * share.factor)
        losses.append(loss.detach())
        if share is None or share.examples:
            correct.append(_count_right(predicted, target))
        sizes.append(len(target) if share is None else share.examples)
    ranks = shares.ranks if shares else ALONE
    loss_of_all = mean_loss(losses, sizes, learner.advice, ranks)
    check_weights(learner)
    right = torch.stack(correct).sum().cpu().double() if correct else torch.zeros((), dtype=torch.float64)
    return loss_of_all, ranks.sum(right).item() / int(ranks.sum(torch.tensor(sum(sizes))))


def _count_right(predicted: Tensor | None, target: Tensor) -> Tensor:
    if predicted is None:
        return torch.full((), torch.nan, device=target.device)
    return (predicted == (target.argmax(dim=1) if target.is_floating_point() else target)).sum()


def mean_loss(
    losses: list[Tensor], sizes: list[int], advice: str, ranks: Ranks = ALONE, *, of: str = "training"
) -> float:
    """Return the mean over images, of all ranks, of batches' mean losses, summed in float64.

    Raises:
        CommonError: if it is not finite; the message says that it is the loss `of` which set, and gives `advice`.
    """
    total = ranks.sum(torch.stack(losses).cpu().double().dot(torch.tensor(sizes).double()))
    mean = total.item() / int(ranks.sum(torch.tensor(sum(sizes))))
    if not math.isfinite(mean):
        raise CommonError(f"expected a finite {of} loss, got {mean}; {advice}")
    return mean


def check_weights(learner: Learner) -> None:
    """Raise `CommonError` unless all weights are finite: an epoch's losses do not tell what its last step has done."""
    if not all(bool(parameter.isfinite().all()) for parameter in learner.model.parameters()):
        raise CommonError(f"expected finite weights after the epoch's last step, got others; {learner.advice}")


@torch.no_grad()
def predict_outputs(learner: Learner, split: Split) -> Tensor:
    """Return what the model makes of every input of a split on the learner's device: logits, or values."""
    learner.model.eval()
    slices = torch.split(split.images, EVALUATION_BATCH)
    with learner.autocast():
        return torch.cat([learner.model(to_input(images)) for images in slices])


@torch.no_grad()
def evaluate_split(learner: Learner, split: Split, ranks: Ranks = ALONE) -> tuple[Tensor, float]:
    """Return the model's outputs for every input of this rank's split, and the mean loss over those of all ranks.

    Raises:
        CommonError: if the mean loss is not finite.
    """
    learner.model.eval()
    learner = learner.uncompiled()
    outputs, losses, sizes = [], [], []
    slices = (torch.split(tensor, EVALUATION_BATCH) for tensor in (split.images, split.labels))
    for images, target in zip(*slices, strict=True):
        values, loss = learner.outputs_and_loss(to_input(images), target)
        outputs.append(values)
        losses.append(loss if len(target) else torch.zeros_like(loss))  # a mean over no examples is NaN
        sizes.append(len(target))
    return torch.cat(outputs), mean_loss(losses, sizes, learner.advice, ranks, of="test")


def predict_classes(learner: Learner, split: Split) -> Tensor:
    """Return the class index of every image of a split on the learner's device."""
    return class_scores(predict_outputs(learner, split)).argmax(dim=1)


def confusion_matrix(predicted: Tensor, split: Split, classes: int) -> Tensor:
    """Return counts of shape (true class, predicted class)."""
    return torch.bincount(split.labels * classes + predicted, minlength=classes**2).view(classes, classes)
