"""Which examples of a global batch a rank computes, and the factor of their mean loss."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from softmax_fused.training.ranks.group import CPU, SINGLE_PROCESS, Ranks


def epoch_permutation(size: int, seed: int, epoch: int) -> Tensor:
    """Return the order of the examples in an epoch.

    The order is a function of (seed, epoch), so that resuming a run needs no saved state of a sampler.
    """
    # torch's CPU generator keeps 32 bits of its seed; an odd factor gives each of the 2^32 seeds its own.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**32)
    return torch.randperm(size, generator=generator)


class ShardSampler(DistributedSampler[Tensor]):
    """The row numbers of this rank's shard of every global batch.

    torch's sampler splits an epoch's permutation: rank r gets its examples r, r + size, ..., padded so that all ranks
    get equally many. Which examples share a step then depends on the number of ranks, and some examples count twice.
    This sampler splits the permutation into the batches of a single process, and each batch over the ranks, unpadded.
    """

    def __init__(self, dataset: Dataset[Any], batch_size: int, seed: int, ranks: Ranks = SINGLE_PROCESS) -> None:
        super().__init__(dataset, ranks.size, ranks.rank, seed=seed)
        self.batch_size, self.ranks, self.size = batch_size, ranks, len(dataset)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        return self.rows(CPU)

    def rows(self, device: torch.device) -> Iterator[Tensor]:
        """Yield the row numbers of each shard, on a device."""
        order = epoch_permutation(self.size, self.seed, self.epoch).to(device)
        return map(self.ranks.shard, torch.split(order, self.batch_size))


@dataclass(frozen=True)
class Shard:
    """A rank's part of one global batch: its number of examples, and the factor of their mean loss."""

    examples: int
    factor: float


@dataclass(frozen=True)
class EpochShards:
    r"""A rank's parts of the global batches of an epoch, in order.

    DistributedDataParallel averages gradients over ranks. Of a batch of B examples, rank r of R has :math:`n_r`, and

    .. math::
        \frac{1}{R} \sum_r \frac{R\, n_r}{B} \nabla \bar\ell_r = \nabla \frac{1}{B} \sum_i \ell_i.

    The factor is therefore :math:`R\, n_r / B`: 1 where all ranks have equally many, 0 for a rank without examples.
    """

    ranks: Ranks
    examples: int
    batch_size: int

    def __iter__(self) -> Iterator[Shard]:
        for start in range(0, self.examples, self.batch_size):
            size = min(self.batch_size, self.examples - start)
            own = len(range(self.ranks.rank, size, self.ranks.size))
            yield Shard(own, self.ranks.size * own / size)
