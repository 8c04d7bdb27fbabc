"""The training loop of one epoch. It reads nothing back from the device before the epoch ends."""

import math
from collections.abc import Iterable
from itertools import repeat

import torch
from torch import Tensor

from softmax_fused.training.data.batches import Batch
from softmax_fused.training.errors import AllRanksError
from softmax_fused.training.models.learner import Learner
from softmax_fused.training.ranks.group import SINGLE_PROCESS, Ranks
from softmax_fused.training.ranks.shards import EpochShards


def train_epoch(learner: Learner, batches: Iterable[Batch], shards: EpochShards | None = None) -> tuple[float, float]:
    """Train on every batch once.

    Args:
        learner: What to train.
        batches: All batches of an epoch, or this rank's shards of them.
        shards: The sizes of the shards, where several ranks train.

    Returns:
        The mean loss and the accuracy over the epoch's images, each computed at the image's own step. With soft labels,
        a prediction is right where it is the likeliest class. The accuracy of a regression is NaN.

    Raises:
        AllRanksError: if the mean loss, or a weight after the last step, is not finite.
    """
    learner.model.train()
    losses, correct, sizes = [], [], []
    for (images, target), shard in zip(batches, shards or repeat(None), strict=False):
        loss, predicted = learner.loss_and_predictions(images, target)
        learner.update(loss if shard is None else loss * shard.factor)
        losses.append(loss.detach())
        if shard is None or shard.examples:
            correct.append(_count_correct(predicted, target))
        sizes.append(len(target) if shard is None else shard.examples)
    ranks = shards.ranks if shards else SINGLE_PROCESS
    loss_of_epoch = mean_loss(losses, sizes, learner.advice, ranks)
    check_weights(learner)
    total = torch.stack(correct).sum().cpu().double() if correct else torch.zeros((), dtype=torch.float64)
    return loss_of_epoch, ranks.sum(total).item() / int(ranks.sum(torch.tensor(sum(sizes))))


def _count_correct(predicted: Tensor | None, target: Tensor) -> Tensor:
    if predicted is None:
        return torch.full((), torch.nan, device=target.device)
    return (predicted == (target.argmax(dim=1) if target.is_floating_point() else target)).sum()


def mean_loss(
    losses: list[Tensor],
    sizes: list[int],
    advice: str,
    ranks: Ranks = SINGLE_PROCESS,
    *,
    split: str = "training",
) -> float:
    """Return the mean loss over the images of all ranks, from the mean losses of batches, in float64.

    Args:
        losses: The mean loss of each batch.
        sizes: The number of images in each batch.
        advice: What to do about a loss that is not finite.
        ranks: Those that have evaluated batches.
        split: Which loss it is, for the message.

    Raises:
        AllRanksError: if it is not finite.
    """
    total = ranks.sum(torch.stack(losses).cpu().double().dot(torch.tensor(sizes).double()))
    mean = total.item() / int(ranks.sum(torch.tensor(sum(sizes))))
    if not math.isfinite(mean):
        raise AllRanksError(f"expected a finite {split} loss, got {mean}; {advice}")
    return mean


def check_weights(learner: Learner) -> None:
    """Raise `AllRanksError` unless all weights are finite: no loss of the epoch shows the effect of its last step."""
    if not all(bool(parameter.isfinite().all()) for parameter in learner.model.parameters()):
        raise AllRanksError(f"expected finite weights after the epoch's last step, got others; {learner.advice}")
