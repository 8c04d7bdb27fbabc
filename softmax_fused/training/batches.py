"""Shuffled batches: gathered from memory, or read by the workers of a DataLoader; the same ones either way."""

import signal
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from softmax_fused.training.data import Split, to_input

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


def shuffled(size: int, seed: int, epoch: int) -> Tensor:
    """Return the order of the images, a function of (seed, epoch): resuming needs no state of a sampler."""
    # torch's CPU generator keeps 32 bits of its seed; an odd factor gives each of 2^32 seeds its own.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**32)
    return torch.randperm(size, generator=generator)


class MemoryBatches:
    """Batches gathered from a split that stays on the device, one byte a pixel."""

    def __init__(self, split: Split, batch_size: int, seed: int, device: torch.device) -> None:
        self.split = split.to(device)
        self.batch_size = batch_size
        self.seed = seed

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def epoch(self, number: int) -> Iterator[Batch]:
        """See `Batches.epoch`."""
        images, labels = self.split.images, self.split.labels
        order = shuffled(len(labels), self.seed, number).to(labels.device)
        for rows in torch.split(order, self.batch_size):
            yield to_input(images.index_select(0, rows)), labels.index_select(0, rows)


class LoaderBatches:
    """The same batches through `torch.utils.data.DataLoader` with worker processes."""

    def __init__(self, split: Split, batch_size: int, seed: int, device: torch.device, workers: int) -> None:
        self.device = device
        self.order = _Order(len(split), batch_size, seed)
        self.loader: DataLoader[Any] = DataLoader(
            _Rows(split),
            batch_size=None,  # the sampler yields whole batches
            sampler=self.order,
            num_workers=workers,
            persistent_workers=True,
            pin_memory=device.type == "cuda",
            worker_init_fn=leave_interrupts_to_the_parent,
            generator=torch.Generator().manual_seed(seed),  # else each epoch would draw from the global generator
        )

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, number: int) -> Iterator[Batch]:
        """See `Batches.epoch`."""
        self.order.number = number
        for images, labels in self.loader:
            yield to_input(images.to(self.device, non_blocking=True)), labels.to(self.device, non_blocking=True)


class _Order(Sampler[Tensor]):
    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        self.size, self.batch_size, self.seed, self.number = size, batch_size, seed, 1

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.split(shuffled(self.size, self.seed, self.number), self.batch_size))


class _Rows(Dataset[Batch]):
    def __init__(self, split: Split) -> None:
        self.split = split

    def __getitem__(self, rows: Tensor) -> Batch:
        return self.split.images.index_select(0, rows), self.split.labels.index_select(0, rows)


def leave_interrupts_to_the_parent(worker: int) -> None:  # noqa: ARG001 - DataLoader passes the worker's number
    """Let the parent alone decide what Ctrl-C does to workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_batches(split: Split, batch_size: int, seed: int, device: torch.device, workers: int = 0) -> Batches:
    """Return batches from memory, or from `workers` processes if there are to be any."""
    if workers:
        return LoaderBatches(split, batch_size, seed, device, workers)
    return MemoryBatches(split, batch_size, seed, device)
