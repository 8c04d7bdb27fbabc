"""Shuffled batches, gathered from memory or read by DataLoader workers, and soft labels for them.

Both ways yield the same batches. Each of several ranks gets its shard of every batch.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from softmax_fused.training.data.datasets import Split, to_input
from softmax_fused.training.ranks.group import SINGLE_PROCESS, Ranks
from softmax_fused.training.ranks.shards import ShardSampler
from softmax_fused.training.signals import ignore_signals

Batch = tuple[Tensor, Tensor]


class Batches(Protocol):
    """The training set, epoch by epoch, as batches on the device.

    A batch is images, float32 of shape (B, 28, 28), and labels: class indices (B,) or class probabilities (B, C).
    A regression has features of shape (B, D) in place of images, and values (B,) as labels.
    """

    def __len__(self) -> int:
        """Return the number of batches in an epoch; the last one may be smaller."""
        ...

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yield the batches of epoch `number`, counted from 1."""
        ...


class MemoryBatches:
    """Batches gathered from a split that stays on the device, one byte a pixel."""

    def __init__(
        self, split: Split, batch_size: int, seed: int, device: torch.device, ranks: Ranks = SINGLE_PROCESS
    ) -> None:
        self.split = split.to(device)
        self.sampler = ShardSampler(TensorDataset(split.labels), batch_size, seed, ranks)

    def __len__(self) -> int:
        return len(self.sampler)

    def epoch(self, number: int) -> Iterator[Batch]:
        """See `Batches.epoch`."""
        images, labels = self.split.images, self.split.labels
        self.sampler.set_epoch(number)
        for rows in self.sampler.rows(labels.device):
            yield to_input(images.index_select(0, rows)), labels.index_select(0, rows)


class LoaderBatches:
    """The same batches through `torch.utils.data.DataLoader` with worker processes."""

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seed: int,
        device: torch.device,
        workers: int,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        self.device = device
        dataset = TensorDataset(split.images, split.labels)
        self.sampler = ShardSampler(dataset, batch_size, seed, ranks)
        self.loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=None,  # the sampler yields the row numbers of whole batches
            sampler=self.sampler,
            num_workers=workers,
            persistent_workers=True,
            pin_memory=device.type == "cuda",
            worker_init_fn=ignore_signals_in_worker,
            generator=torch.Generator().manual_seed(seed),  # else each epoch would draw from the global generator
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def epoch(self, number: int) -> Iterator[Batch]:
        """See `Batches.epoch`."""
        self.sampler.set_epoch(number)
        for images, labels in self.loader:
            yield to_input(images.to(self.device, non_blocking=True)), labels.to(self.device, non_blocking=True)


def ignore_signals_in_worker(worker: int) -> None:  # noqa: ARG001 - DataLoader passes the worker's number
    """Leave Ctrl-C, and SIGTERM, which torchrun sends to workers too, to the parent, which then ends its workers."""
    ignore_signals()


def make_batches(
    split: Split, batch_size: int, seed: int, device: torch.device, workers: int = 0, ranks: Ranks = SINGLE_PROCESS
) -> Batches:
    """Return batches from `workers` processes, or from memory where `workers` is 0."""
    if workers:
        return LoaderBatches(split, batch_size, seed, device, workers, ranks)
    return MemoryBatches(split, batch_size, seed, device, ranks)


class SoftLabelBatches:
    r"""Batches with one-hot targets of shape (B, C), mixed within each batch where `mixup` is above 0.

    .. math::
        \tilde x = \lambda x_i + (1 - \lambda) x_j, \qquad \tilde t = \lambda t_i + (1 - \lambda) t_j, \qquad
        \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    Each batch has one :math:`\lambda`, and j is a permutation of its examples (Zhang et al. 2018); both depend on
    (seed, epoch) alone. With mixup, several ranks each read whole `batches` and mix their own shard of a batch with
    examples of the whole batch.

    Args:
        batches: The batches, with class indices as labels.
        classes: The number of classes.
        mixup: :math:`\alpha`; 0 for one-hot targets.
        seed: Of :math:`\lambda` and of the permutations.
        ranks: Those among which this class splits each batch; `SINGLE_PROCESS` where `batches` yields shards.
    """

    def __init__(self, batches: Batches, classes: int, mixup: float, seed: int, ranks: Ranks = SINGLE_PROCESS) -> None:
        self.batches, self.classes, self.mixup, self.seed, self.ranks = batches, classes, mixup, seed, ranks

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, number: int) -> Iterator[Batch]:
        """See `Batches.epoch`."""
        random = np.random.default_rng([self.seed, number])
        for images, labels in self.batches.epoch(number):
            target = F.one_hot(labels, self.classes).to(torch.float32)
            if self.mixup:
                weight = random.beta(self.mixup, self.mixup)
                partner = self.ranks.shard(torch.from_numpy(random.permutation(len(labels)))).to(labels.device)
                own_images, own_target = self.ranks.shard(images), self.ranks.shard(target)
                yield own_images.lerp(images[partner], 1 - weight), own_target.lerp(target[partner], 1 - weight)
            else:
                yield images, target
