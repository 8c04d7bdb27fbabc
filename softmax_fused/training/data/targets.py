"""Soft labels: batches whose targets are class probabilities, and mixup."""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from softmax_fused.training.data.batches import Batch, Batches
from softmax_fused.training.ranks.group import ALONE, Ranks


class SoftBatches:
    r"""Batches with one-hot targets of shape (B, C), mixed with one another where `mixup` is above 0.

    .. math::
        \tilde x = \lambda x_i + (1 - \lambda) x_j, \qquad \tilde t = \lambda t_i + (1 - \lambda) t_j, \qquad
        \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    One :math:`\lambda` a batch, and j a permutation of it (Zhang et al. 2018). Both are functions of (seed, epoch).
    What is mixed is the share that `ranks` leave to this one, with examples of the whole batch, which `batches` yield.
    """

    def __init__(self, batches: Batches, classes: int, mixup: float, seed: int, ranks: Ranks = ALONE) -> None:
        self.batches, self.classes, self.mixup, self.seed, self.ranks = batches, classes, mixup, seed, ranks

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, number: int) -> Iterator[Batch]:
        """See `Batches.epoch`."""
        random = np.random.default_rng([self.seed, number])
        for images, labels in self.batches.epoch(number):
            target = F.one_hot(labels, self.classes).to(torch.float32)
            if self.mixup:
                share = random.beta(self.mixup, self.mixup)
                others = self.ranks.share(torch.from_numpy(random.permutation(len(labels)))).to(labels.device)
                own, own_target = self.ranks.share(images), self.ranks.share(target)
                yield own.lerp(images[others], 1 - share), own_target.lerp(target[others], 1 - share)
            else:
                yield images, target
