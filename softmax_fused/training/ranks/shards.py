"""Which examples of a global batch fall to a rank, and what they weigh."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from softmax_fused.training.ranks.group import ALONE, CPU, Ranks


def shuffled(size: int, seed: int, epoch: int) -> Tensor:
    """Return the order of the images, a function of (seed, epoch): resuming needs no state of a sampler."""
    # torch's CPU generator keeps 32 bits of its seed; an odd factor gives each of 2^32 seeds its own.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**32)
    return torch.randperm(size, generator=generator)


class ShareSampler(DistributedSampler[Tensor]):
    """The rows of this rank's share of every global batch.

    torch's sampler deals out the permutation of an epoch, to rank r its examples r, r + size, ..., and pads it so that
    every rank gets as many: which examples meet in a step depends on the number of ranks, and some count twice. This
    one cuts the permutation into the batches of a single process and deals out each of them, without padding.
    """

    def __init__(self, dataset: Dataset[Any], batch_size: int, seed: int, ranks: Ranks = ALONE) -> None:
        super().__init__(dataset, ranks.size, ranks.rank, seed=seed)
        self.batch_size, self.ranks, self.size = batch_size, ranks, len(dataset)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        return self.rows(CPU)

    def rows(self, device: torch.device) -> Iterator[Tensor]:
        """Yield the rows of each share on a device."""
        order = shuffled(self.size, self.seed, self.epoch).to(device)
        return map(self.ranks.share, torch.split(order, self.batch_size))


@dataclass(frozen=True)
class Share:
    """A rank's part of one batch: the number of its examples, and the factor of their mean loss."""

    examples: int
    factor: float


@dataclass(frozen=True)
class Shares:
    r"""A rank's parts of the batches of an epoch.

    DistributedDataParallel averages gradients over ranks. Of a batch of B examples rank r of R has :math:`n_r`, and

    .. math::
        \frac{1}{R} \sum_r \frac{R\, n_r}{B} \nabla \bar\ell_r = \nabla \frac{1}{B} \sum_i \ell_i,

    so :math:`R\, n_r / B` is the factor: 1 where all have as many, 0 for a rank that has none.
    """

    ranks: Ranks
    examples: int
    batch_size: int

    def __iter__(self) -> Iterator[Share]:
        for start in range(0, self.examples, self.batch_size):
            size = min(self.batch_size, self.examples - start)
            own = len(range(self.ranks.rank, size, self.ranks.size))
            yield Share(own, self.ranks.size * own / size)
