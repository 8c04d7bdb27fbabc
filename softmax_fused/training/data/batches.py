"""Shuffled batches: gathered from memory, or read by the workers of a DataLoader; the same ones either way.

Of several ranks each gets its share of every batch.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from softmax_fused.training.data.datasets import Split, to_input
from softmax_fused.training.ranks.group import ALONE, Ranks
from softmax_fused.training.ranks.shards import ShareSampler
from softmax_fused.training.signals import ignore_signals

Batch = tuple[Tensor, Tensor]


class Batches(Protocol):
    """The training set, epoch by epoch, as (images float32 of shape (B, 28, 28), labels) on the device.

    A regression has features of shape (B, D) for images; labels may be class probabilities of shape (B, C).
    """

    def __len__(self) -> int:
        """Return the number of batches in an epoch; the last may be smaller."""
        ...

    def epoch(self, number: int) -> Iterator[Batch]:
        """Yield the batches of epoch `number`, the first being 1."""
        ...


class MemoryBatches:
    """Batches gathered from a split that stays on the device, one byte a pixel."""

    def __init__(self, split: Split, batch_size: int, seed: int, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.split = split.to(device)
        self.sampler = ShareSampler(_Rows(split), batch_size, seed, ranks)

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
        self, split: Split, batch_size: int, seed: int, device: torch.device, workers: int, ranks: Ranks = ALONE
    ) -> None:
        self.device = device
        rows = _Rows(split)
        self.sampler = ShareSampler(rows, batch_size, seed, ranks)
        self.loader: DataLoader[Any] = DataLoader(
            rows,
            batch_size=None,  # the sampler yields whole batches
            sampler=self.sampler,
            num_workers=workers,
            persistent_workers=True,
            pin_memory=device.type == "cuda",
            worker_init_fn=leave_signals_to_the_parent,
            generator=torch.Generator().manual_seed(seed),  # else each epoch would draw from the global generator
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def epoch(self, number: int) -> Iterator[Batch]:
        """See `Batches.epoch`."""
        self.sampler.set_epoch(number)
        for images, labels in self.loader:
            yield to_input(images.to(self.device, non_blocking=True)), labels.to(self.device, non_blocking=True)


class _Rows(Dataset[Batch]):
    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, rows: Tensor) -> Batch:
        return self.split.images.index_select(0, rows), self.split.labels.index_select(0, rows)


def leave_signals_to_the_parent(worker: int) -> None:  # noqa: ARG001 - DataLoader passes the worker's number
    """Let the parent alone decide what Ctrl-C does to workers, and SIGTERM, which torchrun sends to them too."""
    ignore_signals()


def make_batches(
    split: Split, batch_size: int, seed: int, device: torch.device, workers: int = 0, ranks: Ranks = ALONE
) -> Batches:
    """Return batches from memory, or from `workers` processes if there are to be any."""
    if workers:
        return LoaderBatches(split, batch_size, seed, device, workers, ranks)
    return MemoryBatches(split, batch_size, seed, device, ranks)
